"""
What kernels in Python may use on the device: `cuda` itself, and what `cuda` lacks.

The one file that imports Numba's CUDA target; it is imported when a kernel is compiled, not when one is launched.
Kernel files take everything from here, so that a simulator may stand in: pointers become arrays there and the
functions below plain Python. Warp functions are collective: all 32 lanes of a warp call them together.
"""

import contextlib
import warnings

import numpy as np
from llvmlite import ir

_added = not hasattr(np, "row_stack")
if _added:  # numba-cuda 0.30 asks for a name that NumPy 2.5 dropped
    np.row_stack = np.vstack  # noqa: NPY201
try:
    with warnings.catch_warnings():  # and it counts time without units, which NumPy 2.5 deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        from numba import cuda as cuda  # noqa: PLC0414  kernel files have it from here
        from numba.cuda import types
        from numba.cuda.core import targetconfig
        from numba.cuda.extending import intrinsic
        from numba.cuda.typing import signature

        with contextlib.suppress(ImportError):
            import numba.cuda.np.arrayobj  # noqa: F401  registers its overloads while the name exists
finally:
    if _added:
        del np.row_stack  # noqa: NPY201

I32, I64 = ir.IntType(32), ir.IntType(64)
EVERY_LANE = 0xFFFFFFFF

# what the parameters of a kernel are annotated with: numbers, addresses, and what stands for the address of a type
# that the constant of this name chooses
Int32, Int64 = types.int32, types.int64
Int32s, Int64s = types.CPointer(types.int32), types.CPointer(types.int64)
Ids, Counts, Units = types.Opaque("ID"), types.Opaque("COUNT"), types.Opaque("UNIT")

# put into its caller before types are known: no calling convention, and no device is asked for
inlined = cuda.jit(device=True, inline="always")


def _statement(text, clobbered="", since=(0, 0)):
    """An intrinsic without arguments that emits `text`, or nothing for GPUs older than `since`."""

    def typed(typingctx):
        def emit(context, builder, sig, args):
            if targetconfig.ConfigStack().top().compute_capability[:2] >= since:
                builder.asm(ir.FunctionType(ir.VoidType(), []), text, clobbered, [], True)
            return context.get_dummy_value()

        return signature(types.none), emit

    return intrinsic(typed)


# kernels of one stream that overlap: the rules are those of overlap.cuh
wait_for_previous = _statement("griddepcontrol.wait;", "~{memory}", since=(9, 0))
let_next_start = _statement("griddepcontrol.launch_dependents;", "~{memory}", since=(9, 0))

keep_rolled = _statement(r".pragma \22nounroll\22;")  # in a loop: the assembler unrolls it otherwise


@intrinsic
def keep_small(typingctx):
    """In a kernel: the compiler unrolls no loop. Code is fetched from memory at the first run, a line at a time."""

    def emit(context, builder, sig, args):
        builder.function.attributes.add("optsize")
        return context.get_dummy_value()

    return signature(types.none), emit


@intrinsic
def pointer(typingctx, array):
    """Address of an array's first element; unlike the array it does not ask whether an index is negative."""

    def emit(context, builder, sig, args):
        return context.make_array(sig.args[0])(context, builder, args[0]).data

    return signature(types.CPointer(array.dtype), array), emit


@intrinsic
def divide(typingctx, a, b):
    """``a // b`` of numbers in 0..2**32-1, b > 0, in 32 bits; Python's own is a call of 64 bits."""

    def emit(context, builder, sig, args):
        return builder.zext(builder.udiv(*args), I64)

    return signature(types.int64, types.uint32, types.uint32), emit


@intrinsic
def is_less(typingctx, a, b):
    """1 if ``a < b``, of int32, else 0."""

    def emit(context, builder, sig, args):
        return builder.zext(builder.icmp_signed("<", *args), I64)

    return signature(types.int64, types.int32, types.int32), emit


@intrinsic
def add_to(typingctx, target, index, value):
    """``target[index] += value`` in one step, for int32."""

    def emit(context, builder, sig, args):
        builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), args[2], "monotonic")
        return context.get_dummy_value()

    return signature(types.none, target, types.int64, types.int32), emit


# -- 16 bytes in one access ---------------------------------------------------------------------------


def chosen_type(annotation, constants):
    """The type of a parameter under these constants."""
    if not isinstance(annotation, types.Opaque):
        return annotation
    name = constants[annotation.name]
    return types.CPointer(types.UniTuple(types.uint64, 2) if name == "bytes16" else getattr(types, name))


