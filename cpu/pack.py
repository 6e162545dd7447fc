"""
Operands in the order in which a micro-kernel reads them (layouts: microkernel.py).

Weights become panels, once in `prepare` or panel by panel during a call; rows of activations are
gathered, scaled and padded into a block that stays in the cache.
"""

import functools

import numpy as np

from cumoe.cpu import _intrinsics, coded_panels, microkernel
from cumoe.cpu import rows as row_loop
from cumoe.cpu._jit import jit
from cumoe.cpu.bits import CODECS


def kernel_names():
    """Names of all micro-kernels of this side, fastest first."""
    return tuple(microkernel.NEEDS)


def refusal(kernel, dtype, hidden_size, intermediate_size, aligned, scaled):
    """Why the micro-kernel `kernel` cannot multiply weights of `dtype` here; None if it can. It takes all sizes."""
    return microkernel.refusal(kernel, dtype)


def best_kernel(dtype, hidden_size, intermediate_size, aligned, scaled, coded=False):
    """Name of the fastest micro-kernel here for weights of `dtype`, or for codes."""
    return next(
        (name for name in microkernel.names(dtype) if coded and multiplies_codes(name)), microkernel.names(dtype)[0]
    )


def multiplies_codes(kernel):
    """Whether the micro-kernel `kernel` reads packed codes."""
    return kernel in coded_panels.KERNELS


def refused_kernels(dtype, hidden_size, intermediate_size, aligned, scaled):
    """Why each faster micro-kernel is not used."""
    reasons = (microkernel.refusal(name, dtype) for name in microkernel.NEEDS)
    return tuple(reason for reason in reasons if reason)


def same_layout(kernel, other):
    """Whether weights packed for one micro-kernel serve the other too."""
    return kernel == other


