"""`cumoe compile`: build the default kernels ahead of their first use, with or without a GPU."""

import multiprocessing
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table


class Built(NamedTuple):
    """What became of one kernel."""

    seconds: float
    how: str  # "on disk", "compiled", "damaged, compiled again", or "failed"
    registers: int
    spill_bytes: int
    error: str = ""


def architecture(text: str) -> str:
    """Check the name of an architecture, for the command line."""
    match = re.fullmatch(r"sm_(\d+)[af]?", text)
    if match is None or int(match[1]) < 80:
        raise ValueError(f"must be sm_80 or later, as in sm_90a, got {text!r}")
    return text


def present_architectures() -> list[str]:
    """Architectures of the GPUs of this machine."""
    try:
        import cupy

        from cumoe.rawkernels import _load

        found = {_load.architecture(number) for number in range(cupy.cuda.runtime.getDeviceCount())}
    except NotImplementedError:  # a GPU too old for every kernel says so itself
        raise
    except Exception:  # CuPy raises its own kinds, and ImportError when a CUDA library is missing
        found = set()
    if not found:
        from cumoe.rawkernels._compile import ARCHITECTURES

        raise ValueError(f"arch must be named where there is no GPU: some of {', '.join(ARCHITECTURES)}")
    return sorted(found)


def run(
    console: Console,
    architectures: Sequence[str],
    dtypes: Sequence[str],
    output: Path | None = None,
    jobs: int | None = None,
) -> int:
    """Compile what is not on the disk, print a table, return the exit status."""
    from cumoe.rawkernels import _cache, _compile, _variants

    maker = _compile.nvrtc_version()
    if maker is None:
        raise ValueError("compiling needs NVRTC: pip install 'cumoe[compile]'")
    folder = _cache.folder(output)
    if folder is None:
        raise ValueError("output must be named: CUPY_CACHE_IN_MEMORY is set, or there is no home folder")
    folder.mkdir(parents=True, exist_ok=True)  # an error here is worth more than a cache that stays empty
    if not os.access(folder, os.W_OK):
        raise ValueError(f"output must be a folder that can be written, got {folder}")

    started = time.perf_counter()
    tasks = [(variant, arch) for arch in architectures for variant in _variants.default(arch, dtypes)]
    if not tasks:
        raise ValueError(f"no kernel is listed for {', '.join(architectures)} and {', '.join(dtypes)}")
    results = _build_all(console, tasks, output, jobs or _cpus())
    seconds = time.perf_counter() - started

    table = Table("file", "constants", "arch", "registers", "spills B", "seconds", "")
    for (variant, arch), built in zip(tasks, results, strict=True):
        constants = " ".join(f"{name}={value}" for name, value in variant.constants)
        numbers = (str(built.registers), str(built.spill_bytes)) if built.registers else ("-", "-")
        # a text of CUDA is compiled as a whole, Python function by function
        name = variant.file if variant.file.endswith(".cu") else f"{variant.file} {' '.join(variant.entries)}"
        table.add_row(name, escape(constants), arch, *numbers, f"{built.seconds:.2f}", built.how)
    console.print(table)
    for (variant, arch), built in zip(tasks, results, strict=True):
        if built.error:
            console.print(f"{variant} for {arch}: {built.error}", style="red", markup=False)
    failed = sum(bool(built.error) for built in results)
    console.print(
        f"{len(tasks) - failed} kernels in {folder}, {seconds:.1f} s; used by machines with {maker} or without NVRTC",
        markup=False,
        soft_wrap=True,
    )
    if output is not None:
        console.print(f"to use them there: CUPY_CACHE_DIR={output}", markup=False, soft_wrap=True)
    if failed:
        console.print(f"{failed} kernels failed", style="red")
    return int(failed > 0)


def _build_all(console: Console, tasks: Sequence[tuple[Any, str]], output: Path | None, jobs: int) -> list[Built]:
    """Build in parallel processes, the longest texts first so that none of them is the last to end."""
    from cumoe.rawkernels import _compile

    found: dict[int, Built] = {}
    order = sorted(range(len(tasks)), key=lambda i: -len(_compile.source(tasks[i][0].file)))
    jobs = min(jobs, len(tasks))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("compile", total=len(tasks))
        if jobs == 1:
            for i in order:
                found[i] = _build(*tasks[i], output)
                progress.advance(bar)
        else:
            spawn = multiprocessing.get_context("spawn")  # a forked child would share this process's compiler
            with ProcessPoolExecutor(jobs, spawn) as pool:
                pending = {pool.submit(_build, *tasks[i], output): i for i in order}
                try:
                    for future in as_completed(pending):
                        found[pending[future]] = future.result()
                        progress.advance(bar)
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
    return [found[i] for i in range(len(tasks))]


def _build(variant: Any, arch: str, output: Path | None) -> Built:
    from cumoe.rawkernels import _cache, _variants

    started = time.perf_counter()
    try:
        done = _variants.compiled(variant, arch, output)
        if _variants.compiled(variant, arch, output).how != _cache.READ:
            raise OSError("compiled, but it could not be written")
    except Exception as error:  # the compiler's own kinds; one kernel that fails must not hide the others
        return Built(time.perf_counter() - started, "failed", 0, 0, str(error))
    seconds = time.perf_counter() - started
    used = _variants.usage(done.log).values()
    registers = max((one.registers for one in used), default=0)
    return Built(seconds, done.how, registers, sum(one.spill_bytes for one in used))


def _cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
