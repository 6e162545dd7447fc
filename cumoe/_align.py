"""Pairs (token, choice) in blocks of one expert each, and counts of tokens per expert."""

from typing import Any

import numpy as np

from cumoe import _arrays, _check
from cumoe._arrays import Array

_LARGEST = 2**31 - 1  # slots are int32


@_arrays.on_callers_stream
def moe_align_block_size(
    topk_ids: Array,
    block_size: int,
    num_experts: int,
    *,
    expert_map: Array | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    return_scatter_idx: bool = False,
) -> tuple[Array, ...]:
    """
    Sort the (token, choice) pairs by expert and pad each expert's share to whole blocks.

    Parameters
    ----------
    topk_ids : (T, k) array, int32, int64 or uint32
        Expert of each choice. A pair whose id is outside 0..E-1 is skipped.
    block_size : int
        Pairs in a block; a block belongs to one expert.
    num_experts : int
        E, the number of experts that ids count over.
    expert_map : (E,) int32 array, optional
        Local number of each expert, < 0 where another rank has it.
    pad_sorted_ids : bool, default False
        Round the length of `sorted_token_ids` up to whole blocks.
    ignore_invalid_experts : bool, default False
        Apply `expert_map` before the pairs are sorted, so that the pairs of other ranks are dropped.
        Otherwise they keep their blocks, and these blocks carry what the map says (-1).
    return_scatter_idx : bool, default False
        Return `scatter_idx` too.

    Returns
    -------
    sorted_token_ids : (size,) int32 array
        Pair numbers t * k + j, expert after expert, ascending within an expert; T*k in every unused slot.
    expert_ids : (ceil(size / block_size),) int32 array
        Expert of each block; -1 after the last used block.
    num_tokens_post_padded : (1,) int32 array
        Number of slots in used blocks.
    scatter_idx : (T*k, 1) int32 array
        The pair's own number, -1 if it was dropped; only with `return_scatter_idx`.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape or number that does not fit.

    Notes
    -----
    ``size = T*k + E * (block_size - 1)``, rounded up to whole blocks with `pad_sorted_ids`; if
    ``T*k < E`` at most ``T*k * block_size``. The call does not wait for the device.

    References
    ----------
    .. [1] vLLM, ``fused_moe/moe_align_block_size.py``; here the order within an expert is always stable.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> ids = np.array([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]], "int32")
    >>> sorted_token_ids, expert_ids, num_tokens_post_padded = cumoe.moe_align_block_size(ids, 4, 5)
    >>> sorted_token_ids[:16]
    array([ 3,  6,  9, 12,  0,  4, 10, 12,  1,  7, 11, 12,  2,  5,  8, 12],
          dtype=int32)
    >>> expert_ids
    array([ 1,  2,  3,  4, -1, -1, -1], dtype=int32)
    >>> num_tokens_post_padded
    array([16], dtype=int32)
    """
    side, (topk_ids, expert_map) = _arrays.enter(topk_ids=topk_ids, expert_map=expert_map)
    _check.topk_ids(topk_ids)
    block_size = _check.integer("block_size", block_size, 1, _LARGEST)
    num_experts = _check.integer("num_experts", num_experts, 1, _LARGEST)
    _check.expert_map(expert_map, num_experts)
    size = topk_ids.size + num_experts * (block_size - 1)
    if pad_sorted_ids:
        size = -(-size // block_size) * block_size
    if topk_ids.size < num_experts:
        size = min(topk_ids.size * block_size, size)
    _check.integer("T*k + E * (block_size - 1)", size, 0, _LARGEST)
    xp = side.xp
    outputs = (
        xp.empty(size, np.int32),
        xp.empty(-(-size // block_size), np.int32),
        xp.empty(1, np.int32),
        xp.empty((topk_ids.size if return_scatter_idx else 0, 1), np.int32),
    )
    _arrays.room(xp, "align").align_block_size(
        _arrays.bits(topk_ids), _map(xp, expert_map), *outputs, num_experts, block_size, ignore_invalid_experts
    )
    return tuple(side.leave(array) for array in outputs[: 4 if return_scatter_idx else 3])


@_arrays.on_callers_stream
def batched_moe_align_block_size(
    max_tokens_per_batch: int, block_size: int, expert_num_tokens: Array
) -> tuple[Array, Array, Array]:
    """
    Lay blocks of slots over activations in the batched format, (E_l, max_tokens_per_batch, H).

    Parameters
    ----------
    max_tokens_per_batch : int
        Slots of each local expert.
    block_size : int
        Slots in a block; a block belongs to one expert.
    expert_num_tokens : (E_l,) array, int32 or int64
        Used slots of each local expert; held to 0..max_tokens_per_batch.

    Returns
    -------
    sorted_token_ids : (E_l * max_tokens_per_batch rounded up to blocks per expert,) int32 array
        Slot numbers e * max_tokens_per_batch + i of the used slots, each expert's padded to whole blocks;
        E_l * max_tokens_per_batch everywhere else.
    expert_ids : (len(sorted_token_ids) / block_size,) int32 array
        Local expert of each block; -1 after the last used block.
    num_tokens_post_padded : (1,) int32 array
        Number of slots in used blocks.

    Raises
    ------
    TypeError
        An array of a dtype outside the list above.
    ValueError
        A shape or number that does not fit.

    Notes
    -----
    The call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> counts = np.array([2, 0, 3], "int32")
    >>> sorted_token_ids, expert_ids, num_tokens_post_padded = cumoe.batched_moe_align_block_size(4, 2, counts)
    >>> sorted_token_ids
    array([ 0,  1,  8,  9, 10, 12, 12, 12, 12, 12, 12, 12], dtype=int32)
    >>> expert_ids
    array([ 0,  2,  2, -1, -1, -1], dtype=int32)
    >>> num_tokens_post_padded
    array([6], dtype=int32)
    """
    side, (expert_num_tokens,) = _arrays.enter(expert_num_tokens=expert_num_tokens)
    max_num_tokens = _check.integer("max_tokens_per_batch", max_tokens_per_batch, 0, _LARGEST)
    block_size = _check.integer("block_size", block_size, 1, _LARGEST)
    _check.ndim("expert_num_tokens", expert_num_tokens, "(E_l,)", 1)
    _check.dtype("expert_num_tokens", expert_num_tokens, ("int32", "int64"))
    num_blocks = expert_num_tokens.size * -(-max_num_tokens // block_size)
    _check.integer("E_l * max_tokens_per_batch, in whole blocks,", num_blocks * block_size, 0, _LARGEST)
    xp = side.xp
    outputs = (
        xp.empty(num_blocks * block_size, np.int32),
        xp.empty(num_blocks, np.int32),
        xp.empty(1, np.int32),
    )
    _arrays.room(xp, "align").batched_align_block_size(
        _arrays.bits(expert_num_tokens), *outputs, max_num_tokens, block_size
    )
    return side.leave(outputs[0]), side.leave(outputs[1]), side.leave(outputs[2])


@_arrays.on_callers_stream
def naive_block_assignment(topk_ids: Array, block_size: int, num_experts: int) -> tuple[None, Array, Array]:
    """
    Give every (token, choice) pair a block of its own, without sorting.

    Parameters
    ----------
    topk_ids : (T, k) array, int32, int64 or uint32
        Expert of each choice.
    block_size : int
        Slots in a block; only the first holds a pair.
    num_experts : int
        E, the number of experts that ids count over.

    Returns
    -------
    sorted_token_ids : None
        Block b holds pair b and nothing else.
    expert_ids : (T*k,) int32 array
        The id of pair b, -1 if it is outside 0..E-1.
    num_tokens_post_padded : (1,) int32 array
        ``T*k * block_size``.

    Raises
    ------
    TypeError
        An array of a dtype outside the list above.
    ValueError
        A shape or number that does not fit.

    See Also
    --------
    use_naive_block_assignment : When this beats `moe_align_block_size`.

    Notes
    -----
    The call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> cumoe.naive_block_assignment(np.array([[7, 2], [-1, 0]]), 16, 8)
    (None, array([ 7,  2, -1,  0], dtype=int32), array([64], dtype=int32))
    """
    side, (topk_ids,) = _arrays.enter(topk_ids=topk_ids)
    _check.topk_ids(topk_ids)
    block_size = _check.integer("block_size", block_size, 1, _LARGEST)
    num_experts = _check.integer("num_experts", num_experts, 1, _LARGEST)
    post_padded = _check.integer("T*k * block_size", topk_ids.size * block_size, 0, _LARGEST)
    expert_ids = side.xp.empty(topk_ids.size, np.int32)
    _arrays.room(side.xp, "align").naive_block_assignment(_arrays.bits(topk_ids), expert_ids, num_experts)
    return None, side.leave(expert_ids), side.leave(side.xp.full(1, post_padded, np.int32))


def use_naive_block_assignment(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    *,
    has_expert_map: bool = False,
    weights_on_device: bool = True,
    is_grouped_wna16: bool = False,
) -> bool:
    """
    Tell whether a problem is so sparse that one block per pair wastes less than sorting costs.

    Parameters
    ----------
    num_tokens, top_k, num_experts : int
        T, k and E.
    has_expert_map : bool, default False
        Whether experts are spread over ranks.
    weights_on_device : bool, default True
        False if the weights are read from host memory, where a block should read them once.
    is_grouped_wna16 : bool, default False
        Whether weights are 4 or 8 bit integers with a scale per group.

    Returns
    -------
    use : bool
        Whether to call `naive_block_assignment` instead of `moe_align_block_size`.

    Raises
    ------
    ValueError
        A negative number.

    Notes
    -----
    ``T*k * 4 <= E`` and no reason against it.

    Examples
    --------
    >>> import cumoe
    >>> cumoe.use_naive_block_assignment(4, 8, 128), cumoe.use_naive_block_assignment(5, 8, 128)
    (True, False)
    """
    num_tokens = _check.integer("num_tokens", num_tokens, 0)
    top_k = _check.integer("top_k", top_k, 1)
    num_experts = _check.integer("num_experts", num_experts, 1)
    sparse = num_tokens * top_k * 4 <= num_experts
    return sparse and weights_on_device and not has_expert_map and not is_grouped_wna16


@_arrays.on_callers_stream
def count_expert_num_tokens(topk_ids: Array, num_local_experts: int, expert_map: Array | None = None) -> Array:
    """
    Count the pairs that each local expert gets.

    Parameters
    ----------
    topk_ids : (T, k) array, int32, int64 or uint32
        Expert of each choice. Ids outside 0..E-1 are not counted.
    num_local_experts : int
        E_l.
    expert_map : (E,) int32 array, optional
        Local number of each expert, < 0 where another rank has it; without it E = E_l.

    Returns
    -------
    expert_num_tokens : (E_l,) int32 array
        Pairs of each local expert.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape or number that does not fit.

    Notes
    -----
    The call does not wait for the device.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> cumoe.count_expert_num_tokens(np.array([[0, 2], [2, -1]]), 4)
    array([1, 0, 2, 0], dtype=int32)
    """
    side, (topk_ids, expert_map) = _arrays.enter(topk_ids=topk_ids, expert_map=expert_map)
    _check.topk_ids(topk_ids)
    num_local_experts = _check.integer("num_local_experts", num_local_experts, 1, _LARGEST)
    _check.expert_map(expert_map)
    out = side.xp.empty(num_local_experts, np.int32)
    _arrays.room(side.xp, "align").count_expert_num_tokens(_arrays.bits(topk_ids), _map(side.xp, expert_map), out)
    return side.leave(out)


def _map(xp: Any, expert_map: Array | None) -> Array:
    return xp.empty(0, np.int32) if expert_map is None else _arrays.bits(expert_map)