def panel_shape(weights_shape, dtype, kernel, gated):
    """Shape of the packed form of weights (E, N, K): (E, panels, blocks, words of a block, pair)."""
    experts, n, k = weights_shape
    kernel = microkernel.choose(dtype, kernel)
    outputs, per_panel = (n // 2, kernel.columns // 2) if gated else (n, kernel.columns)
    words = -(-k // kernel.k_step) * kernel.k_step // kernel.pair
    block = kernel.block_words * kernel.block_columns
    return experts, -(-outputs // per_panel), words * kernel.columns // block, block, kernel.pair


def pack_weights(weights, dtype, kernel, gated, interleaved, out):
    """Pack (E, N, K) into `out` of `panel_shape`; `dtype` names what the bits of `weights` mean."""
    arguments = weights, *row_order(weights.shape[1], gated, interleaved), out
    packer = pack_panel(microkernel.choose(dtype, kernel))
    row_loop.run(_pack_panels, out.shape[0] * out.shape[1], out.size, arguments, pack=packer)


def pack_codes(codes, weight_format, k, gated, interleaved):
    """Codes of K columns and their format in memory of their own, packed if a micro-kernel here multiplies codes."""
    made = coded_panels.layout(weight_format, k, best_kernel("float32", 0, 0, True, False, True))
    if made is None:
        arrays = {name: array.copy() for name, array in weight_format._asdict().items() if hasattr(array, "shape")}
        return codes.copy(), weight_format._replace(**arrays)
    made, scale = coded_panels.narrowed(made, weight_format.scale)
    out = np.empty(coded_panels.panel_shape(made, codes.shape, k, gated), np.uint8)
    order = row_order(codes.shape[1], gated, interleaved)
    coded_panels.pack_weights(codes, weight_format._replace(scale=scale), made, k, gated, order, out)
    nothing = np.empty((0, 0, 0), weight_format.scale.dtype)
    return out, weight_format._replace(scale=nothing, zero_points=None, panels=made)


def row_order(n, gated, interleaved):
    """(first gate row, first up row, distance of neighbours, outputs); up = -1: there is no gate."""
    if not gated:
        return 0, -1, 1, n
    return (0, 1, 2, n // 2) if interleaved else (0, n // 2, 1, n // 2)


@functools.cache
def pack_panel(kernel):
    """The compiled packer of one panel for `kernel`."""
    return jit(
        inner=True,
        columns=kernel.columns,
        block_words=kernel.block_words,
        block_columns=kernel.block_columns,
        lanes=kernel.lanes,
        pair=kernel.pair,
        transpose=_intrinsics.transpose(kernel.lanes),
    )(_pack_panel)


@functools.cache
def pack_rows(kernel, dtype):
    """The compiled gatherer of activations of `dtype` for `kernel`."""
    load, store = CODECS[dtype]
    as_row = CODECS["float32"][0] if kernel.row_dtype == dtype else load
    template = _pack_rows if kernel.row_group == 1 else _pack_row_groups
    return jit(inner=True, load=load, store=store, as_row=as_row)(template)


@jit()
def _place(word, column, columns, block_words, block_columns):
    """Where a panel has the word `word` of `column`."""
    block = word // block_words * (columns // block_columns) + column // block_columns
    return (block * block_words + word % block_words) * block_columns + column % block_columns


# ---- templates; jit(...) gives the names below their values ----

columns = block_words = block_columns = lanes = pair = 0
transpose = load = store = as_row = pack = None


def _pack_panels(first, last, arguments):
    weights, first_gate, first_up, distance, outputs, out = arguments
    panels = out.shape[1]
    flat = out.reshape(out.shape[0] * panels, out.shape[2] * out.shape[3] * out.shape[4])
    for job in range(first, last):
        pack(weights, job // panels, job % panels, first_gate, first_up, distance, outputs, flat[job])


def _pack_panel(weights, expert, panel, first_gate, first_up, distance, outputs, target):
    """Panel `panel`: the gate rows of its outputs, then their up rows; or plain rows. Padding is zero."""
    k_size = weights.shape[2]
    k_padded = target.size // columns
    word_bytes = pair * weights.itemsize
    side = columns if first_up < 0 else columns // 2
    for c0 in range(0, columns, lanes):
        first = first_gate if c0 < side else first_up
        i0 = panel * side + c0 % side
        k_done = 0
        if i0 + lanes <= outputs:
            words = k_size // pair // lanes * lanes
            k_done = words * pair
            source = weights.ctypes.data + expert * weights.strides[0] + (first + i0 * distance) * weights.strides[1]
            for word in range(0, words, lanes):
                transpose(
                    source + word * word_bytes,
                    distance * weights.strides[1],
                    target.ctypes.data + _place(word, c0, columns, block_words, block_columns) * word_bytes,
                    block_columns * word_bytes,
                )
        for c in range(c0, c0 + lanes):
            i = i0 + c - c0
            for k in range(k_done, k_padded):
                value = weights[expert, first + i * distance, k] if i < outputs and k < k_size else 0
                target[_place(k // pair, c, columns, block_words, block_columns) * pair + k % pair] = value


def _pack_rows(x, permuted_idx, top_k, scale, row0, rows, k_padded, target):
    """``target[r] = x[source of row0 + r] (* scale of the pair, rounded to the dtype of x)``, zeros up to k_padded."""
    k_size = x.shape[1]
    for r in range(rows):
        pair_id = np.int64(permuted_idx[row0 + r]) if permuted_idx.size else row0 + r
        line = x[pair_id // top_k if top_k else row0 + r]
        row = target[r * k_padded : (r + 1) * k_padded]  # an index from 0 on: LLVM sees that none is negative
        if scale.size:
            factor = scale[pair_id]
            for k in range(k_size):
                row[k] = as_row(store(load(line[k]) * factor))
        else:
            for k in range(k_size):
                row[k] = as_row(line[k])
        row[k_size:] = 0


def _pack_row_groups(x, permuted_idx, top_k, scale, row0, rows, k_padded, target):
    """The same into groups of 16 rows: (group, k / 32, row in group, 32)."""
    k_size = x.shape[1]
    whole = k_size // 32
    for r in range(rows):
        pair_id = np.int64(permuted_idx[row0 + r]) if permuted_idx.size else row0 + r
        line = x[pair_id // top_k if top_k else row0 + r]
        base = r // 16 * 16 * k_padded + r % 16 * 32
        factor = scale[pair_id] if scale.size else np.float32(1)
        for block in range(whole):
            piece = line[block * 32 : block * 32 + 32]
            if scale.size:
                for k in range(32):
                    target[base + block * 512 + k] = as_row(store(load(piece[k]) * factor))
            else:
                for k in range(32):
                    target[base + block * 512 + k] = as_row(piece[k])
        for k in range(whole * 32, k_padded):
            code = line[k] if k < k_size else 0
            if scale.size and k < k_size:
                code = store(load(code) * factor)
            target[base + k // 32 * 512 + k % 32] = as_row(code)
