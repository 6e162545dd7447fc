"""
Register-blocked matrix micro-kernels, emitted as LLVM vector code for the CPU that runs.

A micro-kernel multiplies a few rows of activations with one *panel* of weights and leaves float32 sums
in a small tile that stays in the L1 cache; what happens to the sums (bias, activation, rounding) is in
`epilogue.py`, how kernels for vector registers are emitted in `_vector_tile.py`.

    panel  words of 32 bits, K outermost: word (s, c) = weight k = s of column c (float32), or the pair
           k = 2s, 2s + 1 (16-bit types); in blocks of (block_words, block_columns), row-major in a block:
           (1, columns) for vector registers, (16, 16) for tile registers
    rows   (rows, K) float32, or bfloat16 for the kernels with a bfloat16 dot product; the AMX kernel
           takes groups of 16 rows, each (K / 32, 16, 32)
    sums   (2, rows, columns / 2) float32: the gate half and the up half each lie in one piece

Every kernel adds the products of one output in one fixed order along K, whatever the number of rows, so
the bits of a row do not depend on its neighbours. Which kernel serves a dtype is decided from the CPU's
features before anything is emitted (`choose`): LLVM ends the process when asked for an instruction that
the target lacks. The recipe's measurements are in benchmarks/NOTES.md.
"""

import functools
from typing import Any, NamedTuple

from cumoe.cpu import _amx, _vector_tile
from cumoe.cpu._features import cpu_features
from cumoe.cpu._vector_tile import Tile


class Kernel(NamedTuple):
    """What a micro-kernel expects of its operands; sizes in elements unless they say bytes."""

    name: str
    columns: int  # of a panel
    max_rows: int  # of one call
    row_group: int  # rows that lie interleaved in memory; 1 = row after row
    k_step: int  # K of one step; K is padded with zeros to a multiple of it
    pair: int  # weights in a 32-bit word of the panel
    block_words: int  # of a panel: what one weight register takes at once
    block_columns: int
    lanes: int  # 32-bit lanes of a vector
    row_dtype: str  # "float32" or "bfloat16": how the rows of activations arrive
    ahead_bytes: int  # how far to ask for weights that come straight from memory
    fetches_next: bool  # several row blocks ask for the next weights meanwhile; tile loads lose by it
    tile: Any  # see _ir.TILE_ARGUMENTS

    @property
    def row_step_bytes(self) -> int:
        """Bytes of a row (or of a whole row group) per step of K."""
        return self.row_group * self.k_step * (4 if self.row_dtype == "float32" else 2)

    @property
    def panel_step_bytes(self) -> int:
        """Bytes of a panel per step of K."""
        return self.columns * self.k_step * 4 // self.pair


# Distance at which a single block of rows reads memory fastest here (benchmarks/NOTES.md); within a page.
_AHEAD_BYTES = 1024

# Micro-kernels, fastest first, and the instruction sets that each needs.
NEEDS = {
    "amx": {"amx-tile", "amx-bf16", "avx512f"},
    "avx512bf16": {"avx512f", "avx512bf16"},
    "avx512": {"avx512f"},
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set(),
}
_BFLOAT16_ONLY = ("amx", "avx512bf16")


@functools.cache
def names(dtype: str) -> tuple[str, ...]:
    """The micro-kernels that run here for weights of `dtype`, fastest first."""
    return tuple(name for name in NEEDS if refusal(name, dtype) is None)


def refusal(name: str, dtype: str) -> str | None:
    """Why the micro-kernel `name` does not run here for weights of `dtype`; None if it does."""
    if name in _BFLOAT16_ONLY and dtype != "bfloat16":
        return f"{name}: multiplies bfloat16 only, the weights are {dtype}"
    missing = NEEDS[name] - cpu_features()
    if missing:
        return f"{name}: the CPU, or what Numba was told of it, lacks {', '.join(sorted(missing))}"
    if name == "amx" and not _amx.permitted():
        return "amx: the operating system does not let this process use the tile registers"
    return None


@functools.cache
def choose(dtype: str, name: str | None = None) -> Kernel:
    """The micro-kernel `name` (default: the best one here) for weights of `dtype`."""
    available = names(dtype)
    name = name or available[0]
    if name not in available:
        raise NotImplementedError(
            f"no micro-kernel {name!r} for {dtype} on this CPU; available: {', '.join(available)}"
        )
    if name == "amx":
        return Kernel(name, 32, 32, 16, 32, 2, 16, 16, 16, "bfloat16", 0, False, _amx.tile)
    if name == "avx512bf16":
        tile = _vector_tile.emit(Tile("dot", 6, 4, 16))
        return Kernel(name, 64, 6, 1, 2, 2, 1, 64, 16, "bfloat16", _AHEAD_BYTES, True, tile)
    narrow = dtype != "float32"
    lanes, vectors, rows, fused = {
        "avx512": (16, 4, 5 if narrow else 6, True),  # 24 sums + 4 weights + 1 broadcast of 32 registers
        "avx2": (8, 2, 5 if narrow else 6, True),
        "portable": (4, 4, 2, "neon" in cpu_features()),
    }[name]
    pair, columns = 2 if narrow else 1, lanes * vectors
    tile = _vector_tile.emit(Tile(dtype, rows, vectors, lanes, fused))
    return Kernel(name, columns, rows, 1, pair, pair, 1, columns, lanes, "float32", _AHEAD_BYTES, True, tile)
