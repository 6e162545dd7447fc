"""The batched activation format, (E_l, max_num_tokens, H): tokens brought to their experts' shelves and back."""

from typing import Any

import numpy as np

from cumoe import _arrays, _check
from cumoe._arrays import Array

_LARGEST = 2**31 - 1  # slots are int32


@_arrays.on_callers_stream
def moe_batch(
    hidden_states: Array,
    topk_ids: Array,
    num_local_experts: int,
    max_num_tokens: int,
    *,
    rank: int = 0,
    first_expert: int | None = None,
    expert_map: Array | None = None,
    num_dispatchers: int = 1,
    a1q_scale: Array | None = None,
    out: Array | None = None,
    check: bool = False,
) -> tuple[Array, ...]:
    """
    Copy each token to the shelves of its local experts.

    Parameters
    ----------
    hidden_states : (T, H) array of any number type
        Tokens, also quantised ones.
    topk_ids : (T, k) array, int32, int64 or uint32
        Expert of each choice. Ids of other ranks and ids < 0 are skipped.
    num_local_experts : int
        E_l, the experts of this rank.
    max_num_tokens : int
        Tokens that a dispatcher may bring to one expert.
    rank : int, default 0
        This rank has the experts ``E_l * rank`` and following.
    first_expert : int, optional
        The first expert of this rank, instead of `rank`.
    expert_map : (E,) int32 array, optional
        Local number of each expert, < 0 where another rank has it, instead of `rank`.
    num_dispatchers : int, default 1
        Ranks that send tokens to this one; an expert has ``max_num_tokens * num_dispatchers`` slots.
    a1q_scale : (T, H / group) array, or array of one element, optional
        Scales of the tokens; each goes where its token goes.
    out : (E_l, slots, H) array, dtype of `hidden_states`, optional
        Receives the tokens; must not share memory with the inputs.
    check : bool, default False
        Raise if an expert has more tokens than slots; otherwise those beyond are dropped. With at least
        T slots an expert that no token chooses twice cannot overflow.

    Returns
    -------
    batched : (E_l, slots, H) array, dtype of `hidden_states`
        Tokens of each expert in ascending order. Unused slots are zero, or left as they are in `out`.
    expert_num_tokens : (E_l,) int32 array
        Used slots of each expert.
    batched_scale : (E_l, slots, H / group) or (E_l, 1, 1) array
        Scales, zero in unused slots; only with `a1q_scale`.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape or number that does not fit; with `check`, too many tokens.

    See Also
    --------
    moe_unbatch : The way back.
    batched_moe_align_block_size : Blocks over this layout.

    Notes
    -----
    The masked-grouped layout of DeepGEMM is the same, with `expert_num_tokens` as ``masked_m``. The same
    inputs give the same slots. The call does not wait for the device, except with `check`.

    References
    ----------
    .. [1] vLLM, ``fused_moe/fused_batched_moe.py``.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> x = np.array([[1.0], [2.0], [3.0]], "float32")
    >>> batched, expert_num_tokens = cumoe.moe_batch(x, np.array([[0, 3], [1, 0], [2, 1]]), 2, 3)
    >>> batched[:, :, 0], expert_num_tokens
    (array([[1., 2., 0.],
           [2., 3., 0.]], dtype=float32), array([2, 2], dtype=int32))
    """
    side, (x, ids, expert_map, scale, given) = _arrays.enter(
        hidden_states=hidden_states, topk_ids=topk_ids, expert_map=expert_map, a1q_scale=a1q_scale, out=out
    )
    num_local = _check.integer("num_local_experts", num_local_experts, 1)
    capacity = _check.integer("max_num_tokens", max_num_tokens, 0)
    capacity *= _check.integer("num_dispatchers", num_dispatchers, 1)
    _check.integer("E_l * max_num_tokens * num_dispatchers", num_local * capacity, 0, _LARGEST)
    _check.ndim("hidden_states", x, "(T, H)", 2)
    _check.topk_ids(ids, len(x))
    first = _first_expert(num_local, rank, first_expert, expert_map)
    for name, array in (("hidden_states", x), ("a1q_scale", scale)):
        if array is not None and array.dtype.hasobject:
            raise TypeError(f"{name} must be numbers, got {array.dtype.name}")
    if scale is not None and scale.size != 1:
        _check.ndim("a1q_scale", scale, "(T, H / group)", 2)
        _check.shape("a1q_scale", scale, "(T, H / group)", (len(x), scale.shape[1]))
    xp, room = side.xp, _arrays.room(side.xp, "batched")
    shape = num_local, capacity, x.shape[1]
    if given is None:
        batched = _arrays.zeros(xp, shape, x.dtype)
    else:
        _check.output("out", given, "(E_l, slots, H)", shape, x.dtype.name, hidden_states=x, topk_ids=ids)
        batched = given
    expert_num_tokens = xp.empty(num_local, np.int32)
    slots = xp.empty(ids.shape, np.int32)
    ids, expert_map = _arrays.bits(ids), _map(xp, expert_map)
    if check:
        room.assign_slots(ids, expert_map, expert_num_tokens, slots, first, _LARGEST // num_local)
        _check_room(expert_num_tokens, capacity)
    room.assign_slots(ids, expert_map, expert_num_tokens, slots, first, capacity)
    room.scatter_rows(_bytes(x), slots, _rows(batched))
    results = side.leave(batched), side.leave(expert_num_tokens)
    if scale is None:
        return results
    per_token = scale.ndim == 2 and len(scale) == len(x)
    shape = (num_local, capacity, scale.shape[1]) if per_token else (num_local, 1, 1)
    batched_scale = _arrays.zeros(xp, shape, scale.dtype)
    if per_token:
        room.scatter_rows(_bytes(scale), slots, _rows(batched_scale))
    else:
        _arrays.bits(batched_scale)[...] = _arrays.bits(scale).reshape(())
    return *results, side.leave(batched_scale)


@_arrays.on_callers_stream
def moe_unbatch(
    batched: Array,
    topk_weights: Array | None,
    topk_ids: Array,
    *,
    rank: int = 0,
    first_expert: int | None = None,
    expert_map: Array | None = None,
    out: Array | None = None,
) -> Array:
    """
    Add the weighted rows of each token, from the shelves of its local experts.

    Parameters
    ----------
    batched : (E_l, slots, H) array, float32, float16 or bfloat16
        Results of each expert, in the slots that `moe_batch` chose. Unused slots are never read.
    topk_weights : (T, k) array, float32 (float64, float16 and bfloat16 are converted), or None
        Weight of each choice; None adds the rows as they are.
    topk_ids : (T, k) array, int32, int64 or uint32
        The ids that `moe_batch` got.
    rank : int, default 0
        This rank has the experts ``E_l * rank`` and following.
    first_expert : int, optional
        The first expert of this rank, instead of `rank`.
    expert_map : (E,) int32 array, optional
        Local number of each expert, < 0 where another rank has it, instead of `rank`.
    out : (T, H) array, dtype of `batched`, optional
        Written and returned if given. C-contiguous, must not share memory with the inputs.

    Returns
    -------
    out : (T, H) array, dtype of `batched`
        Zero for a token without a slot.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists above.
    ValueError
        A shape or number that does not fit.

    See Also
    --------
    moe_batch : The way there.

    Notes
    -----
    ``out[t] = sum over j of topk_weights[t, j] * batched[e, i]``, (e, i) the slot of the pair, j
    ascending, in float32, rounded once. Pairs without a slot are skipped. The call does not wait for the
    device.

    References
    ----------
    .. [1] vLLM, ``fused_moe/topk_weight_and_reduce.py``, the naive batched form.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> ids = np.array([[0, 3], [1, 0], [2, 1]])
    >>> batched = np.array([[[1.0], [2.0], [9.0]], [[20.0], [30.0], [9.0]]], "float32")
    >>> cumoe.moe_unbatch(batched, np.full((3, 2), 0.5, "float32"), ids)
    array([[ 0.5],
           [11. ],
           [15. ]], dtype=float32)
    """
    side, (y, weights, ids, expert_map, given) = _arrays.enter(
        batched=batched, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=expert_map, out=out
    )
    _check.ndim("batched", y, "(E_l, slots, H)", 3)
    _check.dtype("batched", y, ("float32", "float16", "bfloat16"))
    num_local, capacity, hidden_size = y.shape
    _check.integer("E_l of batched", num_local, 1)
    _check.integer("E_l * slots of batched", num_local * capacity, 0, _LARGEST)
    _check.topk_ids(ids)
    if weights is not None:
        _check.shape("topk_weights", weights, "(T, k)", tuple(ids.shape))
        _check.dtype("topk_weights", weights, ("float32", "float64", "float16", "bfloat16"))
        weights = _arrays.bits(weights.astype(np.float32, copy=False))
    first = _first_expert(num_local, rank, first_expert, expert_map)
    xp, shape = side.xp, (len(ids), hidden_size)
    if given is None:
        result = xp.empty(shape, y.dtype)
    else:
        _check.output("out", given, "(T, H)", shape, y.dtype.name, batched=y, topk_weights=weights, topk_ids=ids)
        result = given
    slots = xp.empty(ids.shape, np.int32)
    expert_num_tokens = xp.empty(num_local, np.int32)
    _arrays.room(xp, "batched").assign_slots(
        _arrays.bits(ids), _map(xp, expert_map), expert_num_tokens, slots, first, capacity
    )
    rows = _arrays.bits(y).reshape(num_local * capacity, hidden_size)
    _arrays.room(xp, "unpermute").unpermute(rows, weights, slots, _arrays.bits(result), y.dtype.name)
    return side.leave(result)


def _first_expert(num_local: int, rank: int, first_expert: int | None, expert_map: Array | None) -> int:
    """The id that is subtracted from every id before it is looked up."""
    _check.expert_map(expert_map)
    rank = _check.integer("rank", rank, 0)
    ways = {"rank": rank != 0, "first_expert": first_expert is not None, "expert_map": expert_map is not None}
    chosen = [name for name, given in ways.items() if given]
    if len(chosen) > 1:
        raise ValueError(f"only one of rank, first_expert and expert_map may be given, got {' and '.join(chosen)}")
    if first_expert is not None:
        return _check.integer("first_expert", first_expert, 0, _LARGEST)
    return _check.integer("E_l * rank", num_local * rank, 0, _LARGEST)


def _check_room(counts: Array, capacity: int) -> None:
    most = int(counts.max())
    if most > capacity:
        expert = int(counts.argmax())
        raise ValueError(
            f"max_num_tokens * num_dispatchers must be >= the tokens of local expert {expert} = {most}, got {capacity}"
        )


def _rows(batched: Array) -> Array:
    """Every slot as a row of bytes."""
    num_local, capacity, _ = batched.shape
    row = _bytes(batched)
    return row.reshape(num_local * capacity, row.shape[2])


def _bytes(array: Array) -> Array:
    return _arrays.bits(array).view(np.uint8)


def _map(xp: Any, expert_map: Array | None) -> Array:
    return xp.empty(0, np.int32) if expert_map is None else _arrays.bits(expert_map)
