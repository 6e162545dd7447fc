"""
Codes of weights to pairs of bfloat16 within registers, and their scales to float32.

A step of a panel holds two k of 64 columns, four registers of pairs. How it lies in memory (`coded_panels` packs it):

    4 bits  32 words of 16 bits: word 2 c + p has, in its nibble v, the code of column 16 v + c at k + p
    8 bits  byte 64 j + 16 q + 8 h + 2 c + p is the code of column 16 (2 j + h) + 4 q + c at k + p

Numbers come from tables by their codes: 16 of them twice, so that the bits above a nibble do no harm, or the upper and
the lower bytes of 128, to which the sign is added. int8 is stored as sign and size; -128 takes the place of -0.
"""

import functools
from typing import Any

import ml_dtypes
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cumoe.cpu import _ir
from cumoe.cpu._ir import constant

BITS = {"int4": 4, "e2m1": 4, "fp8": 8, "int8": 8}
SCALE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "e8m0": 1, "e4m3": 1}

_NUMBERS = {
    "int4": np.arange(-8, 8),
    "e2m1": np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn),
    "fp8": np.arange(128, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
    "int8": np.arange(128),
}
_BYTES = ir.VectorType(ir.IntType(8), 64)
_HALVES = ir.VectorType(ir.IntType(16), 32)
_WORDS = ir.VectorType(ir.IntType(32), 16)


def _table(vector: ir.VectorType, numbers: np.ndarray) -> ir.Constant:
    return ir.Constant(vector, [ir.Constant(vector.element, int(number)) for number in numbers])


def pairs(builder: ir.IRBuilder, rule: str, address: ir.Value, origins: list[ir.Value] | None) -> list[ir.Value]:
    """Four registers of words, each a pair of numbers of one column; int4 may count from `origins`."""
    if origins is not None:
        return _above(builder, address, origins)
    codes = _NUMBERS[rule].astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    if BITS[rule] == 4:
        table, packed = _table(_HALVES, np.tile(codes, 2)), _ir.load(builder, address, _HALVES)
        shifted = [builder.lshr(packed, _ir.fill(_HALVES, 4 * v)) if v else packed for v in range(4)]
        found = [_ir.call(builder, "llvm.x86.avx512.permvar.hi.512", _HALVES, [table, one]) for one in shifted]
        return [builder.bitcast(one, _WORDS) for one in found]
    upper, lower = codes >> 8, codes & 0xFF
    found = []
    for j in range(2):
        packed = _ir.load(builder, builder.add(address, constant(64 * j)), _BYTES)
        sign = builder.and_(packed, _ir.fill(_BYTES, 0x80))
        high = builder.or_(_looked_up(builder, packed, upper), sign)
        if rule == "int8":
            is_least = builder.icmp_unsigned("==", packed, _ir.fill(_BYTES, 0x80))
            high = builder.select(is_least, _ir.fill(_BYTES, 0xC3), high)
        low = _looked_up(builder, packed, lower)
        for h in range(2):
            order = [16 * q + 8 * h + b + 64 * byte for q in range(4) for b in range(8) for byte in range(2)]
            mask = ir.Constant(ir.VectorType(_ir.I32, 64), [ir.Constant(_ir.I32, i) for i in order])
            found.append(builder.bitcast(builder.shuffle_vector(low, high, mask), _WORDS))
    return found


def origins(builder: ir.IRBuilder, address: ir.Value) -> list[ir.Value]:
    """Four registers of 16 less the zero points, which are bytes at `address`, both halves of a word alike."""
    found = []
    for v in range(4):
        zeros = _ir.load(builder, builder.add(address, constant(16 * v)), ir.VectorType(ir.IntType(8), 16))
        words = builder.sub(_ir.fill(_WORDS, 16), builder.zext(zeros, _WORDS))
        found.append(builder.bitcast(builder.or_(words, builder.shl(words, _ir.fill(_WORDS, 16))), _HALVES))
    return found


def _above(builder: ir.IRBuilder, address: ir.Value, origins: list[ir.Value]) -> list[ir.Value]:
    """Pairs of differences between codes of four bits and their zero points: -15 to 15, from a table of 32."""
    table = _table(_HALVES, np.arange(-16, 16).astype(ml_dtypes.bfloat16).view(np.uint16))
    packed, found = _ir.load(builder, address, _HALVES), []
    for v, origin in enumerate(origins):
        code = builder.and_(builder.lshr(packed, _ir.fill(_HALVES, 4 * v)), _ir.fill(_HALVES, 15))
        index = builder.add(code, origin)
        number = _ir.call(builder, "llvm.x86.avx512.permvar.hi.512", _HALVES, [table, index])
        found.append(builder.bitcast(number, _WORDS))
    return found


def _looked_up(builder: ir.IRBuilder, indices: ir.Value, table: np.ndarray) -> ir.Value:
    """Elements of a table of 128 bytes, by the low seven bits."""
    halves = [_table(_BYTES, part) for part in np.split(table, 2)]
    return _ir.call(builder, "llvm.x86.avx512.vpermi2var.qi.512", _BYTES, [halves[0], indices, halves[1]])


