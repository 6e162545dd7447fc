"""The benchmarks themselves: what is timed is right, who is compared is fair, what is written is whole."""

import functools
import gc
import os
import time

import numpy as np
import pytest

import cumoe
from cumoe.bench import ceilings, shapes, timing, weights

TINY = shapes.SHAPES["tiny"]


# -- shapes, routing, weights -----------------------------------------------------------------------


def test_costs_of_a_named_shape():
    qwen = shapes.SHAPES["qwen3-30b-a3b"]
    assert qwen.weight_bytes("bfloat16") == 128 * 3 * 2048 * 768 * 2
    assert qwen.flops(16) == cumoe.plan(16, 2048, 768, 128, 8).flops
    assert qwen.moved_bytes(4, 10, "float32") == 10 * 3 * 2048 * 768 * 4 + 2 * 4 * 2048 * 4


@pytest.mark.parametrize("name", shapes.SHAPES)
@pytest.mark.parametrize("kind", shapes.ROUTINGS)
def test_routing_is_legal(name, kind):
    shape = shapes.SHAPES[name]
    topk_weights, topk_ids = shapes.routing(shape, 50, kind)
    assert topk_weights.dtype == np.float32 and topk_ids.dtype == np.int32
    assert topk_weights.shape == topk_ids.shape == (50, shape.top_k)
    report = cumoe.routing_report(topk_weights, topk_ids, shape.num_experts)
    assert report.duplicate_choices == report.skipped_negative == report.skipped_too_large == 0
    np.testing.assert_allclose(topk_weights.sum(1), 1, rtol=1e-6)
    for again in zip(shapes.routing(shape, 50, kind), (topk_weights, topk_ids), strict=True):
        np.testing.assert_array_equal(*again)
    assert (shapes.routing(shape, 50, kind, seed=1)[1] != topk_ids).any()


def test_skewed_routing_is_less_fair_than_uniform():
    shape = shapes.SHAPES["qwen3-30b-a3b"]
    uniform, skewed = (
        cumoe.routing_report(*shapes.routing(shape, 1000, kind), shape.num_experts).jain_index
        for kind in ("uniform", "skewed")
    )
    assert skewed < 0.5
    assert uniform > 0.9


def test_unknown_routing_is_refused():
    with pytest.raises(ValueError, match=r"^routing must be uniform or skewed, got 'even'$"):
        shapes.routing(TINY, 1, "even")


