"""
Micro-kernels for vector registers: sums of a few rows of activations times one panel, in registers along K.

A kind names what a step of K takes: weights of "float32", "bfloat16" or "float16" with rows of float32; "dot", pairs of
bfloat16 on both sides; a rule of `_spread`, whose codes become such pairs on the way; "bytes", four unsigned bytes a
word with rows of signed ones, and "nibbles", the same of four bits, both in integers.
"""

from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from cumoe.cpu import _ir, _spread
from cumoe.cpu._features import cpu_features
from cumoe.cpu._ir import constant

INTEGERS = ("bytes", "nibbles")
_PAIRS = ("bfloat16", "float16")  # two numbers in a word that are multiplied one after the other


class Tile(NamedTuple):
    """A kind, and the registers that it takes."""

    kind: str
    max_rows: int
    vectors: int
    lanes: int
    fused: bool = True
    scale: str = ""  # dtype of the scales of groups along K that meet partial sums; "": there are none
    has_zeros: bool = False  # a zero point behind the scale of each group
    is_wide: bool = False  # rows of float32 meet codes
    in_parts: bool = False  # the sums of a group meet a factor of its row as well

    @property
    def floats(self) -> ir.VectorType:
        """A register of sums."""
        return ir.VectorType(ir.FloatType(), self.lanes)

    @property
    def words(self) -> ir.VectorType:
        """A register of words of 32 bits."""
        return ir.VectorType(ir.IntType(32), self.lanes)

    @property
    def step_bytes(self) -> int:
        """Bytes of a panel that a step of K takes."""
        whole = 4 * self.lanes * self.vectors
        return whole // 2 if self.kind == "nibbles" else whole * _spread.BITS.get(self.kind, 16) // 16

    @property
    def row_words(self) -> int:
        """Words of a row that a step of K takes."""
        return 2 if self.kind in _PAIRS or self.is_wide else 1

    @property
    def group_bytes(self) -> int:
        """Bytes of the scales and zero points of a group."""
        columns = self.lanes * self.vectors
        return columns * (_spread.SCALE_BYTES[self.scale] + self.has_zeros) if self.scale else 0


class Operands(NamedTuple):
    """The arguments of `_ir.TILE_ARGUMENTS` behind the number of rows."""

    a: ir.Value
    a_stride: ir.Value
    panel: ir.Value
    steps: ir.Value
    sums: ir.Value
    half: ir.Value
    accumulate: ir.Value
    ahead: ir.Value
    asked: ir.Value
    asked_scales: ir.Value
    group_steps: ir.Value
    offsets: ir.Value  # of rows and groups: what sums of integers begin with, or the factors
    offsets_stride: ir.Value


def emit(tile: Tile) -> Any:
    """The micro-kernel, a switch over the number of rows."""

    @intrinsic
    def run(
        typing_context, rows, a, a_stride, panel, steps, sums, half, accumulate, ahead, asked, asked_scales,
        group_steps, offsets, offsets_stride,
    ):  # fmt: skip
        def codegen(context, builder, signature, arguments):
            rows, *operands = arguments
            done = builder.append_basic_block("done")
            switch = builder.switch(rows, done)
            for count in range(1, tile.max_rows + 1):
                block = builder.append_basic_block(f"rows{count}")
                switch.add_case(constant(count), block)
                builder.position_at_end(block)
                _emit_rows(builder, tile, count, Operands(*operands))
                builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return _ir.TILE_ARGUMENTS, codegen

    run.__qualname__ = "-".join(map(str, ("tile", *tile)))
    return run


