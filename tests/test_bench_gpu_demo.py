"""The demo on a GPU, over a stand-in for CuPy: its table, its verdict, and how it ends."""

import re

import fake_cupy
import pytest

import cumoe
from cumoe import _demo, cli
from cumoe.bench import ceilings, gpu_ceilings, gpu_demo, gpu_timing

LIMITS = gpu_ceilings.Limits(4e12, 800e12)


@pytest.fixture
def demo(monkeypatch, capsys):
    """Run the demo with graphs that are calls, CPU rooms and given ceilings; return its exit status and output."""
    fake_cupy.install(monkeypatch)
    fake_cupy.cpu_rooms(monkeypatch)
    monkeypatch.setattr(gpu_timing.Stopwatch, "capture", lambda self, call: call)
    given = gpu_ceilings.Ceilings(LIMITS, LIMITS, "cuBLAS", 3.1, 1400.0, 690.0)
    monkeypatch.setattr(gpu_ceilings, "measure", lambda stopwatch, dtype, sustained_s: given)
    fixed = ceilings.Ceilings(10.0, 1 << 20, 100.0, "avx", 2)
    monkeypatch.setattr(ceilings, "measure", lambda dtype, available_bytes=None: fixed)

    def run(*options):
        status = cli.main(["demo", "--shape", "tiny", "--tokens", "20", *options])
        return status, capsys.readouterr().out

    return run


def rows(text):
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split("[│|]", line)]
        if len(cells) > 3:
            found[cells[1]] = cells[2:-1]
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_layer_runs_on_both_where_there_is_a_gpu(demo, dtype):
    status, text = demo("--dtype", dtype)
    assert status == 0
    before, after = text.split("NVIDIA H200: each stage")
    assert "GFLOP/s (avx micro-kernel)" in before
    found = rows(after)
    assert found.keys() == {*_demo.STAGES, "total"}
    for name, (time_us, tflops, tbs, of_floor, bound) in found.items():
        assert float(time_us) > 0 and float(tbs) >= 0 and float(of_floor) >= 0
        assert (tflops == "-") == (name not in ("gemm1", "gemm2", "total"))
        assert bound in ("memory", "compute")
    assert text.count("over 16 tokens against float64: within the bound") == 2
    assert "1400 MHz, 690 W" in after


@pytest.mark.parametrize("device", ["cuda", "gpu"])
def test_the_gpu_alone(demo, device):
    status, text = demo("--device", device)
    assert status == 0
    assert text.count("within the bound") == 1
    assert "micro-kernel" not in text


def test_the_cpu_alone(demo):
    status, text = demo("--device", "cpu")
    assert status == 0
    assert "H200" not in text


def test_a_wrong_result_of_the_gpu_ends_with_1(demo, monkeypatch):
    right = cumoe.fused_moe

    def wrong(x, *arguments, out=None, **named):
        result = right(x, *arguments, out=out, **named)
        if out is not None:
            out *= 2
        return result

    monkeypatch.setattr(cumoe, "fused_moe", wrong)
    status, text = demo("--device", "cuda", "--dtype", "float32")
    assert status == 1
    assert "BEYOND the bound" in text


def test_a_layer_that_the_gpu_cannot_hold(demo, monkeypatch, capsys):
    monkeypatch.setattr(gpu_demo, "_SPARE_BYTES", 65 << 30)
    status, text = demo()
    assert status == 0
    assert "not on the GPU: tiny needs 1.07 GB more than are free on the GPU" in " ".join(text.split())
    assert demo("--device", "cuda")[0] == 2
