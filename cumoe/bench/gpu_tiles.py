"""
Tiles of the Hopper kernel by hand, for tuning: one text names the tiles of both products.

    tokens=96,swapped=1,m_blocks=2,columns=96 / tokens=96,swapped=0,m_blocks=2,columns=128,pingpong=1

One half only serves both products. The names are the fields of the launcher's `Tile`.
"""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

_LAUNCHER = "cumoe.rawkernels._grouped_gemm_wgmma"


@contextlib.contextmanager
def forced(text: str) -> Iterator[None]:
    """Make every call inside use these tiles, whatever its sizes."""
    launcher: Any = importlib.import_module(_LAUNCHER)
    first, _, second = text.partition("/")
    both = tile(launcher.Tile, first), tile(launcher.Tile, second or first)
    choose = launcher.choose
    launcher.choose = lambda *sizes, **named: both
    try:
        yield
    finally:
        launcher.choose = choose


def tile(kind: Any, text: str) -> Any:
    """A tile from ``name=number`` words; a field without a default must be there."""
    values: dict[str, int] = {}
    for word in text.split(","):
        name, _, number = word.strip().partition("=")
        if name not in kind._fields or not number.isdigit():
            names = ", ".join(kind._fields)
            raise ValueError(f"variant must have words like {kind._fields[0]}=8, of {names}, got {word!r}")
        values[name] = int(number)
    missing = [name for name in kind._fields if name not in values and name not in kind._field_defaults]
    if missing:
        raise ValueError(f"variant must name {', '.join(missing)} too, got {text.strip()!r}")
    return kind(**values)
