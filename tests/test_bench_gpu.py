"""The GPU suite without a GPU: all of its Python over a stand-in for CuPy, its command line and its table."""

import importlib.util
import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_cupy
import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

import cumoe
from cumoe import cli
from cumoe.bench import (
    gpu,
    gpu_ceilings,
    gpu_operations,
    gpu_peers,
    gpu_tables,
    gpu_tiles,
    gpu_timing,
    results,
)

CEILINGS = gpu_ceilings.Ceilings(
    gpu_ceilings.Limits(4e12, 800e12), gpu_ceilings.Limits(3e12, 600e12), "cuBLAS", 3.1, 1400.0, 690.0
)


@pytest.fixture
def cupy(monkeypatch):
    """CuPy for the benchmarks, on the host."""
    return fake_cupy.install(monkeypatch)


# -- the suite -------------------------------------------------------------------------------------


@pytest.fixture
def suite(cupy, monkeypatch, tmp_path):
    """Run the whole suite on the host: graphs are calls, and the ceilings are given."""
    fake_cupy.cpu_rooms(monkeypatch)
    monkeypatch.setattr(gpu_timing.Stopwatch, "capture", lambda self, call: call)
    monkeypatch.setattr(gpu_ceilings, "measure", lambda stopwatch, dtype: CEILINGS)
    monkeypatch.setattr(gpu, "_OPERATIONS_SHAPE", "tiny")
    monkeypatch.setattr(gpu, "_IDLE_S", 0.0)
    monkeypatch.setattr(gpu_operations, "TOKENS", (1, 20))

    def run(**options):
        console = Console(file=io.StringIO(), width=300)
        named = {"shape_names": ["tiny"], "num_tokens": [1, 20], "repeats": 2, "sustained_s": 0.01, "peers": False}
        problems = gpu.run(console, gpu.Options(output=tmp_path, **{**named, **options}))
        paths = list(tmp_path.iterdir())
        facts, rows = results.read(paths[0]) if paths else ({}, [])
        return SimpleNamespace(problems=problems, facts=facts, rows=rows, text=console.file.getvalue(), paths=paths)

    return run


def test_the_suite_writes_every_case(suite):
    found = suite(dtypes=["bfloat16", "float32"], commit="abc")
    assert found.problems == []
    (path,) = found.paths
    assert re.fullmatch(r"gpu-nvidia-h200-\d{8}T\d{6}Z\.csv", path.name)
    assert {"suite", "date", "commit", "command", "gpu CUDA", "gpu device 0", "version cupy"} <= found.facts.keys()
    assert "690 W" in found.facts["bfloat16 ceiling product"]
    layers = {(row["dtype"], row["T"], row["method"]) for row in found.rows if row["kind"] == "layer"}
    assert layers == {
        (dtype, num_tokens, method)
        for dtype in ("bfloat16", "float32")
        for num_tokens in ("1", "20")
        for method in ("cumoe", "cumoe, plain weights")
    }
    operations = [(row["T"], row["method"]) for row in found.rows if row["kind"] == "operation"]
    steps = ("route", "sort", "align", "act", "sum", "unpermute")
    assert operations == 2 * [(num_tokens, step) for num_tokens in ("1", "20") for step in steps]
    for row in found.rows:
        assert tuple(row) == gpu_tables.COLUMNS
        assert float(row["time_us"]) > 0
        if row["kind"] == "layer":
            assert (row["of_floor"] != "") == (row["dtype"] == "bfloat16")
            assert float(row["error_in_bounds"]) <= 1
            assert float(row["clean_us"]) > 0
            assert row["method"] != "cumoe" or row["ratio_to_cumoe"] == "1.000"
    assert "tiny, bfloat16, uniform routing" in found.text and "single operations, tiny" in found.text
    assert f"wrote {path}" in found.text


def test_long_cases_are_timed_under_load_too(suite, monkeypatch):
    monkeypatch.setattr(gpu, "_LONG_US", 0)
    monkeypatch.setattr(gpu_ceilings, "measure", lambda stopwatch, dtype: slow)
    slow = gpu_ceilings.Ceilings(gpu_ceilings.Limits(1e12, 1.0), gpu_ceilings.Limits(1e12, 0.5), "", 3.0, None, None)
    found = suite(parts=["ceilings", "layer"])
    assert found.problems == []
    for row in found.rows:
        assert float(row["sustained_us"]) > 0
        assert row["clean_us"] == ""
        assert float(row["of_floor_sustained"]) > 0