def _emit_rows(builder: ir.IRBuilder, tile: Tile, rows: int, p: Operands) -> None:
    """``sums[r, c] = (sums[r, c] if accumulate) + sum over steps of a[r, s] * panel[s, c]`` for `rows` rows."""
    side, vector_bytes = tile.vectors // 2, 4 * tile.lanes
    halves = p.sums, builder.add(p.sums, p.half)
    places = [
        [builder.add(halves[v // side], constant((r * side + v % side) * vector_bytes)) for v in range(tile.vectors)]
        for r in range(rows)
    ]
    resumes = builder.icmp_signed("!=", p.accumulate, constant(0))
    if tile.scale:
        _emit_groups(builder, tile, rows, p, places, resumes)
        return
    kind = tile.words if tile.kind in INTEGERS else tile.floats
    before, (resume, loop) = builder.block, (builder.append_basic_block(name) for name in ("resume", "start"))
    fresh = _starts(builder, tile, rows, p, constant(0))
    builder.cbranch(resumes, resume, loop)
    builder.position_at_end(resume)
    resumed = [[_ir.load(builder, place, kind) for place in row] for row in places]
    builder.branch(loop)
    builder.position_at_end(loop)
    start = [
        [_either(builder, kind, (fresh[r][v], before), (resumed[r][v], resume)) for v in range(tile.vectors)]
        for r in range(rows)
    ]
    sums = _sum_over(builder, tile, rows, p, start, constant(0), p.steps)
    for row, row_places in zip(sums, places, strict=True):
        for value, place in zip(row, row_places, strict=True):
            _ir.store(builder, value, place)


def _emit_groups(builder: ir.IRBuilder, tile: Tile, rows: int, p: Operands, places: Any, resumes: ir.Value) -> None:
    """The same where the sums of each `group_steps` steps meet their scales: the totals stay in memory."""
    groups = builder.sdiv(builder.add(p.steps, builder.sub(p.group_steps, constant(1))), p.group_steps)
    scale_bytes, columns = _spread.SCALE_BYTES[tile.scale], tile.lanes * tile.vectors
    with cgutils.for_range(builder, groups) as group:
        first = builder.mul(group.index, p.group_steps)
        last = builder.add(first, p.group_steps)
        last = builder.select(builder.icmp_signed("<", last, p.steps), last, p.steps)
        scales_before = builder.mul(group.index, constant(tile.group_bytes))
        codes_before = builder.mul(first, constant(tile.step_bytes))
        at = builder.add(builder.add(p.panel, scales_before), codes_before)
        ahead = builder.add(p.ahead, builder.mul(group.index, p.asked_scales))
        lines = builder.ashr(builder.add(p.asked_scales, constant(63)), constant(6))
        _ir.prefetch_lines(builder, builder.add(ahead, builder.mul(first, p.asked)), lines)
        zeros = builder.add(at, constant(scale_bytes * columns)) if tile.has_zeros else None
        start = _starts(builder, tile, rows, p, group.index)
        panel = builder.add(p.panel, builder.add(scales_before, constant(tile.group_bytes)))
        codes = p._replace(panel=panel, ahead=builder.add(ahead, p.asked_scales))
        sums = _sum_over(builder, tile, rows, codes, start, first, last, zeros)
        known = builder.or_(resumes, builder.icmp_signed(">", group.index, constant(0)))
        known = _ir.splat(builder, known, tile.lanes)
        for v in range(tile.vectors):
            address = builder.add(at, constant(v * tile.lanes * scale_bytes))
            scale = _spread.scales(builder, tile.scale, address, tile.floats)
            for r in range(rows):
                value = sums[r][v] if tile.kind not in INTEGERS else builder.sitofp(sums[r][v], tile.floats)
                factor = scale
                if tile.in_parts:
                    of_row = builder.add(p.offsets, builder.mul(p.offsets_stride, constant(r)))
                    of_row = builder.add(of_row, builder.mul(group.index, constant(4)))
                    value = builder.fmul(value, scale)
                    factor = _ir.splat(builder, _ir.load(builder, of_row, ir.FloatType()), tile.lanes)
                total = _ir.load(builder, places[r][v], tile.floats)
                total = builder.select(known, total, ir.Constant(tile.floats, None))
                _ir.store(builder, _ir.fma(builder, value, factor, total), places[r][v])


def _starts(builder: ir.IRBuilder, tile: Tile, rows: int, p: Operands, group: ir.Value) -> list[list[ir.Value]]:
    """What sums begin with: zero; of integers what the unsigned weights are too large by, times the row."""
    if tile.kind not in INTEGERS:
        return [[ir.Constant(tile.floats, None)] * tile.vectors for _ in range(rows)]
    column = builder.add(p.offsets, builder.mul(group, constant(4)))
    starts = []
    for r in range(rows):
        address = builder.add(column, builder.mul(p.offsets_stride, constant(r)))
        offset = _ir.splat(builder, _ir.load(builder, address, _ir.I32), tile.lanes)
        starts.append([offset] * tile.vectors)
    return starts


def _sum_over(
    builder: ir.IRBuilder,
    tile: Tile,
    rows: int,
    p: Operands,
    start: Any,
    first: ir.Value,
    last: ir.Value,
    zeros: ir.Value | None = None,
) -> list[list[ir.Value]]:
    """The sums behind steps `first` to `last`, at least one, that begin with `start`; `zeros` are at that address."""
    origins = None if zeros is None else _spread.origins(builder, zeros)
    row_start = [builder.add(p.a, builder.mul(p.a_stride, constant(r))) for r in range(rows)]
    before, loop, after = builder.block, builder.append_basic_block("k"), builder.append_basic_block("summed")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(ir.IntType(64))
    step.add_incoming(first, before)
    acc = [[builder.phi(value.type) for value in row] for row in start]
    new = [list(row) for row in acc]
    _ir.prefetch_step(builder, p.ahead, step, p.asked, tile.step_bytes // 64)
    address = builder.add(p.panel, builder.mul(step, constant(tile.step_bytes)))
    row_offset = builder.mul(step, constant(4 * tile.row_words))
    for part, weights in enumerate(_weights(builder, tile, address, origins)):
        for r in range(rows):
            at = builder.add(builder.add(row_start[r], row_offset), constant(4 * part))
            row = _ir.splat(builder, _ir.load(builder, at, tile.words.element), tile.lanes)
            for v in range(tile.vectors):
                new[r][v] = _multiply_add(builder, tile, row, weights[v], new[r][v])
    following, latch = builder.add(step, constant(1)), builder.block
    step.add_incoming(following, latch)
    for acc_row, start_row, new_row in zip(acc, start, new, strict=True):
        for phi, begin, value in zip(acc_row, start_row, new_row, strict=True):
            phi.add_incoming(begin, before)
            phi.add_incoming(value, latch)
    builder.cbranch(builder.icmp_signed("<", following, last), loop, after)
    builder.position_at_end(after)
    return new


def _weights(builder: ir.IRBuilder, tile: Tile, address: ir.Value, origins: Any) -> list[list[ir.Value]]:
    """The weights of a step, in the parts that meet different words of a row."""
    if tile.kind in _spread.BITS:
        words = _spread.pairs(builder, tile.kind, address, origins)
        return (
            [[_upper_half(builder, tile, half, word) for word in words] for half in range(2)]
            if tile.is_wide
            else [words]
        )
    if tile.kind == "nibbles":
        return [_spread.nibbles(builder, address, tile.words)]
    offsets = range(0, 4 * tile.lanes * tile.vectors, 4 * tile.lanes)
    words = [_ir.load(builder, builder.add(address, constant(offset)), tile.words) for offset in offsets]
    if tile.kind in _PAIRS:
        return [[_widen(builder, tile, half, word) for word in words] for half in range(2)]
    return [[builder.bitcast(word, tile.floats) for word in words] if tile.kind == "float32" else words]


def _widen(builder: ir.IRBuilder, tile: Tile, half: int, words: ir.Value) -> ir.Value:
    """The weights of one half of the pairs as float32."""
    if tile.kind == "bfloat16":
        return _upper_half(builder, tile, half, words)
    if half == 1:
        words = builder.lshr(words, _ir.fill(words.type, 16))
    if not cpu_features() & {"f16c", "avx512f"}:
        return _ir.half_to_float(builder, words, tile.floats)
    codes = builder.trunc(words, ir.VectorType(ir.IntType(16), tile.lanes))
    return builder.fpext(builder.bitcast(codes, ir.VectorType(ir.HalfType(), tile.lanes)), tile.floats)


def _upper_half(builder: ir.IRBuilder, tile: Tile, half: int, words: ir.Value) -> ir.Value:
    """A bfloat16 is the upper half of a float32."""
    if half == 0:
        return builder.bitcast(builder.shl(words, _ir.fill(words.type, 16)), tile.floats)
    return builder.bitcast(builder.and_(words, _ir.fill(words.type, 0xFFFF0000)), tile.floats)


def _multiply_add(builder: ir.IRBuilder, tile: Tile, row: ir.Value, weights: ir.Value, acc: ir.Value) -> ir.Value:
    if tile.kind in INTEGERS:
        return _ir.call(builder, "llvm.x86.avx512.vpdpbusd.512", tile.words, [acc, weights, row])
    if tile.kind == "dot" or (tile.kind in _spread.BITS and not tile.is_wide):
        pairs = ir.VectorType(_ir.BFloat(), 2 * tile.lanes)
        operands = [acc, builder.bitcast(row, pairs), builder.bitcast(weights, pairs)]
        return _ir.call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", tile.floats, operands)
    row = builder.bitcast(row, tile.floats)
    if tile.fused:
        return _ir.fma(builder, row, weights, acc)
    return builder.fadd(builder.fmul(row, weights), acc)


def _either(builder: ir.IRBuilder, kind: ir.Type, *incoming: tuple[ir.Value, ir.Block]) -> ir.Value:
    phi = builder.phi(kind)
    for value, block in incoming:
        phi.add_incoming(value, block)
    return phi
