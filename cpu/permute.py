"""
Sort the (token, choice) pairs by expert, and gather rows into that order.

Pair = t * k + j. Rows are the pairs of expert 0 in ascending order, then those of expert 1, and so on:
a counting sort, stable, and the same for every number of threads.
"""

import numba
import numpy as np

from cumoe.cpu import _recorder
from cumoe.cpu import rows as row_loop
from cumoe.cpu._jit import jit

_PARALLEL_PAIRS = 50_000  # below this, waking the threads costs more than it saves


def sort_by_expert(
    topk_ids, expert_map, expert_first_token_offset, permuted_idx, inv_permuted_idx, schedule=None, block_rows=0
):
    """
    Fill the three outputs from `topk_ids` (T, k).

    `expert_map` (E,) int32 gives local experts, < 0 elsewhere; with length 0 every expert is local. An id
    outside 0..E-1 or mapped below 0 is skipped: its `inv_permuted_idx` is -1. `expert_first_token_offset`
    is int64 (E_l + 1,); `permuted_idx` is int32 (T*k,), with T*k in every row that no pair fills. `schedule`
    and `block_rows` are for the GPU side.
    """
    arrays = (
        topk_ids.reshape(-1),
        expert_map,
        expert_first_token_offset,
        permuted_idx,
        inv_permuted_idx.reshape(-1),
    )
    recorder = _recorder.current()
    if recorder is not None:
        recorder.first(_sort, *arrays)
    elif topk_ids.size < _PARALLEL_PAIRS:
        _sort(*arrays)
    else:
        _sort_blocks(*arrays, numba.get_num_threads())


def schedule_size(num_pairs, num_experts, block_rows):
    """Elements of the `schedule` of `sort_by_expert`: none on the CPU."""
    return 0


def list_tiles(expert_first_token_offset, schedule, block_rows):
    """Fill `schedule` from given offsets: nothing on the CPU."""


@jit()
def local_expert(expert, expert_map, num_local):
    """The local number of a global expert id, or -1."""
    if expert_map.size == 0:
        return expert if 0 <= expert < num_local else -1
    if not 0 <= expert < expert_map.size:
        return -1
    mapped = np.int64(expert_map[expert])
    return mapped if 0 <= mapped < num_local else -1


@jit()
def _sort(ids, expert_map, offsets, permuted_idx, inv_permuted_idx):
    num_local = offsets.size - 1
    offsets[:] = 0
    for pair in range(ids.size):
        e = local_expert(np.int64(ids[pair]), expert_map, num_local)
        if e >= 0:
            offsets[e + 1] += 1
    for e in range(num_local):
        offsets[e + 1] += offsets[e]
    next_row = offsets.copy()
    for pair in range(ids.size):
        e = local_expert(np.int64(ids[pair]), expert_map, num_local)
        if e < 0:
            inv_permuted_idx[pair] = -1
            continue
        permuted_idx[next_row[e]] = pair
        inv_permuted_idx[pair] = next_row[e]
        next_row[e] += 1
    permuted_idx[offsets[num_local] :] = ids.size


@jit(parallel=True)
def _sort_blocks(ids, expert_map, offsets, permuted_idx, inv_permuted_idx, num_blocks):
    num_local = offsets.size - 1
    length = -(-ids.size // num_blocks)
    next_row = np.zeros((num_blocks, num_local), np.int64)
    for b in numba.prange(num_blocks):
        for pair in range(b * length, min((b + 1) * length, ids.size)):
            e = local_expert(np.int64(ids[pair]), expert_map, num_local)
            if e >= 0:
                next_row[b, e] += 1
    row = np.int64(0)
    for e in range(num_local):
        offsets[e] = row
        for b in range(num_blocks):  # block order is pair order: the sort stays stable
            count = next_row[b, e]
            next_row[b, e] = row
            row += count
    offsets[num_local] = row
    for b in numba.prange(num_blocks):
        for pair in range(b * length, min((b + 1) * length, ids.size)):
            e = local_expert(np.int64(ids[pair]), expert_map, num_local)
            if e < 0:
                inv_permuted_idx[pair] = -1
                continue
            permuted_idx[next_row[b, e]] = pair
            inv_permuted_idx[pair] = next_row[b, e]
            next_row[b, e] += 1
    permuted_idx[row:] = ids.size


def sort_by_expert_aligned(
    topk_ids, expert_map, expert_num_tokens, m_indices, permuted_idx, inv_permuted_idx, alignment
):
    """
    Sort like `sort_by_expert`, each expert's rows starting at a multiple of `alignment`.

    `m_indices` int32 (M_sum,) is the expert of each row, -1 in padding; `permuted_idx` int32 (M_sum,) its
    pair, T*k in padding; `expert_num_tokens` int32 (E_l,) how many rows of an expert are not padding.
    """
    offsets = np.empty(expert_num_tokens.size + 1, np.int64)
    dense_idx = np.empty(topk_ids.size, np.int32)
    sort_by_expert(topk_ids, expert_map, offsets, dense_idx, inv_permuted_idx)
    flat_inv = inv_permuted_idx.reshape(-1)
    _spread(offsets, dense_idx, expert_num_tokens, m_indices, permuted_idx, flat_inv, alignment)


@jit()
def _spread(offsets, dense_idx, expert_num_tokens, m_indices, permuted_idx, inv_permuted_idx, alignment):
    m_indices[:] = -1
    permuted_idx[:] = dense_idx.size
    first = np.int64(0)
    for e in range(expert_num_tokens.size):
        count = offsets[e + 1] - offsets[e]
        expert_num_tokens[e] = count
        for i in range(count):
            pair = dense_idx[offsets[e] + i]
            m_indices[first + i] = e
            permuted_idx[first + i] = pair
            inv_permuted_idx[pair] = first + i
        first += -(-count // alignment) * alignment


def gather_rows(source, permuted_idx, out, top_k):
    """``out[r] = source[permuted_idx[r] // top_k]``, bytes both; a row without a pair is left as it is."""
    # to copy four bytes counts like one number of other row loops
    row_loop.run(_gather, len(out), out.size // 4, (source, permuted_idx, out, top_k))


@jit()
def copy_bytes(source, out):
    """Copy between two vectors; a function of its own, so that it becomes vector code."""
    for i in range(source.size):
        out[i] = source[i]


def _gather(first, last, arguments):
    source, permuted_idx, out, top_k = arguments
    for r in range(first, last):
        t = permuted_idx[r] // top_k
        if t < source.shape[0]:
            copy_bytes(source[t], out[r])
