"""Arguments of `cumoe bench`, and the suite that they start."""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from cumoe.bench import cpu, gpu, schemes, shapes
from cumoe.bench.gpu_timing import REPEATS

SUITES = ("cpu", "gpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare everything that `run` reads."""
    parser.add_argument("--suite", choices=SUITES, default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=shapes.SHAPES,
        metavar="NAME",
        help=f"of {', '.join(shapes.SHAPES)}; default: {' '.join(cpu.SHAPES)}, for gpu {' '.join(gpu.SHAPES)}",
    )
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=positive,
        metavar="T",
        help=f"default: {' '.join(map(str, cpu.TOKENS))}, for gpu {' '.join(map(str, gpu.TOKENS))}",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=schemes.SCHEMES,
        metavar="DTYPE",
        help=f"of {', '.join(map(repr, schemes.SCHEMES))}, for gpu the first {len(shapes.DTYPES)}; "
        f"default: {' '.join(cpu.DTYPES)}, for gpu {' '.join(gpu.DTYPES)}",
    )
    parser.add_argument(
        "--routings",
        nargs="+",
        choices=shapes.ROUTINGS,
        metavar="KIND",
        help=f"of {', '.join(shapes.ROUTINGS)}; default: {' '.join(cpu.ROUTINGS)}, for gpu {' '.join(gpu.ROUTINGS)}",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="cpu: timing of a case, all methods (4); gpu: all methods in turn under load, long cases only (1.5)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--commit", default="", metavar="ID", help="what the file names, outside a checkout")
    only = parser.add_argument_group("for suite gpu only")
    only.add_argument(
        "--repeats", type=positive, default=REPEATS, metavar="N", help="replays of a case; default: %(default)s"
    )
    only.add_argument(
        "--parts",
        nargs="+",
        choices=gpu.ALL_PARTS,
        default=gpu.PARTS,
        metavar="PART",
        help=f"of {', '.join(gpu.ALL_PARTS)}; default: {' '.join(gpu.PARTS)}",
    )
    only.add_argument("--peers", choices=("installed", "none"), default="installed", help="default: %(default)s")
    only.add_argument("--backend", metavar="NAME", help="kernel of cumoe; default: its own choice")
    only.add_argument(
        "--variant",
        nargs="+",
        default=(),
        metavar="TILE",
        help="further contenders: a tile of the Hopper kernel by hand, as cumoe/bench/gpu_tiles.py says",
    )


def run(console: Console, options: argparse.Namespace) -> int:
    """Run the suite that the options name; 1 if a result was wrong or a case failed."""
    if options.suite == "cpu":
        return _run_cpu(console, options)
    quantised = [name for name in options.dtypes or () if name not in shapes.DTYPES]
    if quantised:
        raise ValueError(f"dtypes must be of {', '.join(shapes.DTYPES)} for suite gpu, got {quantised[0]!r}")
    problems = gpu.run(
        console,
        gpu.Options(
            shape_names=options.shapes or gpu.SHAPES,
            num_tokens=options.tokens or gpu.TOKENS,
            dtypes=options.dtypes or gpu.DTYPES,
            routings=options.routings or gpu.ROUTINGS,
            repeats=options.repeats,
            sustained_s=gpu.SUSTAINED_S if options.seconds is None else options.seconds,
            peers=options.peers == "installed",
            backend=options.backend,
            variants=options.variant,
            parts=options.parts,
            output=options.output,
            commit=options.commit,
        ),
    )
    return 1 if problems else 0


def _run_cpu(console: Console, options: argparse.Namespace) -> int:
    # NumPy asks for huge pages, torch only when told so before it starts: weights of all contenders get them
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        cpu.run(
            console,
            options.shapes or cpu.SHAPES,
            options.tokens or cpu.TOKENS,
            options.dtypes or cpu.DTYPES,
            options.routings or cpu.ROUTINGS,
            budget_s=4.0 if options.seconds is None else options.seconds,
            output=options.output,
            commit=options.commit,
        )
    except cpu.WrongResultError as error:
        print(f"cumoe bench: {error}", file=sys.stderr)
        return 1
    return 0


def positive(text: str) -> int:
    """Read a number from 1 on, for the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {number}")
    return number
