"""Clock, power, arrays and ceilings of the GPU suite, over a stand-in for CuPy."""

import gc
import re
import sys
import weakref

import fake_cupy
import numpy as np
import pytest

from cumoe.bench import gpu_arrays, gpu_ceilings, gpu_clocks, gpu_timing, shapes

TINY = shapes.SHAPES["tiny"]


@pytest.fixture
def cupy(monkeypatch):
    """CuPy for the benchmarks, on the host."""
    return fake_cupy.install(monkeypatch)


# -- timing and clocks -----------------------------------------------------------------------------


def test_every_replay_is_timed_alone_over_a_cold_cache(cupy):
    with gpu_timing.Stopwatch() as stopwatch:
        replay = stopwatch.capture(lambda: None)
        timed = stopwatch.burst(replay, repeats=3)
    assert len(timed.samples_us) == 3
    assert {stream for _, stream in fake_cupy.log} == {stopwatch.stream}
    words = [what for what, _ in fake_cupy.log]
    warm = ["flush", "launch"] * gpu_timing._WARM_CALLS
    assert words == [*warm, *["flush", "event", "launch", "event"] * 3]
    assert stopwatch.stream.depth == 0


def test_a_clean_replay_comes_after_a_read_of_something_else(cupy, monkeypatch):
    monkeypatch.setattr(gpu_arrays, "read_sum", lambda words, total: fake_cupy.log.append(("read", words.nbytes)))
    with gpu_timing.Stopwatch() as stopwatch:
        replay = stopwatch.capture(lambda: None)
        fake_cupy.log.clear()
        stopwatch.burst(replay, repeats=2, clean=True)
    timed = [what for what, _ in fake_cupy.log][2 * gpu_timing._WARM_CALLS :]
    assert timed == ["flush", "read", "event", "launch", "event"] * 2
    assert ("read", gpu_timing.FLUSH_BYTES) in fake_cupy.log


def test_a_graph_is_captured_after_two_calls_and_keeps_what_it_needs(cupy):
    seen, workspace = [], np.zeros(4)
    alive = weakref.ref(workspace)

    def call(memory=workspace):
        seen.append(stopwatch.stream.capturing)
        return seen

    with gpu_timing.Stopwatch() as stopwatch:
        graph = stopwatch.capture(call)
    assert seen == [False, False, True]
    del workspace, call
    gc.collect()
    assert alive() is not None and graph._kept[1] is seen
    del graph
    gc.collect()
    assert alive() is None


def test_an_error_under_capture_ends_the_capture(cupy):
    def fails():
        if stopwatch.stream.capturing:
            raise KeyError("no")

    with gpu_timing.Stopwatch() as stopwatch:
        with pytest.raises(KeyError):
            stopwatch.capture(fails)
        assert not stopwatch.stream.capturing


def test_a_gpu_that_hangs_ends_the_process(cupy, monkeypatch, capsys):
    class EndedError(BaseException):
        pass

    def end(status):
        raise EndedError(status)

    monkeypatch.setattr(gpu_timing.os, "_exit", end)
    monkeypatch.setattr(gpu_timing, "_HUNG_S", 0.01)
    monkeypatch.setattr(fake_cupy.Event, "done", False)
    stopwatch = gpu_timing.Stopwatch()
    with pytest.raises(EndedError, match=str(gpu_timing.HUNG)):
        stopwatch.wait()
    assert "the GPU has not answered for 0.01 s" in capsys.readouterr().err