def test_parts_are_run_alone(suite):
    found = suite(parts=["layer"], num_tokens=[3])
    assert {row["kind"] for row in found.rows} == {"layer"}
    assert not any("ceiling" in name for name in found.facts)
    assert all(row["of_floor"] and not row["of_floor_same_run"] for row in found.rows)


def test_the_stages_of_the_layer_are_asked_for(suite):
    found = suite(parts=["stages"], num_tokens=[20])
    assert found.problems == []
    assert [(row["kind"], row["method"]) for row in found.rows] == [
        ("stage", name) for name in ("permute", "gemm1", "gemm2", "unpermute")
    ]
    first, second = (row for row in found.rows if row["method"].startswith("gemm"))
    assert first["tflops"] != "" and float(second["floor_us"]) > 0
    assert found.rows[0]["tflops"] == "" and float(found.rows[0]["time_us"]) > 0


def test_a_peer_is_measured_and_a_wrong_one_is_named(suite, monkeypatch):
    def peer(name, factor):
        def make(*arrays):
            out = factor * cumoe.fused_experts(*arrays)
            return (lambda: None), out

        return SimpleNamespace(name=name, missing=lambda: "", make=make)

    two = ml_dtypes.bfloat16(2)
    absent = SimpleNamespace(name="absent", missing=lambda: "absent is not installed")
    monkeypatch.setattr(gpu_peers, "PEERS", (peer("fair", ml_dtypes.bfloat16(1)), peer("liar", two), absent))
    monkeypatch.setattr(gpu_timing.Stopwatch, "also_for_torch", lambda self: None)
    found = suite(parts=["layer"], num_tokens=[5], peers=True)
    assert [row["method"] for row in found.rows] == ["cumoe", "cumoe, plain weights", "fair"]
    assert found.problems == ["tiny T=5, liar: WrongResultError: relative error 1"]
    assert "without absent: absent is not installed" in found.text


def test_wrong_results_of_our_own_are_named_and_left_out(suite, monkeypatch):
    right = cumoe.fused_experts

    def wrong(x, w1, *arguments, out, **named):
        result = right(x, w1, *arguments, out=out, **named)
        if not isinstance(w1, np.ndarray):
            result[0, 0] += 1
        return result

    monkeypatch.setattr(cumoe, "fused_experts", wrong)
    found = suite(parts=["layer"], num_tokens=[5])
    assert [row["method"] for row in found.rows] == ["cumoe, plain weights"]
    (problem,) = found.problems
    assert re.fullmatch(r"tiny T=5, cumoe: WrongResultError: \S+ of its error bound", problem)


def test_rows_that_the_replay_leaves_out_are_seen(suite, monkeypatch):
    right, calls = cumoe.fused_experts, []

    def forgetful(*arguments, out, **named):
        calls.append(out)
        if len([one for one in calls if one is out]) == 1:
            right(*arguments, out=out, **named)
        return out

    monkeypatch.setattr(gpu_timing.Stopwatch, "capture", lambda self, call: (call(), call)[1])
    monkeypatch.setattr(cumoe, "fused_experts", forgetful)
    found = suite(parts=["layer"], num_tokens=[5])
    assert found.rows == []
    assert len(found.problems) == 2


def test_an_operation_that_is_wrong_is_named(suite, monkeypatch):
    right = cumoe.moe_sum
    monkeypatch.setattr(cumoe, "moe_sum", lambda x, out: right(x[:, 1:], out=out))
    monkeypatch.setattr(cumoe, "fused_topk", lambda logits, top_k: tuple(a[::-1] for a in topk(logits, top_k)))
    topk = cumoe._route.fused_topk
    found = suite(parts=["operations"])
    assert len(found.rows) == 2 * 6 - 3  # one token's ids in reverse are right
    route, *sums = found.problems[1], found.problems[0], found.problems[2]
    assert route == "route T=20: WrongResultError: ids are not the k best"
    assert all(re.match(r"sum T=(1|20): WrongResultError: relative error 0\.\d", one) for one in sums)


