"""
Time what belongs to a whole process on the CPU, and write a CSV: its start, its threads, its callers, its instructions.

Usage: python benchmarks/processes.py [--repeats N] [--shapes small qwen3-30b-a3b] [--output DIR] [--commit ID]

Each row is a process of its own, or the median of several. First results are those of a layer of shape `tiny` for one
dtype, from the start of the interpreter to the output, with NumPy's import in it. Calls are of T = 64 and 256 tokens on
prepared weights. Four callers do as many calls together as one does alone, both after torch and OpenBLAS have used
all threads. Instruction sets: 1024 tokens and one expert of `mixtral` in float32, against OpenBLAS with all of the
host's instructions, on a product of the size of the first of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np

from cumoe.bench import results, schemes, shapes

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("small", "qwen3-30b-a3b")
LARGE = "mixtral"
TOKENS = (64, 256)
CALLERS = 4
ROUND_S = 0.4  # of calls that are compared with others
MOST_CALLS = 200  # of a thread: results of callers are kept
TARGETS = {
    "host": {},
    "haswell": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"},
    "generic": {"NUMBA_CPU_NAME": "generic"},
}
SCHEMES = ("bfloat16", "float32", "int8 w8a8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the file, say where it is."""
    parser = argparse.ArgumentParser(description="time whole processes and write a CSV", allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="processes of a median; default: 5")
    parser.add_argument("--shapes", choices=list(shapes.SHAPES), nargs="+", default=SHAPES, metavar="NAME")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--commit", default="", metavar="ID", help="what the file names, outside a checkout")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)  # what a process measures
    parser.add_argument("--scheme", default="bfloat16", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        print(json.dumps(PARTS[options.part](shapes.SHAPES[options.shapes[0]], options.scheme)))
        return 0
    facts = results.header("processes", options.commit, False)
    facts["command"] = facts["command"].replace("cumoe", "python benchmarks/processes.py", 1)
    rows: list[results.Row] = []

    def say(what: str, shape: str, scheme: str, value: float, unit: str) -> None:
        rows.append({"what": what, "shape": shape, "scheme": scheme, "value": f"{value:.3f}", "unit": unit})
        print("  ".join(map(str, rows[-1].values())), flush=True)

    for scheme in SCHEMES:
        with tempfile.TemporaryDirectory() as cache:
            folder = {"NUMBA_CACHE_DIR": cache}
            say("first result, empty cache", "tiny", scheme, seconds_to_first(scheme, folder), "s")
            seconds_to_first(scheme, folder)
            warm = [seconds_to_first(scheme, folder) for _ in range(options.repeats)]
            say("first result, warm cache", "tiny", scheme, statistics.median(warm), "s")
    for shape in options.shapes:
        for scheme in SCHEMES:
            for name, value in measured("threads", shape, scheme).items():
                say(f"one thread's time over all threads', {name}", shape, scheme, value, "ratio")
            for name, value in measured("callers", shape, scheme).items():
                say(f"{CALLERS} callers' calls a second over one caller's, {name}", shape, scheme, value, "ratio")
    for name, environment in TARGETS.items():
        for what, value in measured("sgemm", LARGE, "float32", environment).items():
            say(f"{what}, instructions of {name}", f"one expert of {LARGE}", "float32", value, "ratio")
    path = results.default_path(options.output, facts)
    results.write(path, facts, rows)
    print(f"wrote {path}")
    return 0


def seconds_to_first(scheme: str, environment: dict[str, str]) -> float:
    """Seconds from the start of an interpreter to its first result."""
    started = time.time()
    return float(measured("first", "tiny", scheme, environment)["at"]) - started


def measured(part: str, shape: str, scheme: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What a process of its own prints for `part`; OpenBLAS takes all CPUs there, as it does where nobody limits it."""
    command = [sys.executable, __file__, "--part", part, "--shapes", shape, "--scheme", scheme]
    usual = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run(command, env=usual | (environment or {}), check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def first(shape: shapes.Shape, scheme: str) -> dict[str, float]:
    """When the first result of a process was there."""
    call = calls(shape, scheme, (16,))["T = 16"]
    call()
    return {"at": time.time()}


def threads(shape: shapes.Shape, scheme: str) -> dict[str, float]:
    """Time of one thread over that of all."""
    import numba

    found = {}
    for name, call in calls(shape, scheme, TOKENS).items():
        call()
        most = numba.get_num_threads()
        times: dict[int, list[float]] = {1: [], most: []}
        for _ in range(max(7, as_many(call, ROUND_S))):  # threads may share a CPU for some milliseconds
            for count, taken in times.items():
                numba.set_num_threads(count)
                call()
                taken.append(timed(call))
        found[name] = statistics.median(times[1]) / statistics.median(times[most])
    return found


def callers(shape: shapes.Shape, scheme: str) -> dict[str, float]:
    """Calls a second of several threads of Python over those of one, torch's and OpenBLAS's threads beside them."""
    return {name: together(call, f"{name}, {scheme}") for name, call in calls(shape, scheme, TOKENS).items()}


def together(call: Callable[[], Any], name: str) -> float:
    """Calls a second of several threads over those of one; raise if a result differs."""
    import torch

    square, expected, ratios = np.ones((512, 512), np.float32), call().tobytes(), []
    each = max(2, as_many(call, ROUND_S / CALLERS))
    begin = Barrier(CALLERS)

    def several(_: int) -> list[Any]:
        begin.wait()  # every thread does its part
        return [call() for _ in range(each)]

    def beside_others() -> None:
        """What torch's and OpenBLAS's threads have just done; OpenBLAS's go on looking for work for a while."""
        (torch.from_numpy(square) @ torch.from_numpy(square), square @ square)

    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(several, range(CALLERS)))
        for _ in range(5):
            beside_others()
            started = time.perf_counter()
            found = [result for results in pool.map(several, range(CALLERS)) for result in results]
            taken = time.perf_counter() - started
            if {result.tobytes() for result in found} != {expected}:
                raise RuntimeError(f"{CALLERS} callers at once got other bits than one, {name}")
            beside_others()
            ratios.append(timed(lambda: [call() for _ in range(CALLERS * each)]) / taken)
    return statistics.median(ratios)


def sgemm(shape: shapes.Shape, scheme: str) -> dict[str, float]:
    """Operations a second of a layer of one expert of the shape, over those of OpenBLAS on a product as large."""
    large = replace(shape, num_experts=1, top_k=1)
    call = calls(large, scheme, (1024,))["T = 1024"]
    rng = np.random.default_rng(0)
    sizes = (1024, shape.hidden_size), (shape.hidden_size, 2 * shape.intermediate_size)
    x, w = (rng.standard_normal(size, dtype=np.float32) for size in sizes)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(7):
        times[0].append(timed(call) / large.flops(1024))
        times[1].append(timed(lambda: x @ w) / (2 * x.size * w.shape[1]))
    return {"layer over OpenBLAS": statistics.median(times[1]) / statistics.median(times[0])}


def calls(shape: shapes.Shape, name: str, token_counts: Sequence[int]) -> dict[str, Callable[[], Any]]:
    """A call of the layer on prepared weights for each number of tokens."""
    import cumoe

    scheme = schemes.SCHEMES[name]
    w1, w2 = scheme.draw(shape, 0)
    weights = schemes.stored(w1), schemes.stored(w2)
    prepared = cumoe.prepare(*weights, quant_config=scheme.config(w1, w2))
    found = {}
    for num_tokens in token_counts:
        x, choices = shapes.tokens(shape, num_tokens, scheme.dtype), shapes.routing(shape, num_tokens)
        found[f"T = {num_tokens}"] = lambda x=x, choices=choices: cumoe.fused_experts(x, prepared, None, *choices)
    return found


def as_many(call: Callable[[], Any], seconds: float) -> int:
    """Calls that take about so long."""
    return min(MOST_CALLS, int(seconds / timed(call)))


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


PARTS = {"first": first, "threads": threads, "callers": callers, "sgemm": sgemm}


if __name__ == "__main__":
    sys.exit(main())