def nibbles(builder: ir.IRBuilder, address: ir.Value, words: ir.VectorType) -> list[ir.Value]:
    """Four registers of bytes; byte 64 j + i holds byte i of registers 2 j and 2 j + 1."""
    found, mask = [], _ir.fill(words, 0x0F0F0F0F)
    for j in range(2):
        packed = _ir.load(builder, builder.add(address, constant(64 * j)), words)
        found.append(builder.and_(packed, mask))
        found.append(builder.and_(builder.lshr(packed, _ir.fill(words, 4)), mask))
    return found


def scales(builder: ir.IRBuilder, kind: str, address: ir.Value, floats: ir.VectorType) -> ir.Value:
    """A register of scales as float32."""
    if kind == "float32":
        return _ir.load(builder, address, floats)
    words = ir.VectorType(_ir.I32, floats.count)
    if kind == "float16":
        return builder.fpext(_ir.load(builder, address, ir.VectorType(ir.HalfType(), floats.count)), floats)
    stored = ir.IntType(8 * SCALE_BYTES[kind])
    codes = builder.zext(_ir.load(builder, address, ir.VectorType(stored, floats.count)), words)
    if kind == "bfloat16":
        return builder.bitcast(builder.shl(codes, _ir.fill(words, 16)), floats)
    if kind == "e8m0":  # 2**(code - 127); code 0 lies below the normal numbers, 255 is NaN
        number = builder.shl(codes, _ir.fill(words, 23))
        least, nan = _ir.fill(words, 0x00400000), _ir.fill(words, 0x7FC00000)
        number = builder.select(builder.icmp_unsigned("==", codes, _ir.fill(words, 0)), least, number)
        number = builder.select(builder.icmp_unsigned("==", codes, _ir.fill(words, 255)), nan, number)
        return builder.bitcast(number, floats)
    # e4m3 has the exponents of float16 but for their bias; its NaN would become 480
    size = builder.and_(codes, _ir.fill(words, 0x7F))
    sign = builder.shl(builder.and_(codes, _ir.fill(words, 0x80)), _ir.fill(words, 8))
    half = builder.or_(builder.shl(size, _ir.fill(words, 7)), sign)
    half = builder.select(builder.icmp_unsigned("==", size, _ir.fill(words, 0x7F)), _ir.fill(words, 0x7E00), half)
    narrow = builder.trunc(half, ir.VectorType(ir.IntType(16), floats.count))
    wide = builder.fpext(builder.bitcast(narrow, ir.VectorType(ir.HalfType(), floats.count)), floats)
    return builder.fmul(wide, ir.Constant(floats, [ir.Constant(floats.element, 256.0)] * floats.count))


@functools.cache
def spread(rule: str, scale: str, has_zeros: bool) -> Any:
    """
    Emit (source, steps, target, group steps): steps of codes to steps of pairs, 256 bytes each.

    With a `scale`, a dtype, the scales of a group stay before it; its zero points are used, and do not.
    """

    @intrinsic
    def spread_steps(typing_context, source, steps, target, group_steps):
        def codegen(context, builder, signature, arguments):
            source, steps, target, group_steps = arguments
            if not scale:
                _emit_spread(builder, rule, source, target, steps, None)
                return context.get_dummy_value()
            groups = builder.sdiv(builder.add(steps, builder.sub(group_steps, constant(1))), group_steps)
            scale_bytes = 64 * SCALE_BYTES[scale]
            group_bytes = scale_bytes + 64 * has_zeros
            with cgutils.for_range(builder, groups) as group:
                first = builder.mul(group.index, group_steps)
                left = builder.sub(steps, first)
                count = builder.select(builder.icmp_signed("<", left, group_steps), left, group_steps)
                read = _place(builder, source, first, 16 * BITS[rule], group.index, group_bytes)
                write = _place(builder, target, first, 256, group.index, scale_bytes)
                for line in range(0, scale_bytes, 64):
                    scales = _ir.load(builder, _behind(builder, read, line), _BYTES)
                    _ir.store(builder, scales, _behind(builder, write, line))
                own = origins(builder, _behind(builder, read, scale_bytes)) if has_zeros else None
                codes, numbers = _behind(builder, read, group_bytes), _behind(builder, write, scale_bytes)
                _emit_spread(builder, rule, codes, numbers, count, own)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    spread_steps.__qualname__ = f"spread-{rule}-{scale}-{has_zeros}"
    return spread_steps


def _behind(builder: ir.IRBuilder, address: ir.Value, num_bytes: int) -> ir.Value:
    return builder.add(address, constant(num_bytes))


def _place(
    builder: ir.IRBuilder, start: ir.Value, step: ir.Value, step_bytes: int, group: ir.Value, group_bytes: int
) -> ir.Value:
    """Where a group begins that has so many steps and groups before it."""
    steps = builder.mul(step, constant(step_bytes))
    return builder.add(start, builder.add(steps, builder.mul(group, constant(group_bytes))))


def _emit_spread(
    builder: ir.IRBuilder, rule: str, source: ir.Value, target: ir.Value, steps: ir.Value, own: Any
) -> None:
    with cgutils.for_range(builder, steps) as step:
        read = builder.add(source, builder.mul(step.index, constant(16 * BITS[rule])))
        write = builder.add(target, builder.mul(step.index, constant(256)))
        for v, words in enumerate(pairs(builder, rule, read, own)):
            _ir.store(builder, words, builder.add(write, constant(64 * v)))
