"""
Arguments of compiled functions as words of eight bytes in memory, from which compiled code reads them back.

An array takes its address, the bytes from the part of one thread to that of the next (0: all have the same), its
extents, and, if it is not C-contiguous, its strides. A number takes one word, a tuple those of its elements.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np import arrayobj

from cumoe.cpu import _ir
from cumoe.cpu._ir import I64, constant, pointer


class Word(NamedTuple):
    """A word: a number, or how far it lies behind the start of what `owner` names."""

    owner: int  # 0: nothing
    number: int


class Each:
    """An argument of which every thread has its part, the elements of `array` along its first axis."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array


class Address:
    """An argument that is the address of an array."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array


def kind(value: Any) -> types.Type:
    """The type of an argument for the compiler."""
    if isinstance(value, Each):
        return numba.typeof(value.array[0])
    if isinstance(value, Address):
        return types.int64
    if not isinstance(value, tuple):
        return numba.typeof(value)
    parts = [kind(part) for part in value]
    if hasattr(value, "_fields"):
        return types.NamedTuple(parts, type(value))
    return types.Tuple(parts)


def freeze(value: Any, place: Callable[[np.ndarray], Any], words: list[Any]) -> None:
    """Append the words of an argument: numbers, and for the address of an array what `place` says."""
    if isinstance(value, np.ndarray):
        words.append(place(value))
        words.append(0)
        words.extend(value.shape)
        if not value.flags.c_contiguous:
            words.extend(value.strides)
    elif isinstance(value, tuple):
        for part in value:
            freeze(part, place, words)
    elif isinstance(value, Address):
        words.append(place(value.array))
    elif isinstance(value, Each):
        words.append(place(value.array))
        words.append(value.array.strides[0])
        words.extend(value.array.shape[1:])
    elif isinstance(value, np.float32):
        words.append(int(value.view(np.uint32)))
    else:
        words.append(int(value))


@functools.cache
def thaw(frozen: types.Type) -> Any:
    """Emit (address of the words, number of the thread): the argument of type `frozen`."""

    @intrinsic
    def read(typing_context, block, thread):
        def codegen(context, builder, signature, arguments):
            return _read(context, builder, frozen, arguments[0], arguments[1], iter(range(1 << 20)))

        return frozen(types.int64, types.int64), codegen

    read.__qualname__ = f"thaw-{frozen}"
    return read


def _read(
    context: Any, builder: ir.IRBuilder, frozen: types.Type, block: ir.Value, thread: ir.Value, numbers: Iterator[int]
) -> ir.Value:
    """The value of type `frozen` from the words with the next `numbers`."""
    if isinstance(frozen, types.BaseTuple):
        parts = [_read(context, builder, part, block, thread, numbers) for part in frozen]
        return context.make_tuple(builder, frozen, parts)
    if isinstance(frozen, types.Array):
        return _read_array(context, builder, frozen, block, thread, numbers)
    word = _word(builder, block, numbers)
    if frozen == types.float32:
        return builder.bitcast(builder.trunc(word, _ir.I32), ir.FloatType())
    if frozen == types.boolean:
        return builder.icmp_signed("!=", word, constant(0))
    if frozen != types.int64:
        raise TypeError(f"no words stand for {frozen}")
    return word


def _read_array(
    context: Any, builder: ir.IRBuilder, frozen: types.Array, block: ir.Value, thread: ir.Value, numbers: Iterator[int]
) -> ir.Value:
    start, step, *shape = (_word(builder, block, numbers) for _ in range(2 + frozen.ndim))
    item = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(frozen.dtype)))
    if frozen.layout == "C":
        strides = [item]
        for extent in shape[:0:-1]:
            strides.insert(0, builder.mul(strides[0], extent))
    else:
        strides = [_word(builder, block, numbers) for _ in range(frozen.ndim)]
    array = arrayobj.make_array(frozen)(context, builder)
    data = builder.inttoptr(builder.add(start, builder.mul(step, thread)), array.data.type)
    arrayobj.populate_array(array, data=data, shape=shape, strides=strides, itemsize=item, meminfo=None)
    return array._getvalue()


def _word(builder: ir.IRBuilder, block: ir.Value, numbers: Iterator[int]) -> ir.Value:
    return builder.load(pointer(builder, builder.add(block, constant(8 * next(numbers)))), align=8, typ=I64)
