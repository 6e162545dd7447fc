"""
The GPU suite: the whole expert computation, from given routing to the sum, in one CUDA graph (`gpu_timing`).

Every result is first checked (`gpu_check`): a few tokens against float64 and the derived bound, all tokens against
the first contender. Then all are timed over a cold L2; long kernels a second time in turn, until the clock has
settled. Losses stay in the table. What fails is named, and the rest of the suite goes on.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from cumoe.bench import (
    gpu_arrays,
    gpu_ceilings,
    gpu_check,
    gpu_contenders,
    gpu_operations,
    gpu_peers,
    gpu_recorded,
    gpu_stages,
    gpu_tables,
    gpu_tiles,
    results,
    shapes,
)
from cumoe.bench.gpu_clocks import Watch
from cumoe.bench.gpu_contenders import OWN, Case, Contender, Weights, WrongResultError
from cumoe.bench.gpu_timing import REPEATS, Stopwatch
from cumoe.bench.timing import Timing

SHAPES = ("mixtral-8x7b", "qwen3-30b-a3b", "qwen3-next", "dsv3-ep", "dsv3-tp8")
TOKENS = (1, 8, 64, 256, 1024, 4096, 16384)
DTYPES = ("bfloat16",)
ROUTINGS = ("uniform",)
PARTS = ("ceilings", "layer", "operations")
ALL_PARTS = (*PARTS, "stages")
SUSTAINED_S = 1.5

_OPERATIONS_SHAPE = "qwen3-30b-a3b"
_LONG_US = 400  # from here on, what arithmetic bounds meets the power limit
_IDLE_S = 0.2  # before the burst of a long kernel
_SPARE_BYTES = 8 << 30  # beside the weights: rows between the steps, the peers' copies


@dataclass(frozen=True)
class Options:
    """What to run; `cumoe bench --help` explains."""

    shape_names: Sequence[str] = SHAPES
    num_tokens: Sequence[int] = TOKENS
    dtypes: Sequence[str] = DTYPES
    routings: Sequence[str] = ROUTINGS
    repeats: int = REPEATS
    sustained_s: float = SUSTAINED_S
    peers: bool = True
    backend: str | None = None
    variants: Sequence[str] = ()
    parts: Sequence[str] = PARTS
    output: Path | None = None
    commit: str = ""
    seed: int = 0


def run(console: Console, options: Options) -> list[str]:
    """Run the suite, writing a CSV after each case; return what went wrong."""
    _need_device()
    for peer in gpu_peers.PEERS if options.peers else ():
        if missing := peer.missing():
            console.print(f"without {peer.name}: {missing}")
    with Stopwatch() as stopwatch:
        suite = Suite(console, options, stopwatch)
        suite.run()
    return suite.problems


def _need_device() -> None:
    """Raise unless CuPy sees a CUDA device."""
    try:
        import cupy as cp

        there = bool(cp.cuda.is_available())
    except ImportError:
        there = False
    if not there:
        raise NotImplementedError("suite must be 'cpu' here, got 'gpu'; CuPy is not installed or sees no CUDA device")


class Suite:
    """A run: its options, its clock, the rows so far and what went wrong."""

    def __init__(self, console: Console, options: Options, stopwatch: Stopwatch) -> None:
        import cupy as cp

        self.console, self.options, self.stopwatch = console, options, stopwatch
        self.device = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)["name"].decode()
        self.facts = results.header("gpu", options.commit)
        self.facts["protocol"] = (
            f"one graph, 256 MB written before each replay, CUDA events, median of {options.repeats}; "
            f"{_IDLE_S} s of rest before the replays of a long case; clean: as many bytes of something else read after "
            f"the write; seed {options.seed}"
        )
        self.path = results.default_path(options.output or Path("benchmarks") / "results", self.facts)
        self.rows: list[results.Row] = []
        self.problems: list[str] = []
        self.ceilings: dict[str, gpu_ceilings.Ceilings] = {}

    def run(self) -> None:
        """Everything that the options name."""
        for dtype in self.options.dtypes:
            if "ceilings" in self.options.parts:
                with self._naming(f"ceilings, {dtype}"):
                    self._measure(dtype)
                self._free()
            for name in self.options.shape_names if {"layer", "stages"} & set(self.options.parts) else ():
                with self._naming(f"{name}, {dtype}"):
                    self._shape(shapes.SHAPES[name], dtype)
                self._free()
            if "operations" in self.options.parts:
                self._operations(shapes.SHAPES[_OPERATIONS_SHAPE], dtype)
        for line in gpu_tables.summary([row for row in self.rows if row["kind"] == "layer"]):
            self.console.print(line, highlight=False)
        if self.problems:
            self.console.print(f"[red]{len(self.problems)} problems:[/red]")
            for problem in self.problems:
                self.console.print(escape(problem), highlight=False, soft_wrap=True)
        if self.rows:
            self.console.print(f"wrote {self.path}")

    def _measure(self, dtype: str) -> None:
        self.ceilings[dtype] = gpu_ceilings.measure(self.stopwatch, dtype)
        for name, value in self.ceilings[dtype].facts().items():
            self.facts[f"{dtype} {name}"] = value
            self.console.print(f"{dtype} {name}: {value}", highlight=False, soft_wrap=True)

    def _shape(self, shape: shapes.Shape, dtype: str) -> None:
        """All routings and token counts of one shape, for one set of weights."""
        import cupy as cp

        import cumoe

        free, needed = cp.cuda.Device().mem_info[0], 2 * shape.weight_bytes(dtype) + _SPARE_BYTES
        if needed > free:
            self.console.print(f"skipped {shape}, {dtype}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
            return
        started = time.perf_counter()
        w1, w2 = gpu_arrays.weights(shape, dtype, self.options.seed)
        prepared = cumoe.prepare(w1, w2, **gpu_contenders.chosen(self.options.backend))
        self.stopwatch.wait()
        weights = Weights(w1, w2, prepared)
        self.console.print(f"{shape}, {dtype}: weights drawn and packed in {time.perf_counter() - started:.2f} s")
        first = len(self.rows)
        for routing in self.options.routings:
            for num_tokens in self.options.num_tokens:
                with self._naming(f"{shape.name} T={num_tokens}"):
                    case = gpu_contenders.draw(shape, dtype, routing, num_tokens, self.options.seed)
                    if "layer" in self.options.parts:
                        self._case(case, weights)
                    if "stages" in self.options.parts:
                        self._stages(case, weights)
        for table in gpu_tables.layer_tables([row for row in self.rows[first:] if row["kind"] == "layer"]):
            self.console.print(table)

    def _case(self, case: Case, weights: Weights) -> None:
        """Capture, check, time and write down every contender of a case."""
        import cupy as cp

        tokens = gpu_check.sample(case.num_tokens)
        x, topk_weights, topk_ids = gpu_check.rows_on_host(case.x, tokens), *(a[tokens] for a in case.host_routing)
        exact = gpu_check.expected(cp, x, weights.w1, weights.w2, topk_weights, topk_ids)
        is_long = self._is_long(case)
        made: dict[str, Contender] = {}
        judged: dict[str, gpu_check.Judgement] = {}
        times: dict[str, Timing] = {}
        clean: dict[str, Timing] = {}
        options = self.options
        everybody = gpu_contenders.makers(
            self.stopwatch, case, weights, options.backend, options.variants, options.peers
        )
        for name, make in everybody.items():
            with self._naming(f"{case}, {name}"):
                contender = make()
                contender.replay()
                self.stopwatch.wait()
                other = made.get(OWN, contender).out
                judged[name] = gpu_contenders.check(contender, name.startswith(OWN), tokens, exact, other, case.dtype)
                times[name] = self.stopwatch.burst(contender.replay, options.repeats, _IDLE_S if is_long else 0.0)
                if not is_long:
                    clean[name] = self.stopwatch.burst(contender.replay, options.repeats, clean=True)
                made[name] = contender
        watch, sustained = Watch(), {}
        if is_long and made and options.sustained_s > 0:
            with self._naming(f"{case}, sustained"), watch:
                replays = {name: contender.replay for name, contender in made.items()}
                sustained = self.stopwatch.sustained(replays, options.sustained_s)
        for name, timed in times.items():
            self._keep(
                gpu_tables.row(
                    kind="layer",
                    shape=case.shape,
                    dtype=case.dtype,
                    num_tokens=case.num_tokens,
                    method=name,
                    timed=timed,
                    num_bytes=case.num_bytes,
                    flops=case.flops,
                    routing=case.routing,
                    experts_hit=case.experts_hit,
                    recorded=gpu_ceilings.recorded(self.device, case.dtype),
                    measured=self.ceilings.get(case.dtype),
                    clean=clean.get(name),
                    sustained=sustained.get(name),
                    watch=watch,
                    own_us=times[OWN].median_us if OWN in times else None,
                    peer=gpu_recorded.best_layer(self.device, case.shape.name, case.dtype, case.num_tokens),
                    errors=judged[name],
                )
            )

    def _stages(self, case: Case, weights: Weights) -> None:
        """Each step of the layer in a graph of its own, with the launcher's tiles and with those of the variants."""
        arrays = case.x, weights.prepared, case.topk_weights, case.topk_ids
        work = gpu_stages.work(case.shape, case.host_routing[1], case.x.dtype.itemsize)
        idle_s = _IDLE_S if self._is_long(case) else 0.0
        for tile in ("", *self.options.variants):
            with gpu_tiles.forced(tile) if tile else contextlib.nullcontext():
                steps = gpu_stages.calls(*arrays, **gpu_contenders.chosen(self.options.backend))
                graphs = {name: self.stopwatch.capture(step) for name, step in steps.items()}
            for name, graph in graphs.items():
                self._keep(
                    gpu_tables.row(
                        kind="stage",
                        shape=case.shape,
                        dtype=case.dtype,
                        num_tokens=case.num_tokens,
                        method=f"{name} {tile}".strip(),
                        timed=self.stopwatch.burst(graph, self.options.repeats, idle_s),
                        num_bytes=work[name][0],
                        flops=work[name][1],
                        routing=case.routing,
                        experts_hit=case.experts_hit,
                        recorded=gpu_ceilings.recorded(self.device, case.dtype),
                        measured=self.ceilings.get(case.dtype),
                    )
                )

    def _is_long(self, case: Case) -> bool:
        """Whether the power limit will lower the clock during a case."""
        measured = self.ceilings.get(case.dtype)
        limits = measured.best if measured else gpu_ceilings.RECORDED.get(case.dtype, gpu_ceilings.RECORDED["bfloat16"])
        work = case.num_bytes, case.flops
        return limits.bound(*work) == "compute" and limits.floor_us(*work) >= _LONG_US

    def _operations(self, shape: shapes.Shape, dtype: str) -> None:
        """The single steps, each in a graph of its own."""
        first = len(self.rows)
        for num_tokens in gpu_operations.TOKENS:
            with self._naming(f"operations T={num_tokens}"):
                kernel = gpu_contenders.plan(shape, dtype, num_tokens, self.options.backend).kernel
                for operation in gpu_operations.operations(shape, dtype, num_tokens, kernel, self.options.seed):
                    with self._naming(f"{operation.name} T={num_tokens}"):
                        self._operation(operation, shape, dtype, num_tokens)
            self._free()
        for table in gpu_tables.operation_tables(self.rows[first:]):
            self.console.print(table)

    def _operation(self, operation: gpu_operations.Operation, shape: shapes.Shape, dtype: str, num_tokens: int) -> None:
        result = operation.call()
        self.stopwatch.wait()
        if wrong := operation.wrong(result):
            raise WrongResultError(wrong)
        timed = self.stopwatch.burst(self.stopwatch.capture(operation.call), self.options.repeats)
        self._keep(
            gpu_tables.row(
                kind="operation",
                shape=shape,
                dtype="float32" if operation.name == "route" else dtype,
                num_tokens=num_tokens,
                method=operation.name,
                timed=timed,
                num_bytes=operation.num_bytes,
                recorded=gpu_ceilings.recorded(self.device, dtype),
                measured=self.ceilings.get(dtype),
                peer=gpu_recorded.operation(self.device, shape.name, operation.name, num_tokens),
            )
        )

    def _keep(self, row: results.Row) -> None:
        self.rows.append(row)
        self.console.print(gpu_tables.line(row), highlight=False, soft_wrap=True)
        results.write(self.path, self.facts, self.rows)

    def _free(self) -> None:
        """Give the memory of what is gone back to the device."""
        import cupy as cp

        with contextlib.suppress(Exception):  # after an error of the device every call repeats it
            self.stopwatch.wait()
            cp.get_default_memory_pool().free_all_blocks()

    @contextlib.contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        """Write an error down and go on."""
        try:
            yield
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0]
            self.problems.append(f"{what}: {type(error).__name__}: {first_line}")
            self.console.print(escape(self.problems[-1]), style="red", highlight=False, soft_wrap=True)
