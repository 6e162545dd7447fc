"""The benchmarks themselves: what is timed is right, who is compared is fair, what is written is whole."""

import functools
import gc
import importlib.util
import io
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import cumoe
from cumoe.bench import ceilings, cpu, peers, results, shapes, timing, weights

ROOT = Path(__file__).parents[1]
TINY = shapes.SHAPES["tiny"]


def quiet():
    return Console(file=io.StringIO(), width=200)


def readme_script():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    contenders = {name: lambda routing, name=name: log.append((name, routing)) for name in "abc"}
    times = timing.compare(contenders, min_rounds=4, max_rounds=4, gap_s=0)
    warm, timed = log[:12], log[12:]
    assert warm == [(name, routing) for name in "abc" for routing in range(4)]
    assert [name for name, _ in timed] == list("abccbaabccba")
    assert [routing for _, routing in timed] == [r for r in range(4) for _ in range(3)]
    assert {name: len(t.samples_us) for name, t in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_burst_drops_its_first_call_and_cycles_all_routings():
    log = []
    times = timing.compare({"a": log.append}, mode="back-to-back", min_rounds=4, max_rounds=4, gap_s=0)
    timed = log[timing.ROUTINGS_CYCLED :]
    assert len(times["a"].samples_us) == 4 * (len(timed) // 4 - 1)
    assert [timed.count(r) for r in range(4)] == [len(timed) // 4] * 4


def test_times_are_those_of_the_calls():
    times = timing.compare(
        {"slow": lambda routing: time.sleep(0.004), "fast": lambda routing: None}, max_rounds=5, gap_s=0
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
        ceilings._peak_loop(name, dtype)(rows.view(np.uint8), stride, panels.view(np.uint8), steps, sums, 2)
        np.testing.assert_array_equal(sums, steps * kernel.k_step)
    gflops, name = ceilings.matmul_peak(dtype)
    assert name == microkernel.names(dtype)[0]
    assert gflops > 0.1


# -- peers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", shapes.ROUTINGS)
@pytest.mark.parametrize("dtype", shapes.DTYPES)
@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_every_peer_computes_the_layer(peer, dtype, kind):
    if peer.missing(dtype):
        pytest.skip(peer.missing(dtype))
    w1, w2 = weights.draw(TINY, dtype)
    layer = peer.make(w1, w2)
    for num_tokens in (1, 2, 33):
        x, routed = shapes.tokens(TINY, num_tokens, dtype), shapes.routing(TINY, num_tokens, kind)
        kept = [array.copy() for array in (x, *routed)]
        out = layer(x, *routed)
        assert out.dtype == x.dtype and out.shape == x.shape
        assert peers.sample_error(out, x, w1, w2, *routed, sample=33) <= peers.TOLERANCE[dtype]
        for array, copy in zip((x, *routed), kept, strict=True):
            assert array.tobytes() == copy.tobytes()


def test_wrong_results_are_seen():
    w1, w2 = weights.draw(TINY, "float32")
    x, routed = shapes.tokens(TINY, 6, "float32"), shapes.routing(TINY, 6)
    right = cumoe.fused_experts(x, w1, w2, *routed)
    assert peers.sample_error(right, x, w1, w2, *routed) < 1e-6
    assert peers.sample_error(2 * right, x, w1, w2, *routed) == pytest.approx(1, rel=1e-5)
    bad = right.copy()
    bad[-1, -1] = np.nan
    assert peers.sample_error(bad, x, w1, w2, *routed) == np.inf


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.PEERS[0].missing("float32") == "torch is not installed"
    assert peers.PEERS[0].missing("int8") == "torch loop has no int8"


# -- the suite and its files ------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Make the parts of the suite that take long short."""
    limits = ceilings.Ceilings(10.0, 1 << 20, 100.0, "named here", 2)
    monkeypatch.setattr(ceilings, "measure", lambda dtype, available_bytes=None: limits)
    monkeypatch.setattr(timing, "compare", functools.partial(timing.compare, gap_s=0.0, max_rounds=5))


def run_suite(folder, console=None, **options):
    options = {"shape_names": ["tiny"], "num_tokens": [1, 20], "dtypes": ["float32"], "budget_s": 0.01, **options}
    return cpu.run(console or quiet(), output=folder, **options)


def test_the_suite_writes_every_case(quick, tmp_path):
    console = quiet()
    path = run_suite(tmp_path, console, dtypes=["bfloat16", "float32"], routings=["uniform", "skewed"])
    facts, rows = results.read(path)
    assert facts["suite"] == "cpu"
    assert {"date", "commit", "command", "cpu model", "cpu instruction sets", "kernel bfloat16"} <= facts.keys()
    assert facts["version cumoe"] == cumoe.__version__ and facts["version numba"]
    methods = {"cumoe", *(peer.name for peer in peers.PEERS if not peer.missing("bfloat16"))}
    found = {(row["dtype"], row["routing"], row["T"], row["mode"], row["method"]) for row in rows}
    cells = [("1", "gaps"), ("1", "back-to-back"), ("20", "gaps")]
    assert found == {
        (dtype, routing, num_tokens, mode, method)
        for dtype in ("bfloat16", "float32")
        for routing in ("uniform", "skewed")
        for num_tokens, mode in cells
        for method in methods
    }
    assert len(rows) == len(found)
    for row in rows:
        assert float(row["time_us"]) > 0
        assert float(row["relative_error"]) <= peers.TOLERANCE[row["dtype"]]
        assert (row["method"] != "cumoe") or row["ratio_to_cumoe"] == "1.000"
        flops = TINY.flops(int(row["T"]))
        assert float(row["gflops"]) == pytest.approx(flops / float(row["time_us"]) * 1e-3, rel=0.02, abs=0.06)
    printed = console.file.getvalue()
    assert "tiny, bfloat16, uniform routing, back-to-back" in printed and str(path) in printed


def test_a_peer_with_wrong_results_or_errors_is_left_out_and_named(quick, tmp_path, monkeypatch):
    def fails(x, topk_weights, topk_ids):
        raise RuntimeError("no [such] kernel\nand more")

    liar = peers.Peer("liar", "", "numpy", ("float32",), lambda w1, w2: lambda x, *routed: 2 * x, lambda dtype: 0.0)
    broken = peers.Peer("broken", "", "numpy", ("float32",), lambda w1, w2: fails, lambda dtype: 0.0)
    monkeypatch.setattr(peers, "PEERS", (liar, broken))
    console = quiet()
    _, rows = results.read(run_suite(tmp_path, console))
    assert {row["method"] for row in rows} == {"cumoe"}
    printed = console.file.getvalue()
    assert re.search(r"without liar at T = 20: relative error [\d.]+", printed)
    assert "without broken at T = 20: no [such] kernel\n" in printed


def test_wrong_results_of_our_own_stop_the_suite(quick, tmp_path, monkeypatch):
    right = cumoe.fused_experts
    monkeypatch.setattr(cumoe, "fused_experts", lambda *args, **named: 2 * right(*args, **named))
    with pytest.raises(cpu.WrongResultError, match=r"cumoe is at \S+ of its error bound for 1 tokens"):
        run_suite(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_memory_does_not_hold_is_skipped_and_said(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "_MOST_BYTES", 3 * TINY.weight_bytes("float32"))
    console = quiet()
    _, rows = results.read(run_suite(tmp_path, console, shape_names=["small", "tiny"], dtypes=["bfloat16", "float32"]))
    printed = console.file.getvalue()
    assert "skipped small (E 16, k 4, H 512, I 512), bfloat16: needs 0.1 GB" in printed
    assert {(row["shape"], row["dtype"]) for row in rows} == {("tiny", "bfloat16"), ("tiny", "float32")}
    assert "without NumPy loop" not in printed  # 2 + 2 times the bfloat16 weights are within 3 times the float32 ones


def test_a_result_file_is_read_as_written(tmp_path):
    path = tmp_path / "new" / "a.csv"
    results.write(path, {"suite": "cpu", "odd": "a: b\n# c"}, [{"x": 1, "y": "with, comma"}, {"x": 2, "y": "# z"}])
    assert results.read(path) == (
        {"suite": "cpu", "odd": "a: b # c"},
        [{"x": "1", "y": "with, comma"}, {"x": "2", "y": "# z"}],
    )


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), results.replacing(path) as file:
        file.write("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="permission bits are those of POSIX")
def test_a_result_file_has_ordinary_permissions(tmp_path):
    with results.replacing(tmp_path / "a") as file:
        file.write("x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_newest_goes_by_the_date_inside(tmp_path):
    for name, suite, date in (("z", "cpu", "2026-01-01"), ("a", "cpu", "2026-02-01"), ("b", "gpu", "2026-03-01")):
        results.write(tmp_path / f"{name}.csv", {"suite": suite, "date": date}, [])
    assert results.newest(tmp_path, "cpu") == tmp_path / "a.csv"
    assert results.newest(tmp_path, "tpu") is None


# -- the README's table -----------------------------------------------------------------------------


def test_the_readme_gets_every_row_losses_too(quick, tmp_path):
    path = run_suite(tmp_path, dtypes=["bfloat16", "float32"])
    facts, rows = results.read(path)
    for row in rows:
        if row["method"] == "NumPy loop":
            row["ratio_to_cumoe"] = "0.250"
    results.write(path, facts, rows)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table:cpu -->\nold\n<!-- /table:cpu -->\nafter\n")
    script = readme_script()
    assert script.main(["--readme", str(readme), "--results", str(tmp_path)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- table:cpu -->\n") and text.endswith("\n<!-- /table:cpu -->\nafter\n")
    assert "old" not in text and path.name in text and facts["commit"] in text
    body = [line for line in text.splitlines() if line.startswith(("| bfloat16", "| float32"))]
    assert len(body) == 2 * 3
    head = next(line for line in text.splitlines() if line.startswith("| dtype"))
    assert all(line.count("|") == head.count("|") for line in body)
    assert all(line.endswith(" 0.25 |") for line in body)
    assert script.main(["--readme", str(readme), "--results", str(tmp_path)]) == 0
    assert readme.read_text() == text


def test_a_readme_without_markers_is_refused_and_kept(quick, tmp_path, capsys):
    run_suite(tmp_path, num_tokens=[20])
    readme = tmp_path / "README.md"
    readme.write_text("<!-- /table:cpu --> <!-- table:cpu -->")
    assert readme_script().main(["--readme", str(readme), "--results", str(tmp_path)]) == 1
    assert "no <!-- table:cpu --> followed by <!-- /table:cpu -->" in capsys.readouterr().err
    assert readme.read_text() == "<!-- /table:cpu --> <!-- table:cpu -->"


def test_without_results_the_readme_stays(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("text")
    assert readme_script().main(["--readme", str(readme), "--results", str(tmp_path / "none")]) == 0
    assert "no results of suite cpu" in capsys.readouterr().err
    assert readme.read_text() == "text"


def test_our_readme_has_the_markers():
    assert "| a |" in readme_script().replaced((ROOT / "README.md").read_text(), "cpu", "| a |")
