"""Small pieces of machine code that Numba has no spelling for."""

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cumoe.cpu import _ir
from cumoe.cpu._ir import constant, pointer


@intrinsic
def next_task(typing_context, counter):
    """Take the number at address `counter` and add one to it, as one indivisible step."""

    def codegen(context, builder, signature, arguments):
        return builder.atomic_rmw("add", pointer(builder, arguments[0]), constant(1), "monotonic")

    return types.int64(types.int64), codegen


@functools.cache
def transpose(lanes: int) -> Any:
    """Emit (source, source_stride, target, target_stride): a square of lanes x lanes words, rows to columns."""

    @intrinsic
    def transpose_words(typing_context, source, source_stride, target, target_stride):
        def codegen(context, builder, signature, arguments):
            source, source_stride, target, target_stride = arguments
            words = ir.VectorType(ir.IntType(32), lanes)
            rows = [
                _ir.load(builder, builder.add(source, builder.mul(source_stride, constant(r))), words)
                for r in range(lanes)
            ]
            for row, values in enumerate(_ir.transposed(builder, rows)):
                _ir.store(builder, values, builder.add(target, builder.mul(target_stride, constant(row))))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    transpose_words.__qualname__ = f"transpose-{lanes}"
    return transpose_words
