"""Small pieces of machine code that Numba has no spelling for."""

import functools
import platform
import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cumoe.cpu import _ir
from cumoe.cpu._ir import constant, pointer

_CPUS = 1024  # of the system's own set of them


@intrinsic
def next_task(typing_context, counter):
    """Take the number at address `counter` and add one to it, as one indivisible step."""

    def codegen(context, builder, signature, arguments):
        return builder.atomic_rmw("add", pointer(builder, arguments[0]), constant(1), "acq_rel")

    return types.int64(types.int64), codegen


@intrinsic
def word(typing_context, address):
    """The int64 at an address, with all that was written before it was."""

    def codegen(context, builder, signature, arguments):
        return builder.load_atomic(pointer(builder, arguments[0]), "acquire", 8, typ=_ir.I64)

    return types.int64(types.int64), codegen


@intrinsic
def put_word(typing_context, address, value):
    """Write an int64, behind all that was written before."""

    def codegen(context, builder, signature, arguments):
        builder.store_atomic(arguments[1], builder.inttoptr(arguments[0], ir.PointerType(_ir.I64)), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def pause(typing_context):
    """Tell the processor that this thread waits for another."""

    def codegen(context, builder, signature, arguments):
        if platform.machine().lower() in ("x86_64", "amd64"):
            _ir.call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def let_others_run(typing_context):
    """Give the rest of this thread's time slice to another, where the system has a POSIX name for that."""

    def codegen(context, builder, signature, arguments):
        if sys.platform != "win32":
            kind = ir.FunctionType(_ir.I32, [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def cpu(typing_context):
    """The number of the CPU that runs this, or -1 where the system has no name for that."""

    def codegen(context, builder, signature, arguments):
        if sys.platform != "linux":
            return constant(-1)
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_ir.I32, []), "sched_getcpu")
        return builder.sext(builder.call(function, []), _ir.I64)

    return types.int64(), codegen


@intrinsic
def move_from(typing_context, number):
    """
    Go on on another CPU than `number`, if this thread may run on one.

    The system moves a thread at once when its CPU is taken out of its mask. The mask is then set to all CPUs, so that
    it follows those of the process, and where that is not what it was, to what it was.
    """

    def codegen(context, builder, signature, arguments):
        if sys.platform == "linux":
            _move_from(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _move_from(builder: ir.IRBuilder, number: ir.Value) -> None:
    words = ir.VectorType(_ir.I64, _CPUS // 64)
    before, mask = (cgutils.alloca_once(builder, words) for _ in range(2))
    kind = ir.FunctionType(_ir.I32, [_ir.I32, _ir.I64, mask.type])
    none, size = ir.Constant(words, None), constant(_CPUS // 8)

    def system(name: str, where: ir.Value) -> ir.Value:
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(function, [ir.Constant(_ir.I32, 0), size, where])

    builder.store(none, before)
    builder.store(none, mask)
    known = builder.icmp_signed("==", system("sched_getaffinity", before), ir.Constant(_ir.I32, 0))
    with builder.if_then(builder.and_(known, builder.icmp_unsigned("<", number, constant(_CPUS)))):
        bit = builder.shl(constant(1), builder.and_(number, constant(63)))
        place = builder.trunc(builder.lshr(number, constant(6)), _ir.I32)
        others = builder.insert_element(none, bit, place)
        builder.store(builder.and_(builder.load(before), builder.not_(others)), mask)
        system("sched_setaffinity", mask)  # refused where that was the only one
        builder.store(_ir.fill(words, -1), mask)
        system("sched_setaffinity", mask)
        builder.store(none, mask)
        system("sched_getaffinity", mask)
        differs = builder.icmp_unsigned("!=", builder.load(mask), builder.load(before))
        any_differs = builder.bitcast(differs, ir.IntType(_CPUS // 64))
        with builder.if_then(builder.icmp_unsigned("!=", any_differs, ir.Constant(any_differs.type, 0))):
            system("sched_setaffinity", before)


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