def _group(builder, address, index, element, count):
    """Address of the `index`-th `count` elements, as a vector."""
    first = builder.gep(address, [builder.mul(index, ir.Constant(I64, count))])
    return builder.bitcast(first, ir.VectorType(element, count).as_pointer())


def _store_group(builder, address, values):
    vector = ir.Constant(address.type.pointee, ir.Undefined)
    for lane, value in enumerate(values):
        vector = builder.insert_element(vector, value, ir.Constant(I32, lane))
    builder.store(vector, address, align=16)


@intrinsic
def store_four(typingctx, target, index, a, b, c, d):
    """``target[4 * index : 4 * index + 4] = a, b, c, d``, int32, the target aligned to 16 bytes."""

    def emit(context, builder, sig, args):
        _store_group(builder, _group(builder, args[0], args[1], I32, 4), args[2:])
        return context.get_dummy_value()

    return signature(types.none, target, types.int64, *[types.int32] * 4), emit


@intrinsic
def load_unit(typingctx, source, index):
    """``source[index]``, of 16 bytes too."""

    def emit(context, builder, sig, args):
        if not isinstance(source.dtype, types.UniTuple):
            return builder.load(builder.gep(*args[:1], args[1:]))
        first = builder.bitcast(args[0], I64.as_pointer())
        both = builder.load(_group(builder, first, args[1], I64, 2), align=16)
        pair = ir.Constant(context.get_value_type(source.dtype), ir.Undefined)
        for lane in range(2):
            pair = builder.insert_value(pair, builder.extract_element(both, ir.Constant(I32, lane)), lane)
        return pair

    return signature(source.dtype, source, types.int64), emit


@intrinsic
def store_unit(typingctx, target, index, unit):
    """``target[index] = unit``, of 16 bytes too."""

    def emit(context, builder, sig, args):
        if isinstance(target.dtype, types.UniTuple):
            first = builder.bitcast(args[0], I64.as_pointer())
            values = [builder.extract_value(args[2], lane) for lane in range(2)]
            _store_group(builder, _group(builder, first, args[1], I64, 2), values)
        else:
            builder.store(args[2], builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return signature(types.none, target, types.int64, target.dtype), emit


# -- a warp --------------------------------------------------------------------------------------------


@intrinsic
def count_bits(typingctx, mask):
    """How many bits of a 32-bit mask are set."""

    def emit(context, builder, sig, args):
        return builder.zext(builder.ctpop(args[0]), I64)

    return signature(types.int64, types.int32), emit


@inlined
def count_below(mask):
    """How many lanes of `mask` lie below the own one."""
    return count_bits(types.int32(mask & cuda.lanemask_lt()))


@inlined
def same_in_warp(value):
    """The lanes that hold the same int32, as a mask."""
    return cuda.match_any_sync(EVERY_LANE, types.int32(value))


@inlined
def from_lane(value, lane):
    """The int32 that another lane holds."""
    return cuda.shfl_sync(EVERY_LANE, types.int32(value), lane)


@inlined
def _from_below(value, step):
    """What the lane `step` below holds, an int64; 0 if there is none."""
    other = cuda.shfl_up_sync(EVERY_LANE, value, step)
    return other if cuda.laneid >= step else np.int64(0)


@inlined
def sum_up_to_lane(value):
    """Sum of an int64 over the lanes up to and including the own one."""
    total = np.int64(value)
    total += _from_below(total, 1)
    total += _from_below(total, 2)
    total += _from_below(total, 4)
    total += _from_below(total, 8)
    total += _from_below(total, 16)
    return total


@inlined
def sync_warp():
    """Wait for the other lanes; what they wrote is visible after."""
    cuda.syncwarp()


def _reduction(operation):
    """An intrinsic that combines an int32 over the warp; every lane gets the result, as an int64."""

    def typed(typingctx, value):
        def emit(context, builder, sig, args):
            call = builder.asm(
                ir.FunctionType(I32, [I32]), f"redux.sync.{operation} $0, $1, 0xffffffff;", "=r,r", args, True
            )
            call.attributes.add("convergent")  # must not be moved into a branch or copied
            return builder.sext(call, I64)

        return signature(types.int64, types.int32), emit

    return intrinsic(typed)


sum_of_warp = _reduction("add.s32")
or_of_warp = _reduction("or.b32")
