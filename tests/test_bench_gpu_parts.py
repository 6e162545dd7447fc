"""Parts of the GPU suite that need no device: floors, recorded times, checks, peers, tiles, rows and tables."""

import importlib
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import cumoe
from cumoe.bench import (
    gpu,
    gpu_ceilings,
    gpu_check,
    gpu_contenders,
    gpu_peers,
    gpu_recorded,
    gpu_tables,
    gpu_tiles,
    shapes,
    weights,
)
from cumoe.bench.timing import Timing
from cumoe.reference import experts

TINY = shapes.SHAPES["tiny"]
H200 = gpu_recorded.DEVICE
BEST = gpu_ceilings.Limits(4e12, 800e12)
CEILINGS = gpu_ceilings.Ceilings(BEST, gpu_ceilings.Limits(3e12, 600e12), "cuBLAS", 3.1, 1400.0, 690.0)

# -- floors and recorded times ---------------------------------------------------------------------


def test_floor_is_the_larger_of_the_two_times():
    limits = gpu_ceilings.Limits(4e12, 800e12)
    assert limits.floor_us(4 * 10**9, 800 * 10**6) == pytest.approx(1000)
    assert limits.bound(4 * 10**9, 800 * 10**6) == "memory"
    assert limits.floor_us(4 * 10**6, 800 * 10**9) == pytest.approx(1000)
    assert limits.bound(4 * 10**6, 800 * 10**9) == "compute"


@pytest.mark.parametrize(
    ("name", "num_tokens", "of_floor"),
    [
        ("mixtral-8x7b", 16384, 0.69),
        ("mixtral-8x7b", 1, 0.86),
        ("qwen3-30b-a3b", 16384, 0.59),
        ("mixtral-8x7b", 8, 1.0),
        ("qwen3-30b-a3b", 8, 0.82),
        ("qwen3-next", 8, 0.8),
        ("dsv3-ep", 8, 0.98),
        ("dsv3-tp8", 8, 0.76),
        ("qwen3-30b-a3b", 64, 0.92),
        ("qwen3-next", 64, 0.99),
        ("dsv3-ep", 64, 0.97),
        ("dsv3-tp8", 64, 0.87),
        ("qwen3-next", 256, 0.99),
        ("dsv3-ep", 1024, 0.53),
        ("dsv3-tp8", 16384, 0.43),
    ],
)
def test_recorded_times_have_the_fractions_that_were_recorded_with_them(name, num_tokens, of_floor):
    shape = shapes.SHAPES[name]
    _, time_us = gpu_recorded.best_layer(H200, name, "bfloat16", num_tokens)
    hit = len(np.unique(gpu_contenders.draw_routing(shape, num_tokens, "uniform", 0)[1]))
    limits = gpu_ceilings.recorded(H200, "bfloat16")
    floor_us = limits.floor_us(shape.moved_bytes(num_tokens, hit, "bfloat16"), shape.flops(num_tokens))
    assert floor_us / time_us == pytest.approx(of_floor, abs=0.01)


def test_the_best_recorded_peer_is_the_faster_one():
    assert gpu_recorded.best_layer(H200, "mixtral-8x7b", "bfloat16", 8) == (gpu_recorded.VLLM, 586)
    assert gpu_recorded.best_layer(H200, "dsv3-tp8", "bfloat16", 1) == (gpu_recorded.VLLM, 65)
    assert gpu_recorded.operation(H200, "qwen3-30b-a3b", "route", 16384) == ("vLLM 0.25.1 topk_softmax", 44)
    for shape in gpu.SHAPES:
        for num_tokens in gpu.TOKENS:
            assert gpu_recorded.best_layer(H200, shape, "bfloat16", num_tokens)[1] > 0


def test_facts_of_the_ceilings_say_clock_and_power():
    assert CEILINGS.facts()["ceiling product"] == (
        "best 800 TFLOP/s, sustained 600 TFLOP/s at 1400 MHz, 690 W, by cuBLAS"
    )


def test_nothing_is_recorded_for_other_devices_shapes_dtypes_and_tokens():
    assert gpu_recorded.best_layer("NVIDIA A100", "mixtral-8x7b", "bfloat16", 8) is None
    assert gpu_recorded.best_layer(H200, "tiny", "bfloat16", 8) is None
    assert gpu_recorded.best_layer(H200, "mixtral-8x7b", "float16", 8) is None
    assert gpu_recorded.best_layer(H200, "mixtral-8x7b", "bfloat16", 9) is None
    assert gpu_recorded.operation(H200, "mixtral-8x7b", "route", 64) is None
    assert gpu_recorded.operation(H200, "qwen3-30b-a3b", "route", 8) is None
    assert gpu_ceilings.recorded("NVIDIA A100", "bfloat16") is None
    assert gpu_ceilings.recorded(H200, "float32") is None