def test_a_sustained_run_takes_everybody_in_turn(cupy):
    log = []
    with gpu_timing.Stopwatch() as stopwatch:
        times = stopwatch.sustained({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, 0.01, flush=False)
    assert log == ["a", "b"] * (len(log) // 2)
    assert times.keys() == {"a", "b"}
    assert not any(what == "flush" for what, _ in fake_cupy.log)


def test_only_the_settled_part_counts():
    taken = [(0.1, 9.0), (0.5, 8.0), (0.8, 7.0), (2.0, 6.0)]
    assert gpu_timing.settled(taken) == (7.0, 6.0)
    assert gpu_timing.settled(taken[:1]) == (9.0,)


class Nvml:
    NVML_CLOCK_SM = 1

    def __init__(self, refuses=()):
        self.refuses = refuses

    def __getattr__(self, name):
        answers = {
            "nvmlInit": None,
            "nvmlDeviceGetHandleByPciBusId": "by bus",
            "nvmlDeviceGetHandleByIndex": "by index",
            "nvmlDeviceGetClockInfo": 1410,
            "nvmlDeviceGetPowerUsage": 690_500,
            "nvmlSystemGetDriverVersion": "580.1",
        }

        def call(*arguments):
            if name in self.refuses:
                raise RuntimeError(name)
            return answers[name]

        return call


def watch_with(monkeypatch, library):
    monkeypatch.setitem(sys.modules, "pynvml", library)
    return gpu_clocks.Watch()


def test_clock_and_power_are_sampled(cupy, monkeypatch):
    watch = watch_with(monkeypatch, Nvml())
    assert watch.sm_mhz is None
    with watch:
        pass
    assert (watch.sm_mhz, watch.watts, watch.driver_version()) == (1410, 690.5, "580.1")
    assert watch._handle == "by bus"


def test_a_hidden_bus_and_refusals_are_lived_with(cupy, monkeypatch):
    assert watch_with(monkeypatch, Nvml({"nvmlDeviceGetHandleByPciBusId"}))._handle == "by index"
    watch = watch_with(monkeypatch, Nvml({"nvmlDeviceGetPowerUsage", "nvmlSystemGetDriverVersion"}))
    with watch:
        pass
    assert (watch.sm_mhz, watch.watts, watch.driver_version()) == (None, None, "")
    assert watch_with(monkeypatch, Nvml({"nvmlInit"})).driver_version() == ""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_clocks.Watch().driver_version() == ""


def test_the_second_half_of_the_samples_counts():
    assert gpu_clocks._late_median([1980, 1980, 1400, 1410, 1390]) == 1400
    assert gpu_clocks._late_median([]) is None


# -- arrays and ceilings ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", shapes.DTYPES)
def test_weights_have_the_promised_shapes_and_scales(cupy, dtype):
    w1, w2 = gpu_arrays.weights(TINY, dtype)
    assert (w1.shape, w2.shape) == ((8, 192, 64), (8, 64, 96))
    assert w1.dtype == w2.dtype == shapes.DTYPES[dtype]
    assert w1.astype(np.float64).std() == pytest.approx(64**-0.5, rel=0.02)
    assert w2.astype(np.float64).std() == pytest.approx(96**-0.5, rel=0.02)
    assert gpu_arrays.normal((0, 3), dtype).shape == (0, 3)


def test_the_kernels_compile_for_every_architecture():
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    from cumoe.rawkernels import _compile

    if _compile.nvrtc_version() is None:
        pytest.skip("NVRTC is not installed")
    for arch in _compile.ARCHITECTURES:
        log = _compile.compile_text("bench.cu", gpu_arrays.SOURCE, arch, ())[1]
        assert len(re.findall(r" 0 bytes spill stores, 0 bytes spill loads", log)) == 3


def test_ceilings_are_measured(cupy, monkeypatch):
    monkeypatch.setattr(gpu_ceilings, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(gpu_ceilings, "PRODUCT_SIZE", 16)
    monkeypatch.setattr(gpu_ceilings, "_IDLE_S", 0.0)
    monkeypatch.setitem(sys.modules, "torch", None)
    with gpu_timing.Stopwatch() as stopwatch:
        found = gpu_ceilings.measure(stopwatch, "bfloat16", 0.01)
    assert found.product_by == "cuBLAS, float16, CuPy"
    assert min(found.best.read, found.best.product, found.sustained.read, found.sustained.product) > 0
    assert found.best.read >= found.sustained.read * 0.5
    assert found.facts().keys() == {"ceiling read", "ceiling product", "empty graph"}
