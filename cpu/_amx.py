"""The AMX micro-kernel: bfloat16 on tile registers of 16 rows x 64 bytes."""

import ctypes
import functools
import platform
import sys

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cumoe.cpu import _ir
from cumoe.cpu._ir import constant, pointer

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18

_GROUP_STEP = 16 * 32 * 2  # bytes of 16 rows x 32 values of K
_PANEL_BLOCK = 16 * 16 * 4  # bytes of 16 columns x 32 values of K: one weight register, contiguous
_SUMS_STRIDE = 16 * 4  # bytes of a row of a half of the sums

# Tile registers: sums 0..3 (row group, column half), rows 4 and 5, weights 6 and 7.
_ROWS, _WEIGHTS = (4, 5), (6, 7)


@functools.cache
def permitted() -> bool:
    """Ask Linux for the tile registers, which a process may not touch before; True if it agrees."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


@intrinsic
def tile(
    typing_context, rows, a, a_stride, panel, steps, sums, half, accumulate, ahead, asked, asked_scales, group_steps,
    offsets, offsets_stride,
):  # fmt: skip
    """Up to 16 rows (one row group) or 32 (two groups, `a_stride` bytes apart) times a panel of 32 columns."""

    def codegen(context, builder, signature, arguments):
        rows, *operands = arguments[:10]
        few = builder.icmp_signed("<=", rows, constant(16))
        with builder.if_else(few) as (one_group, two_groups):
            with one_group:
                _emit(builder, [rows], *operands)
            with two_groups:
                _emit(builder, [constant(16), builder.sub(rows, constant(16))], *operands)
        return context.get_dummy_value()

    return _ir.TILE_ARGUMENTS, codegen


tile.__qualname__ = "tile-amx"


@intrinsic
def release(typing_context):
    """Give the tile registers back, so that the kernel need not save them at the next context switch."""

    def codegen(context, builder, signature, arguments):
        _ir.call(builder, "llvm.x86.tilerelease", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), codegen


release.__qualname__ = "release-amx"


def _emit(
    builder: ir.IRBuilder,
    group_rows: list[ir.Value],
    a: ir.Value,
    a_stride: ir.Value,
    panel: ir.Value,
    steps: ir.Value,
    sums: ir.Value,
    half: ir.Value,
    accumulate: ir.Value,
    ahead: ir.Value,
    asked: ir.Value,
) -> None:
    groups = range(len(group_rows))
    _configure(builder, group_rows)
    halves = sums, builder.add(sums, half)
    sums_address = {2 * g + h: builder.add(halves[h], constant(g * 16 * _SUMS_STRIDE)) for g in groups for h in (0, 1)}
    resume = builder.icmp_signed("!=", accumulate, constant(0))
    with builder.if_else(resume) as (resumed, fresh):
        with resumed:
            for register, address in sums_address.items():
                _load(builder, register, address, constant(_SUMS_STRIDE))
        with fresh:
            for register in sums_address:
                _ir.call(builder, "llvm.x86.tilezero", ir.VoidType(), [_number(register)])

    before, loop = builder.block, builder.append_basic_block("k")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(ir.IntType(64))
    step.add_incoming(constant(0), before)
    panel_step = builder.add(panel, builder.mul(step, constant(2 * _PANEL_BLOCK)))
    row_step = builder.add(a, builder.mul(step, constant(_GROUP_STEP)))
    _ir.prefetch_step(builder, ahead, step, asked, 32)
    for h in (0, 1):
        _load(builder, _WEIGHTS[h], builder.add(panel_step, constant(_PANEL_BLOCK * h)), constant(64))
    for g in groups:
        _load(builder, _ROWS[g], builder.add(row_step, builder.mul(a_stride, constant(g))), constant(64))
        for h in (0, 1):
            registers = [_number(register) for register in (2 * g + h, _ROWS[g], _WEIGHTS[h])]
            _ir.call(builder, "llvm.x86.tdpbf16ps", ir.VoidType(), registers)
    following = builder.add(step, constant(1))
    step.add_incoming(following, builder.block)
    after = builder.append_basic_block("store")
    builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)

    builder.position_at_end(after)
    for register, address in sums_address.items():
        operands = [_number(register), pointer(builder, address), constant(_SUMS_STRIDE)]
        _ir.call(builder, "llvm.x86.tilestored64", ir.VoidType(), operands)


def _configure(builder: ir.IRBuilder, group_rows: list[ir.Value]) -> None:
    """Set the shapes of the tile registers: 64 bytes a row, as many rows as are there."""
    i8, i16 = ir.IntType(8), ir.IntType(16)
    block = cgutils.alloca_once(builder, ir.ArrayType(i8, 64), name="tile_shapes")
    builder.store(ir.Constant(ir.ArrayType(i8, 64), None), block)
    address = builder.ptrtoint(block, ir.IntType(64))

    def put(offset: int, value: ir.Value) -> None:
        builder.store(value, pointer(builder, builder.add(address, constant(offset))), align=1)

    put(0, ir.Constant(i8, 1))  # palette 1: eight registers
    rows = {register: ir.Constant(i8, 16) for register in _WEIGHTS}
    for g, count in enumerate(group_rows):
        small = builder.trunc(count, i8)
        rows |= {2 * g: small, 2 * g + 1: small, _ROWS[g]: small}
    for register, count in rows.items():
        put(16 + 2 * register, ir.Constant(i16, 64))
        put(48 + register, count)
    _ir.call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), [pointer(builder, address)])


def _load(builder: ir.IRBuilder, register: int, address: ir.Value, stride: ir.Value) -> None:
    operands = [_number(register), pointer(builder, address), stride]
    _ir.call(builder, "llvm.x86.tileloadd64", ir.VoidType(), operands)


def _number(register: int) -> ir.Constant:
    return ir.Constant(ir.IntType(8), register)