# -- checks ----------------------------------------------------------------------------------------


def problem(dtype="bfloat16", num_tokens=20):
    w1, w2 = weights.draw(TINY, dtype)
    return shapes.tokens(TINY, num_tokens, dtype), w1, w2, *shapes.routing(TINY, num_tokens)


@pytest.mark.parametrize("dtype", shapes.DTYPES)
def test_expected_is_the_reference_with_its_bound(dtype):
    x, w1, w2, topk_weights, topk_ids = problem(dtype)
    found = gpu_check.expected(np, x, w1, w2, topk_weights, topk_ids)
    wanted = experts.fused_experts(x, w1, w2, topk_weights, topk_ids)
    np.testing.assert_allclose(found.value, wanted.value, atol=1e-12)
    np.testing.assert_allclose(found.error, wanted.error, rtol=1e-12)


def test_expected_does_without_a_library_for_products(monkeypatch):
    class NoProduct(np.ndarray):
        def __matmul__(self, other):
            raise ImportError("libcublas")

    x, w1, w2, topk_weights, topk_ids = problem()
    namespace = {name: getattr(np, name) for name in ("uint16", "uint32", "float32", "float64", "abs", "stack")}
    xp = SimpleNamespace(asarray=lambda array: np.asarray(array).view(NoProduct), **namespace)
    found = gpu_check.expected(xp, x, w1, w2, topk_weights, topk_ids)
    wanted = experts.fused_experts(x, w1, w2, topk_weights, topk_ids)
    np.testing.assert_allclose(found.value, wanted.value, atol=1e-12)
    np.testing.assert_allclose(found.error, wanted.error, rtol=1e-12)


def test_judgement_sees_wrong_rows():
    arguments = problem()
    out = cumoe.fused_experts(*arguments)
    exact = gpu_check.expected(np, *arguments)
    right = gpu_check.judge(out, exact)
    assert right.max_ratio <= 1
    assert right.relative_error < gpu_peers.TOLERANCE["bfloat16"]
    wrong = out.copy()
    wrong[3, 8:16] = 0  # one group of eight columns of one token
    assert gpu_check.judge(wrong, exact).max_ratio > 1
    assert gpu_check.judge(wrong, exact).relative_error > gpu_peers.TOLERANCE["bfloat16"]
    wrong[3, 8] = np.nan
    assert gpu_check.judge(wrong, exact) == (np.inf, np.inf)


def test_distance_is_over_everything():
    a = np.arange(1, 9, dtype=np.float32).reshape(2, 4).astype(ml_dtypes.bfloat16)
    b = a.copy()
    assert gpu_check.distance(np, a, b) == 0
    b[1, 3] = 0
    assert gpu_check.distance(np, a, b) == pytest.approx(8 / np.sqrt(140))
    b[1, 3] = np.nan
    assert gpu_check.distance(np, a, b) == np.inf
    assert gpu_check.distance(np, b, b) == np.inf
    assert gpu_check.distance(np, 0 * a, 0 * a) == 0


@pytest.mark.parametrize("dtype", shapes.DTYPES)
def test_widening_keeps_every_number(dtype):
    values = np.array([0, -1.5, 3.140625, 1e-3, 65504, np.inf], np.float32).astype(shapes.DTYPES[dtype])
    np.testing.assert_array_equal(gpu_check.widened(np, values), values.astype(np.float32))


def test_the_sample_has_the_first_and_the_last_token():
    assert gpu_check.sample(1).tolist() == [0]
    assert gpu_check.sample(3).tolist() == [0, 1, 2]
    found = gpu_check.sample(16384)
    assert len(found) == gpu_check.SAMPLE
    assert found[0] == 0 and found[-1] == 16383


# -- peers -----------------------------------------------------------------------------------------


def test_torchs_grouped_product_computes_the_layer():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    arguments = problem()
    tensors = [
        torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if a.dtype.itemsize == 2 else torch.from_numpy(a)
        for a in arguments
    ]
    out = gpu_peers._grouped_mm(*tensors)()
    judged = gpu_check.judge(out.view(torch.int16).numpy().view(ml_dtypes.bfloat16), gpu_check.expected(np, *arguments))
    assert judged.relative_error < gpu_peers.TOLERANCE["bfloat16"]


def test_a_missing_library_is_named(monkeypatch):
    grouped_mm, vllm = gpu_peers.PEERS
    monkeypatch.setattr(gpu_peers.importlib.util, "find_spec", lambda name: None if name == "vllm" else object())
    assert vllm.missing() == "vllm is not installed"
    monkeypatch.setattr(gpu_peers.importlib.util, "find_spec", lambda name: None)
    assert grouped_mm.missing() == vllm.missing() == "torch is not installed"


# -- tiles -----------------------------------------------------------------------------------------


