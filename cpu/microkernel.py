"""
Register-blocked matrix micro-kernels, emitted as LLVM vector code for the CPU that runs.

A micro-kernel multiplies a few rows of activations with one *panel* of weights and leaves float32 sums
in a small tile that stays in the L1 cache; what happens to the sums (bias, activation, rounding) is
written in plain Numba in `epilogue.py`.

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

import numba
from llvmlite import binding, ir
from numba.extending import intrinsic

from cumoe.cpu import _amx, _ir
from cumoe.cpu._ir import constant


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
_AHEAD_BYTES = 3072

# Feature sets that NUMBA_CPU_NAME stands for when it overrides the host's; others run the portable kernel.
_NAMED_CPUS = {"haswell": {"avx2", "fma", "f16c"}}
_NAMED_CPUS["znver3"] = _NAMED_CPUS["haswell"]
_NAMED_CPUS["skylake-avx512"] = _NAMED_CPUS["haswell"] | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


@functools.cache
def cpu_features() -> frozenset[str]:
    """The instruction sets that Numba compiles for here, its environment overrides included."""
    if numba.config.CPU_FEATURES is not None:
        listed = numba.config.CPU_FEATURES.split(",")
        return frozenset(feature[1:] for feature in listed if feature.startswith("+"))
    if numba.config.CPU_NAME is not None:
        return frozenset(_NAMED_CPUS.get(numba.config.CPU_NAME, ()))
    return frozenset(feature for feature, present in binding.get_host_cpu_features().items() if present)


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
        return Kernel(
            name, 64, 6, 1, 2, 2, 1, 64, 16, "bfloat16", _AHEAD_BYTES, True, _vector_tile("dot", 6, 4, 16, True)
        )
    narrow = dtype != "float32"
    lanes, vectors, rows, fused = {
        "avx512": (16, 4, 5 if narrow else 6, True),  # 24 sums + 4 weights + 1 broadcast of 32 registers
        "avx2": (8, 2, 5 if narrow else 6, True),
        "portable": (4, 4, 2, "neon" in cpu_features()),
    }[name]
    pair = 2 if narrow else 1
    tile = _vector_tile(dtype, rows, vectors, lanes, fused)
    return Kernel(
        name, lanes * vectors, rows, 1, pair, pair, 1, lanes * vectors, lanes, "float32", _AHEAD_BYTES, True, tile
    )


def _vector_tile(kind: str, max_rows: int, vectors: int, lanes: int, fused: bool) -> Any:
    """
    Emit a kernel for vector registers.

    `kind` is a weight dtype (rows are float32) or "dot" (bfloat16 pairs on both sides).
    """

    @intrinsic
    def tile(typing_context, rows, a, a_stride, panel, steps, sums, half, accumulate, ahead, lines):
        def codegen(context, builder, signature, arguments):
            rows, *operands = arguments
            done = builder.append_basic_block("done")
            switch = builder.switch(rows, done)
            for count in range(1, max_rows + 1):
                block = builder.append_basic_block(f"rows{count}")
                switch.add_case(constant(count), block)
                builder.position_at_end(block)
                _emit_rows(builder, kind, count, vectors, lanes, fused, *operands)
                builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return _ir.TILE_ARGUMENTS, codegen

    tile.__qualname__ = f"tile-{kind}-{max_rows}-{vectors}x{lanes}-{fused}"
    return tile


def _emit_rows(
    builder: ir.IRBuilder,
    kind: str,
    rows: int,
    vectors: int,
    lanes: int,
    fused: bool,
    a: ir.Value,
    a_stride: ir.Value,
    panel: ir.Value,
    steps: ir.Value,
    sums: ir.Value,
    half: ir.Value,
    accumulate: ir.Value,
    ahead: ir.Value,
    lines: ir.Value,
) -> None:
    """``sums[r, c] = (sums[r, c] if accumulate) + sum over steps of a[r, s] * panel[s, c]`` for `rows` rows."""
    floats = ir.VectorType(ir.FloatType(), lanes)
    words = ir.VectorType(ir.IntType(32), lanes)
    vector_bytes = 4 * lanes
    panel_step = constant(vector_bytes * vectors)
    row_words = 1 if kind in ("float32", "dot") else 2  # 32-bit words of a row per step
    row_start = [builder.add(a, builder.mul(a_stride, constant(r))) for r in range(rows)]
    side = vectors // 2  # vectors of a half
    halves = sums, builder.add(sums, half)
    tile_address = [
        [builder.add(halves[v // side], constant((r * side + v % side) * vector_bytes)) for v in range(vectors)]
        for r in range(rows)
    ]
    before = builder.block
    load_block, loop, after = (builder.append_basic_block(name) for name in ("resume", "k", "store"))
    builder.cbranch(builder.icmp_signed("!=", accumulate, constant(0)), load_block, loop)

    builder.position_at_end(load_block)
    resumed = [[_ir.load(builder, address, floats) for address in row] for row in tile_address]
    builder.branch(loop)

    builder.position_at_end(loop)
    step = builder.phi(ir.IntType(64))
    step.add_incoming(constant(0), before)
    step.add_incoming(constant(0), load_block)
    acc = [[builder.phi(floats) for _ in range(vectors)] for _ in range(rows)]
    for r in range(rows):
        for v in range(vectors):
            acc[r][v].add_incoming(ir.Constant(floats, None), before)
            acc[r][v].add_incoming(resumed[r][v], load_block)
    new = [list(row) for row in acc]
    panel_row = builder.add(panel, builder.mul(step, panel_step))
    row_offset = builder.mul(step, constant(4 * row_words))
    _ir.prefetch_step(builder, ahead, step, lines)
    for part in range(row_words):
        loaded = [_ir.load(builder, builder.add(panel_row, constant(v * vector_bytes)), words) for v in range(vectors)]
        weights = [_widen(builder, kind, part, word, floats) for word in loaded]
        for r in range(rows):
            address = builder.add(builder.add(row_start[r], row_offset), constant(4 * part))
            row = _ir.splat(builder, _ir.load(builder, address, words.element), lanes)
            for v in range(vectors):
                new[r][v] = _multiply_add(builder, kind, fused, row, weights[v], new[r][v], floats)
    following = builder.add(step, constant(1))
    latch = builder.block
    step.add_incoming(following, latch)
    for r in range(rows):
        for v in range(vectors):
            acc[r][v].add_incoming(new[r][v], latch)
    builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)

    builder.position_at_end(after)
    for r in range(rows):
        for v in range(vectors):
            _ir.store(builder, new[r][v], tile_address[r][v])


def _widen(builder: ir.IRBuilder, kind: str, half: int, words: ir.Value, floats: ir.VectorType) -> ir.Value:
    """The weights of one half of the pairs as float32 (of both halves, untouched, for "dot")."""
    lanes = floats.count
    if kind == "dot":
        return words
    if kind == "float32":
        return builder.bitcast(words, floats)
    if kind == "bfloat16":  # the upper half of a float32
        if half == 0:
            return builder.bitcast(builder.shl(words, _ir.fill(words.type, 16)), floats)
        return builder.bitcast(builder.and_(words, _ir.fill(words.type, 0xFFFF0000)), floats)
    if half == 1:
        words = builder.lshr(words, _ir.fill(words.type, 16))
    if "f16c" not in cpu_features() and "avx512f" not in cpu_features():
        return _ir.half_to_float(builder, words, floats)
    codes = builder.trunc(words, ir.VectorType(ir.IntType(16), lanes))
    return builder.fpext(builder.bitcast(codes, ir.VectorType(ir.HalfType(), lanes)), floats)


def _multiply_add(
    builder: ir.IRBuilder,
    kind: str,
    fused: bool,
    row: ir.Value,
    weights: ir.Value,
    acc: ir.Value,
    floats: ir.VectorType,
) -> ir.Value:
    if kind == "dot":
        pairs = ir.VectorType(_ir.BFloat(), 2 * floats.count)
        operands = [acc, builder.bitcast(row, pairs), builder.bitcast(weights, pairs)]
        return _ir.call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", floats, operands)
    row = builder.bitcast(row, floats)
    if fused:
        return _ir.call(builder, f"llvm.fma.v{floats.count}f32", floats, [row, weights, acc])
    return builder.fadd(builder.fmul(row, weights), acc)
