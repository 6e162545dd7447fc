"""
A tile of the Hopper kernel by hand, for tuning: each text is one more contender of

    cumoe bench --suite gpu --parts layer --peers none --seconds 0 --shapes NAME --tokens T --variant TEXT ...

    96                                       the tile of this height in the launcher's table
    tokens=96,m_blocks=2,groups=2,ctas=1     a tile of these fields, which are those of the launcher's `Tile`

With ``--parts stages`` each step of the layer is timed alone instead.
"""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

_LAUNCHER = "cumoe.rawkernels._grouped_gemm_wgmma"


@contextlib.contextmanager
def forced(text: str) -> Iterator[None]:
    """Make every call inside use this tile, whatever its sizes."""
    launcher: Any = importlib.import_module(_LAUNCHER)
    chosen = tile(launcher.Tile, launcher._TILES, text)
    block_rows, tiles = launcher.block_rows, dict(launcher._TILES)
    launcher.block_rows = lambda *sizes, **named: chosen.tokens
    launcher._TILES[chosen.tokens] = chosen
    try:
        yield
    finally:
        launcher.block_rows = block_rows
        launcher._TILES.clear()
        launcher._TILES.update(tiles)


def tile(kind: Any, known: dict[int, Any], text: str) -> Any:
    """The known tile of a height, or a new one from ``name=number`` words."""
    if text.isdigit():
        if int(text) not in known:
            raise ValueError(f"variant must be one of the heights {', '.join(map(str, sorted(known)))}, got {text}")
        return known[int(text)]
    values: dict[str, int] = {}
    for word in text.split(","):
        name, _, number = word.strip().partition("=")
        if name not in kind._fields or not number.isdigit():
            names = ", ".join(kind._fields)
            raise ValueError(f"variant must have words like {kind._fields[0]}=8, of {names}, got {word!r}")
        values[name] = int(number)
    missing = [name for name in kind._fields if name not in values and name not in kind._field_defaults]
    if missing:
        raise ValueError(f"variant must name {', '.join(missing)} too, got {text!r}")
    return kind(**values)
