"""
What happens to a tile of sums, emitted for the vector registers of a micro-kernel: see `epilogue.py`.

A row of a tile stays in registers from its sums to its result. The operations are those of the loops in `act.py` and
`elementary.py`, or round as they do, so that the bits are the same.
"""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cumoe.cpu import _ir, elementary
from cumoe.cpu._features import cpu_features
from cumoe.cpu._ir import constant

ACTIVATIONS = ("", "silu", "swigluoai", "swigluoai_uninterleave")


class Store(NamedTuple):
    """How rows of sums become results: `activation`, the dtype of the results, and the registers of a half tile."""

    activation: str
    dtype: str
    lanes: int
    vectors: int
    is_integer: bool = False  # the sums


def can_store(activation: str, dtype: str) -> bool:
    """Whether there is one."""
    return activation in ACTIVATIONS and (dtype != "float16" or bool(cpu_features() & {"f16c", "avx512f"}))


def emit(store: Store) -> Any:
    """
    Emit (sums, half, rows, scalars, distance, columns, target, stride, alpha, beta, limit).

    Addresses, all but `rows`, bytes, and numbers: both halves of the sums are `half` bytes apart; `scalars` are the
    factors of the rows, and `distance` bytes further on their scales; `columns` the factors of all columns, then their
    biases; `target` the first row of the results, which are `stride` bytes apart.
    """

    @intrinsic
    def finish(
        typing_context, sums, half, rows, scalars, distance, columns, target, stride, alpha, beta, limit
    ):  # fmt: skip
        def codegen(context, builder, signature, arguments):
            _emit(builder, store, *arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8, *[types.float32] * 3), codegen

    finish.__qualname__ = "-".join(map(str, ("finish", *store)))
    return finish


def _emit(
    builder: ir.IRBuilder,
    store: Store,
    sums: ir.Value,
    half: ir.Value,
    rows: ir.Value,
    scalars: ir.Value,
    distance: ir.Value,
    columns: ir.Value,
    target: ir.Value,
    stride: ir.Value,
    *parameters: ir.Value,
) -> None:
    floats, vector_bytes = ir.VectorType(ir.FloatType(), store.lanes), 4 * store.lanes
    count = 2 * store.vectors
    given = [_ir.load(builder, builder.add(columns, constant(i * vector_bytes)), floats) for i in range(2 * count)]
    parameters = tuple(_ir.splat(builder, one, store.lanes) for one in parameters)
    size = 4 if store.dtype == "float32" else 2
    with cgutils.for_range(builder, rows) as row:
        at = builder.add(scalars, builder.mul(row.index, constant(4)))
        row_factor, scale = (
            _ir.splat(builder, _ir.load(builder, address, floats.element), store.lanes)
            for address in (at, builder.add(at, distance))
        )
        source = builder.add(sums, builder.mul(row.index, constant(store.vectors * vector_bytes)))
        place = builder.add(target, builder.mul(row.index, stride))
        values = []
        for i in range(count):
            start = source if i < store.vectors else builder.add(source, half)
            address = builder.add(start, constant(i % store.vectors * vector_bytes))
            if store.is_integer:
                value = builder.sitofp(_ir.load(builder, address, ir.VectorType(_ir.I32, store.lanes)), floats)
            else:
                value = _ir.load(builder, address, floats)
            value = builder.fmul(value, builder.fmul(row_factor, given[i]))
            values.append(builder.fmul(builder.fadd(value, given[count + i]), scale))
        if store.activation:
            rounded = [_widened(builder, store.dtype, _narrowed(builder, store.dtype, value)) for value in values]
            pairs = zip(rounded[: store.vectors], rounded[store.vectors :], strict=True)
            activate = _silu if store.activation == "silu" else _swigluoai
            values = [activate(builder, gate, up, *parameters) for gate, up in pairs]
        for i, value in enumerate(values):
            result = _narrowed(builder, store.dtype, value)
            address = builder.add(place, constant(i * store.lanes * size))
            builder.store(result, _ir.pointer(builder, address), align=size)