def test_weights_do_not_depend_on_the_number_of_threads(monkeypatch):
    several = weights.draw(TINY, "bfloat16", seed=3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    one = weights.draw(TINY, "bfloat16", seed=3)
    for a, b in zip(several, one, strict=True):
        np.testing.assert_array_equal(a.view(np.uint16), b.view(np.uint16))


def test_weights_have_the_promised_scale_and_report_progress():
    seen = []

    def progress(items):
        for item in items:
            seen.append(item)
            yield item

    shape = shapes.SHAPES["small"]
    w1, w2 = weights.draw(shape, "float32", progress=progress)
    assert seen == list(range(shape.num_experts))
    assert w1.shape == (16, 1024, 512) and w2.shape == (16, 512, 512)
    for w, fan_in in ((w1, 512), (w2, 512)):
        assert w.std() * fan_in**0.5 == pytest.approx(1, abs=0.01)
        assert abs(w.mean()) < 1e-3
    assert np.unique(w1[:, 0, 0]).size == shape.num_experts  # no two experts alike


# -- timing -----------------------------------------------------------------------------------------


def test_every_round_calls_everybody_and_every_other_round_backwards():
    log = []

    def run(name, routing):
        log.append((name, routing))
        time.sleep(0.002)  # all take as long

    contenders = {name: functools.partial(run, name) for name in "abc"}
    times = timing.compare(contenders, min_rounds=4, max_rounds=4, gap_s=0)
    warm, timed = log[:12], log[12:]
    assert warm == [(name, routing) for name in "abc" for routing in range(4)]
    assert [name for name, _ in timed] == list("abccbaabccba")
    assert [routing for _, routing in timed] == [r for r in range(4) for _ in range(3)]
    assert {name: len(t.samples_us) for name, t in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_one_that_is_much_slower_joins_every_third_round():
    log = []

    def run(name, seconds, routing):
        log.append(name)
        time.sleep(seconds)

    contenders = {"a": functools.partial(run, "a", 0.004), "b": functools.partial(run, "b", 0.04)}
    times = timing.compare(contenders, min_rounds=7, max_rounds=7, gap_s=0)
    assert "".join(log[8:]) == "abaabaaaab", "rounds 0, 3 (backwards) and 6"
    assert len(times["a"].samples_us) == 7 and len(times["b"].samples_us) == 3


def test_a_burst_drops_its_first_call_and_cycles_all_routings():
    log = []
    times = timing.compare({"a": log.append}, mode="back-to-back", min_rounds=4, max_rounds=4, gap_s=0)
    timed = log[timing.ROUTINGS_CYCLED :]
    assert len(times["a"].samples_us) == 4 * (len(timed) // 4 - 1)
    assert [timed.count(r) for r in range(4)] == [len(timed) // 4] * 4


def test_times_are_those_of_the_calls():
    times = timing.compare(
        {"slow": lambda routing: time.sleep(0.004), "fast": lambda routing: None}, min_rounds=5, max_rounds=5, gap_s=0
    )
    assert times["slow"].median_us >= 4000
    assert times["fast"].median_us < 500


def test_the_budget_decides_the_number_of_rounds():
    def one(budget_s):
        run = {"a": lambda routing: time.sleep(0.005)}
        return len(timing.compare(run, budget_s=budget_s, min_rounds=2, max_rounds=9, gap_s=0)["a"].samples_us)

    assert one(0) == 2
    assert one(1e6) == 9


def test_median_and_spread():
    timed = timing.Timing((10.0, 30.0, 20.0, 20.0, 20.0))
    assert timed.median_us == 20
    assert timed.spread == pytest.approx(0.5)
    assert timing.Timing((10.0, 20.0, 30.0)).spread == 1


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_as_before_even_after_an_error(enabled):
    calls = []

    def fail(routing):
        calls.append(gc.isenabled())
        if len(calls) > timing.ROUTINGS_CYCLED:
            raise RuntimeError("stop")

    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(RuntimeError, match="stop"):
            timing.compare({"a": fail}, gap_s=0)
        assert gc.isenabled() is enabled
        assert calls[-1] is False
    finally:
        (gc.enable if before else gc.disable)()


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"^mode must be gaps or back-to-back, got 'fast'$"):
        timing.compare({}, mode="fast")


# -- ceilings ---------------------------------------------------------------------------------------


def test_floor_is_the_larger_of_the_two_times():
    limits = ceilings.Ceilings(stream_gbs=10, stream_bytes=1, peak_gflops=100, peak_kernel="", threads=1)
    assert limits.floor_s(20 * 10**9, 100 * 10**9) == pytest.approx(2)
    assert limits.bound(20 * 10**9, 100 * 10**9) == "memory"
    assert limits.floor_s(20 * 10**9, 300 * 10**9) == pytest.approx(3)
    assert limits.bound(20 * 10**9, 300 * 10**9) == "compute"


def test_streamed_array_is_larger_than_the_cache_but_fits_the_memory():
    assert ceilings.stream_bytes() >= min(2 << 30, 3 * ceilings.last_level_cache_bytes())
    assert ceilings.stream_bytes(available_bytes=400 << 20) == 100 << 20


def test_the_streaming_loop_reads_every_number():
    values = np.arange(100_003, dtype=np.uint64)
    assert int(ceilings._stream_loop()(values).sum()) == int(values.sum())


def test_the_streaming_loop_loads_neighbours_at_once():
    """Gathers read a sixth of what memory gives."""
    import numba

    loop = numba.njit(parallel=True, error_model="numpy")(ceilings._stream_loop().py_func)
    loop(np.ones(64, np.uint64))
    (text,) = loop.inspect_asm().values()
    assert "gather" not in text


def test_measured_ceilings_are_numbers_of_a_computer():
    gbs, num_bytes = ceilings.stream_read(64 << 20)
    assert num_bytes == 64 << 20
    assert 0.1 < gbs < 1e5


@pytest.mark.parametrize("dtype", shapes.DTYPES)
def test_the_peak_is_measured_with_real_products(dtype):
    from cumoe.cpu import microkernel

    steps = 5
    one = {"float32": np.float32(1), "bfloat16": np.uint16(0x3F80), "float16": np.uint16(0x3C00)}
    for name in microkernel.names(dtype):
        kernel = microkernel.choose(dtype, name)
        groups = kernel.max_rows // kernel.row_group
        rows = np.full((1, groups * steps * kernel.row_group * kernel.k_step), one[kernel.row_dtype])
        panels = np.full((1, steps * kernel.columns * kernel.k_step), one[dtype])
        sums = np.zeros((1, kernel.max_rows * kernel.columns), np.float32)
        assert rows.nbytes == groups * steps * kernel.row_step_bytes
        assert panels.nbytes == steps * kernel.panel_step_bytes
        stride = steps * kernel.row_step_bytes
        ceilings._peak_loop(kernel)(rows.view(np.uint8), stride, panels.view(np.uint8), steps, sums, 2)
        np.testing.assert_array_equal(sums, steps * kernel.k_step)
    gflops, name = ceilings.matmul_peak(dtype)
    assert name == microkernel.names(dtype)[0]
    assert gflops > 0.1
