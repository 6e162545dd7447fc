"""Short spellings of LLVM IR that the micro-kernels are written in; addresses are 64-bit integers."""

from collections.abc import Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils

I32, I64 = ir.IntType(32), ir.IntType(64)

# Every micro-kernel: (rows, a, a_stride, panel, steps, sums, half, accumulate, ahead, asked, asked_scales, group_steps,
# offsets, offsets_stride). `a`, `panel`, `sums` and `ahead` are addresses, `a_stride` and `half` (from the gate sums to
# the up sums) are bytes; `accumulate` != 0 goes on from `sums`. Where weights have scales along K, those of a group of
# `group_steps` steps lie before it, columns side by side. While it multiplies, each group asks for the cache lines of
# `asked_scales` bytes and each step for those of `asked` bytes, one behind the other from `ahead` on, so that the next
# weights travel meanwhile. Of kernels in integers, `offsets` is the address of the int32 that the sums of the first row
# begin with, a group after the other; the next row's are `offsets_stride` bytes further on. Others take zeros.
TILE_ARGUMENTS = types.void(*[types.int64] * 14)


class BFloat(ir.types._BaseFloatType):
    """LLVM's bfloat, which llvmlite lacks; enough of it to name vector types."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"

    def format_constant(self, value: float) -> str:
        raise NotImplementedError("bfloat constants are never emitted")


BFloat._create_instance()


def constant(value: int) -> ir.Constant:
    """A 64-bit integer."""
    return ir.Constant(I64, value)


def fill(vector: ir.VectorType, value: int) -> ir.Constant:
    """A vector constant with one value in every lane."""
    return ir.Constant(vector, [ir.Constant(vector.element, value)] * vector.count)


def pointer(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The address as a pointer."""
    return builder.inttoptr(address, ir.PointerType())


def load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """Read a scalar or vector that is aligned to two bytes only (rows of odd length)."""
    return builder.load(pointer(builder, address), align=2, typ=kind)


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    """Write a scalar or vector of 32-bit lanes."""
    builder.store(value, pointer(builder, address), align=4)


def call(builder: ir.IRBuilder, name: str, result: ir.Type, operands: Sequence[ir.Value]) -> ir.Value:
    """Call the LLVM intrinsic `name`."""
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """``a * b + c``, rounded once."""
    return call(builder, f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])


def prefetch_step(builder: ir.IRBuilder, ahead: ir.Value, step: ir.Value, asked: ir.Value, most: int) -> None:
    """Ask for the lines of a step, of which there are at most `most`; of no bytes, for a line that is there."""
    first = builder.add(ahead, builder.mul(step, asked))
    prefetch(builder, first)
    if most > 1:
        more = builder.ashr(builder.sub(asked, constant(1)), constant(6))
        prefetch_lines(builder, builder.add(first, constant(64)), more)


def prefetch_lines(builder: ir.IRBuilder, address: ir.Value, lines: ir.Value) -> None:
    """Ask for so many lines."""
    with cgutils.for_range(builder, lines) as line:
        prefetch(builder, builder.add(address, builder.mul(line.index, constant(64))))


def prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Ask for a line for L2; where no memory is, it does no harm."""
    flags = [ir.Constant(I32, flag) for flag in (0, 2, 1)]  # read, locality 2, data
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer(builder, address), *flags])


def splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    """The scalar in every lane."""
    nothing = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(nothing, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, nothing, fill(ir.VectorType(I32, lanes), 0))


def transposed(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """
    Turn `n` vectors of `n` lanes into their columns.

    Bit s of the row number and bit s of the lane number change places, one bit after the other.
    """
    lanes = len(rows)
    mask_type = ir.VectorType(I32, lanes)
    distance = lanes // 2
    while distance:
        low_mask = [j - distance + lanes if j & distance else j for j in range(lanes)]
        high_mask = [j + lanes if j & distance else j + distance for j in range(lanes)]
        masks = [ir.Constant(mask_type, [ir.Constant(I32, j) for j in mask]) for mask in (low_mask, high_mask)]
        for i in range(lanes):
            if not i & distance:
                a, b = rows[i], rows[i + distance]
                rows[i] = builder.shuffle_vector(a, b, masks[0])
                rows[i + distance] = builder.shuffle_vector(a, b, masks[1])
        distance //= 2
    return rows


def half_to_float(builder: ir.IRBuilder, words: ir.Value, floats: ir.VectorType) -> ir.Value:
    """float16 codes in the low halves of `words` to float32, exactly, on a CPU without that conversion."""
    kind = words.type
    size = builder.and_(words, fill(kind, 0x7FFF))
    sign = builder.shl(builder.and_(words, fill(kind, 0x8000)), fill(kind, 16))
    # 2**112 moves the exponent bias from 15 to 127 and makes subnormals normal
    scale = ir.Constant(floats, [ir.Constant(floats.element, 2.0**112)] * floats.count)
    scaled = builder.fmul(builder.bitcast(builder.shl(size, fill(kind, 13)), floats), scale)
    special = builder.icmp_unsigned(">=", size, fill(kind, 0x7C00))
    infinite = builder.or_(builder.shl(size, fill(kind, 13)), fill(kind, 0x7F800000))
    value = builder.select(special, infinite, builder.bitcast(scaled, kind))
    return builder.bitcast(builder.or_(value, sign), floats)