def _narrowed(builder: ir.IRBuilder, dtype: str, value: ir.Value) -> ir.Value:
    """The nearest number of `dtype`."""
    if dtype == "float32":
        return value
    lanes = value.type.count
    if dtype == "float16":
        return builder.fptrunc(value, ir.VectorType(ir.HalfType(), lanes))
    kind = ir.VectorType(_ir.I32, lanes)
    u = builder.bitcast(value, kind)
    odd = builder.and_(builder.lshr(u, _ir.fill(kind, 16)), _ir.fill(kind, 1))
    nearest = builder.add(builder.add(u, _ir.fill(kind, 0x7FFF)), odd)
    quiet = builder.or_(u, _ir.fill(kind, 0x00400000))
    bits = builder.select(builder.fcmp_unordered("uno", value, value), quiet, nearest)
    return builder.trunc(builder.lshr(bits, _ir.fill(kind, 16)), ir.VectorType(ir.IntType(16), lanes))


def _widened(builder: ir.IRBuilder, dtype: str, value: ir.Value) -> ir.Value:
    """The same number as float32."""
    if dtype == "float32":
        return value
    floats = ir.VectorType(ir.FloatType(), value.type.count)
    if dtype == "float16":
        return builder.fpext(value, floats)
    kind = ir.VectorType(_ir.I32, value.type.count)
    return builder.bitcast(builder.shl(builder.zext(value, kind), _ir.fill(kind, 16)), floats)


# ---- act.py and elementary.py, of which the names are ----


def _silu(
    builder: ir.IRBuilder, gate: ir.Value, up: ir.Value, alpha: ir.Value, beta: ir.Value, limit: ir.Value
) -> ir.Value:
    gate = _at_most(builder, gate, limit)
    return builder.fmul(builder.fmul(gate, _sigmoid(builder, gate)), _clamp(builder, up, limit))


def _swigluoai(
    builder: ir.IRBuilder, gate: ir.Value, up: ir.Value, alpha: ir.Value, beta: ir.Value, limit: ir.Value
) -> ir.Value:
    gate = _at_most(builder, gate, limit)
    soft = builder.fmul(gate, _sigmoid(builder, builder.fmul(alpha, gate)))
    return builder.fmul(builder.fadd(_clamp(builder, up, limit), beta), soft)


def _at_most(builder: ir.IRBuilder, x: ir.Value, limit: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", x, limit), limit, x)


def _at_least(builder: ir.IRBuilder, x: ir.Value, limit: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered("<", x, limit), limit, x)


def _clamp(builder: ir.IRBuilder, x: ir.Value, limit: ir.Value) -> ir.Value:
    return _at_least(builder, _at_most(builder, x, limit), builder.fneg(limit))


def _sigmoid(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    one = _float(x.type, elementary._ONE)
    return builder.fdiv(one, builder.fadd(one, _exp(builder, builder.fneg(x))))


def _exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    floats, words, e = x.type, ir.VectorType(_ir.I32, x.type.count), elementary

    def number(value: Any) -> ir.Constant:
        return _float(floats, value)

    def multiply_add(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return _ir.call(builder, f"llvm.fmuladd.v{floats.count}f32", floats, [a, b, c])

    def power_of_two(n: ir.Value) -> ir.Value:
        raised = builder.add(n, _ir.fill(words, 127))
        return builder.bitcast(builder.shl(raised, _ir.fill(words, 23)), floats)

    x = _at_least(builder, _at_most(builder, x, number(89.0)), number(-104.0))
    shifted = multiply_add(x, number(e._LOG2_E), number(e._ROUND))
    n = builder.fsub(shifted, number(e._ROUND))
    r = multiply_add(n, number(-e._LN2_HIGH), x)
    r = multiply_add(n, number(-e._LN2_LOW), r)
    q = multiply_add(r, number(e._Q4), number(e._Q3))
    for coefficient in (e._Q2, e._Q1, e._Q0):
        q = multiply_add(r, q, number(coefficient))
    above_one = multiply_add(builder.fmul(r, r), q, r)
    low = builder.fadd(above_one, number(e._ONE))
    if floats.count == 16:  # scales by any power of two at once, rounding once as the two factors do
        everywhere, current = ir.Constant(ir.IntType(16), 0xFFFF), ir.Constant(_ir.I32, 4)
        return _ir.call(builder, "llvm.x86.avx512.mask.scalef.ps.512", floats, [low, n, low, everywhere, current])
    whole = builder.sub(builder.bitcast(shifted, words), _ir.fill(words, int(e._ROUND_BITS)))
    half = builder.ashr(whole, _ir.fill(words, 1))
    return builder.fmul(builder.fmul(low, power_of_two(half)), power_of_two(builder.sub(whole, half)))


def _float(floats: ir.VectorType, value: Any) -> ir.Constant:
    return ir.Constant(floats, [ir.Constant(floats.element, float(np.float32(value)))] * floats.count)