def test_forced_tiles_are_further_contenders(suite, monkeypatch):
    launcher, used = importlib.import_module(gpu_tiles._LAUNCHER), []
    before, right = launcher.block_rows, cumoe.fused_experts

    def noted(*arguments, **named):
        used.append(launcher.block_rows is before)
        return right(*arguments, **named)

    monkeypatch.setattr(cumoe, "fused_experts", noted)
    monkeypatch.setattr(gpu_timing.Stopwatch, "capture", lambda self, call: (call(), call)[1])
    found = suite(parts=["layer"], num_tokens=[5], variants=["32"])
    assert [row["method"] for row in found.rows] == ["cumoe", "cumoe, plain weights", "cumoe 32"]
    assert False in used


def test_what_memory_does_not_hold_is_skipped_and_said(suite, cupy):
    cupy.cuda.Device.mem_info = (1 << 30, 1 << 30)
    found = suite(parts=["layer"])
    assert "skipped tiny (E 8, k 2, H 64, I 96), bfloat16: needs 8.6 GB, 1.1 GB are free" in found.text
    assert found.paths == []


def test_without_a_device_the_suite_is_refused(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert cli.main(["bench", "--suite", "gpu"]) == 2
    assert "suite must be 'cpu' here, got 'gpu'" in capsys.readouterr().err


# -- the command line and the README ---------------------------------------------------------------


def test_options_reach_the_suite(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(gpu, "run", lambda console, options: seen.append(options) or [])
    assert cli.main(["bench", "--suite", "gpu"]) == 0
    assert seen.pop() == gpu.Options()
    words = "bench --suite gpu --shapes tiny small --tokens 1 2 --dtypes float16 --routings skewed --seconds 0"
    words += " --repeats 7 --parts layer --peers none --backend mma --variant a b --commit abc --output"
    assert cli.main([*words.split(), str(tmp_path)]) == 0
    assert seen.pop() == gpu.Options(
        ["tiny", "small"], [1, 2], ["float16"], ["skewed"], 7, 0.0, False, "mma", ["a", "b"], ["layer"], tmp_path, "abc"
    )


def test_problems_end_the_command_with_1(monkeypatch):
    monkeypatch.setattr(gpu, "run", lambda console, options: ["wrong"])
    assert cli.main(["bench", "--suite", "gpu"]) == 1


def readme_script():
    path = Path(__file__).parents[1] / "benchmarks" / "readme.py"
    spec = importlib.util.spec_from_file_location("readme", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_gets_every_case_and_operation(suite, tmp_path):
    found = suite()
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- table:gpu -->\nold\n<!-- /table:gpu -->\nb\n")
    assert readme_script().main(["--readme", str(readme), "--results", str(tmp_path)]) == 0
    text = readme.read_text()
    assert text.startswith("a\n<!-- table:gpu -->\n") and text.endswith("\n<!-- /table:gpu -->\nb\n")
    assert "old" not in text and found.paths[0].name in text and "690 W" in text
    tables = [[line for line in block.splitlines() if line.startswith("|")] for block in text.split("\n\n")]
    layers, operations = (table for table in tables if table)
    assert len(layers) == 2 + 2 and len(operations) == 2 + 6
    for table in (layers, operations):
        assert len({line.count("|") for line in table}) == 1
    assert "cumoe, plain weights" in layers[0]
    assert layers[2].startswith("| 1 | ") and layers[3].startswith("| 20 | ")


def test_a_case_that_failed_stays_in_the_readme(suite, tmp_path):
    found = suite(parts=["layer"], num_tokens=[1, 20])
    rows = [row for row in found.rows if (row["T"], row["method"]) != ("20", "cumoe")]
    text = readme_script().gpu_table(found.facts, rows, source="a.csv")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[-1].startswith("| 20 | failed |")
    assert len({line.count("|") for line in lines}) == 1


def test_our_readme_has_the_markers():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    assert "| a |" in readme_script().replaced(text, "gpu", "| a |")
