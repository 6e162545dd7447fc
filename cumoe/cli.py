"""The command line: ``cumoe demo``, ``run``, ``info``, ``compile`` and ``bench``."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` (default: those of the process) name; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except (ValueError, TypeError, NotImplementedError, OSError, MemoryError) as error:
        print(f"cumoe {options.name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    from cumoe import _demo, _version
    from cumoe.bench import options as bench_options
    from cumoe.bench import shapes

    parser = argparse.ArgumentParser(prog="cumoe", description="The Mixture-of-Experts layer as array functions.")
    parser.add_argument("--version", action="version", version=f"cumoe {_version.__version__}")
    commands = parser.add_subparsers(title="commands", dest="name", required=True)

    demo = commands.add_parser("demo", help="draw a layer of a real size, run it, check it, print its table")
    demo.add_argument("--shape", choices=shapes.SHAPES, default=_demo.SHAPE, help="default: %(default)s")
    demo.add_argument(
        "--tokens", type=bench_options.positive, default=_demo.TOKENS, metavar="T", help="default: %(default)s"
    )
    demo.add_argument("--dtype", choices=shapes.DTYPES, default="bfloat16", help="default: %(default)s")
    demo.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "gpu"), default="auto", help="default: CPU, and GPU if there is one"
    )
    demo.add_argument("--seed", type=int, default=0, help="of weights and tokens; default: %(default)s")
    demo.set_defaults(command=_run_demo)

    run = commands.add_parser("run", help="run one layer of a Hugging Face checkpoint on tokens from a file")
    run.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="folder with config.json and safetensors files"
    )
    run.add_argument("--layer", type=int, required=True, metavar="N", help="number of the layer, from 0")
    run.add_argument("--input", type=Path, required=True, metavar="X.npy", help="hidden states (T, H) or (B, S, H)")
    run.add_argument("--output", type=Path, required=True, metavar="Y.npy", help="result, of the same shape")
    run.add_argument(
        "--dtype", choices=shapes.DTYPES, help="of the file written; default: the layer's, which it computes in"
    )
    run.set_defaults(command=_run_layer)

    info = commands.add_parser("info", help="versions, threads, instruction sets, kernels, devices")
    info.set_defaults(command=_run_info)

    build = commands.add_parser("compile", help="build the GPU kernels ahead of their first use; needs no GPU")
    build.add_argument(
        "--arch", nargs="+", type=_architecture, metavar="SM", help="sm_90a, sm_80 ...; default: that of the GPU here"
    )
    build.add_argument(
        "--dtypes", nargs="+", choices=shapes.DTYPES, default=shapes.DTYPES, metavar="DTYPE", help="default: all"
    )
    build.add_argument(
        "--output", type=Path, metavar="DIR", help="a folder to carry, for CUPY_CACHE_DIR; default: CuPy's cache"
    )
    build.add_argument("--jobs", type=bench_options.positive, metavar="N", help="processes; default: one a CPU")
    build.set_defaults(command=_run_compile)

    bench = commands.add_parser("bench", help="measure, print ratios, write a CSV")
    bench_options.add_arguments(bench)
    bench.set_defaults(command=_run_bench)
    return parser


def _architecture(text: str) -> str:
    from cumoe import _compile_command

    try:
        return _compile_command.architecture(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _console() -> Any:
    from rich.console import Console

    # A file or a pipe has no width of its own, and tables must not be cut there.
    return Console() if sys.stdout.isatty() else Console(width=120)


def _run_demo(options: argparse.Namespace) -> int:
    from cumoe import _demo

    return _demo.run(_console(), options.shape, options.tokens, options.device, options.dtype, options.seed)


def _run_info(options: argparse.Namespace) -> int:
    from rich.markup import escape
    from rich.table import Table

    from cumoe import _info

    console = _console()
    for section, facts in _info.gather().items():
        table = Table(title=section, title_justify="left", show_header=False)
        for name, value in facts.items():
            table.add_row(name, escape(value))
        console.print(table)
    return 0


def _run_compile(options: argparse.Namespace) -> int:
    from cumoe import _compile_command

    architectures = options.arch or _compile_command.present_architectures()
    return _compile_command.run(_console(), architectures, options.dtypes, options.output, options.jobs)


def _run_bench(options: argparse.Namespace) -> int:
    from cumoe.bench import options as bench_options

    return bench_options.run(_console(), options)


def _run_layer(options: argparse.Namespace) -> int:
    import cumoe

    hidden_states = load_array(options.input)
    layer = cumoe.load_layer(options.checkpoint, options.layer)
    wanted = np.dtype(options.dtype or layer.dtype)
    started = time.perf_counter()
    out = layer(np.ascontiguousarray(hidden_states, np.dtype(layer.dtype))).astype(wanted, copy=False)
    seconds = time.perf_counter() - started
    save_array(options.output, out)
    print(layer.explain())
    print(f"{out.size // max(1, out.shape[-1])} tokens in {seconds * 1e3:.1f} ms, compile time included")
    print(f"wrote {options.output} {out.shape} {wanted.name}")
    return 0


def load_array(path: Path) -> np.ndarray[Any, Any]:
    """Read hidden states from an .npy file; two-byte records without a type are bfloat16."""
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} must be a whole .npy file with one array of numbers: {error}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"{path} must be an .npy file with one array, got an .npz archive")
    if array.dtype == np.dtype("V2"):  # what the .npy format makes of ml_dtypes.bfloat16
        array = array.view("bfloat16")
    if array.dtype.name not in ("bfloat16", "float16", "float32", "float64"):
        raise TypeError(f"{path} must hold bfloat16, float16, float32 or float64, got {array.dtype}")
    return array


def save_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write an .npy file; a reader sees the old file or all of the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            np.save(file, array, allow_pickle=False)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    sys.exit(main())