def test_a_tile_is_forced_and_given_back():
    launcher = importlib.import_module(gpu_tiles._LAUNCHER)
    before, tiles = launcher.block_rows, dict(launcher._TILES)
    height = max(tiles)
    with gpu_tiles.forced(str(height)):
        assert launcher.block_rows(1, 2, 8, 8, False, False) == height
    fields = ",".join(f"{name}={number}" for name, number in zip(launcher.Tile._fields, tiles[height], strict=True))
    with pytest.raises(KeyError), gpu_tiles.forced(fields.replace(f"tokens={height}", "tokens=40")):
        assert launcher.block_rows(1, 2, 8, 8, False, False) == 40
        assert launcher._TILES[40] == tiles[height]._replace(tokens=40)
        raise KeyError
    assert launcher.block_rows is before
    assert launcher._TILES == tiles


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("width=3", r"^variant must have words like tokens=8, of tokens, .*, got 'width=3'$"),
        ("tokens=x", r"got 'tokens=x'$"),
        ("tokens=8", r"^variant must name m_blocks, .* too, got 'tokens=8'$"),
        ("7", r"^variant must be one of the heights 8, .*, got 7$"),
    ],
)
def test_a_tile_that_is_none_is_refused(text, message):
    with pytest.raises(ValueError, match=message), gpu_tiles.forced(text):
        pass


# -- rows and tables -------------------------------------------------------------------------------


def row(**given):
    return gpu_tables.row(
        **{
            "kind": "layer",
            "shape": TINY,
            "dtype": "bfloat16",
            "num_tokens": 8,
            "method": "cumoe",
            "timed": Timing((10.0, 20.0, 30.0)),
            "num_bytes": 40_000_000,
            "flops": 8_000_000_000,
            **given,
        }
    )


def test_a_row_holds_every_fraction():
    found = row(
        recorded=gpu_ceilings.Limits(8e12, 400e12),
        measured=CEILINGS,
        clean=Timing((16.0,)),
        sustained=Timing((40.0, 40.0)),
        watch=SimpleNamespace(sm_mhz=1400.4, watts=690.0),
        own_us=20.0,
        peer=("another", 30.0),
        errors=gpu_check.Judgement(0.25, 3e-3),
        experts_hit=7,
    )
    assert tuple(found) == gpu_tables.COLUMNS
    assert (found["time_us"], found["best_us"], found["replays"]) == ("20.00", "10.00", 3)
    assert (found["tflops"], found["tbs"]) == ("400.0", "2.000")
    assert (found["floor_us"], found["bound"], found["of_floor"]) == ("20.00", "compute", "1.000")
    assert found["of_floor_same_run"] == "0.500"
    assert (found["clean_us"], found["of_floor_clean"]) == ("16.00", "1.250")
    assert (found["sustained_us"], found["of_floor_sustained"]) == ("40.00", "0.333")
    assert (found["sm_mhz"], found["watts"]) == ("1400", "690")
    assert (found["ratio_to_cumoe"], found["peer"], found["peer_us"], found["peer_ratio"]) == (
        *("1.000", "another", "30.0", "1.500"),
    )
    assert (found["error_in_bounds"], found["relative_error"], found["experts_hit"]) == ("0.250", "3.00e-03", 7)


def test_what_does_not_apply_stays_empty():
    found = row(flops=0)
    empty = {name for name, value in found.items() if value == ""}
    assert {"tflops", "floor_us", "of_floor", "of_floor_same_run", "clean_us", "sustained_us", "peer"} <= empty
    assert tuple(found) == gpu_tables.COLUMNS
    assert "floor" not in gpu_tables.line(found)


def test_a_line_has_what_decides():
    times = {"clean": Timing((16.0,)), "sustained": Timing((40.0, 40.0))}
    text = gpu_tables.line(row(recorded=BEST, measured=CEILINGS, peer=("another", 10.0), **times))
    assert text.startswith("tiny           T 8     cumoe")
    assert "0.0200 ms" in text and "of floor 0.500 (0.500)" in text and "sustained 0.040 (0.333)" in text
    assert "clean 0.0160 (" in text
    assert text.endswith("peer x0.500")


def test_the_summary_names_the_slowest_case():
    rows = [row(recorded=BEST, peer=("p", 10.0)), row(recorded=BEST, peer=("p", 40.0), shape=shapes.SHAPES["small"])]
    rows.append(row(method="other"))
    (line,) = gpu_tables.summary(rows)
    assert line == (
        "T 8: of floor 0.500 on average, 0.500 at least; slowest against the best recorded peer: x0.500 (tiny)"
    )


@pytest.mark.parametrize(
    ("time_us", "text"), [("", ""), ("12.34", "0.0123"), ("1234.5", "1.234"), ("21180.0", "21.18")]
)
def test_milliseconds_have_four_digits(time_us, text):
    assert gpu_tables.milliseconds(time_us) == text
