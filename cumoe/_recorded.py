"""
Small calls on prepared experts that are like earlier ones: recorded once, then done at once and without a second check.

What the checks look at - shapes, dtypes, layouts, the other arguments - is in the key of a recording. Only the side of
NumPy records: on a GPU a caller captures a graph.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from cumoe import _arrays
from cumoe._arrays import Array
from cumoe._call import Call
from cumoe._prepare import PreparedExperts

_MOST = 256  # recordings of a layer: one for each number of tokens
_NAMES = "hidden_states", "topk_weights", "topk_ids", "expert_map", "out"
_NO_MAP = np.empty((1, 0), np.uint8)
_BYTES = np.dtype(np.uint8)


def replay(
    w1: Any, arrays: tuple[Array, ...], activation: Any, on_input: Any, global_num_experts: Any
) -> tuple[tuple[Any, ...] | None, Array]:
    """
    Return the key of a call and its result by an earlier recording, each None where there is none.

    `arrays` are tokens, weights and ids of choices, the map of experts and the output.
    """
    if type(w1) is not PreparedExperts or w1.device != "cpu":
        return None, None
    side = None
    if not isinstance(arrays[0], np.ndarray):
        side, inside = _arrays.enter(**dict(zip(_NAMES, arrays, strict=True)))
        arrays = tuple(inside)
    key = _key_of(arrays, activation, on_input, global_num_experts)
    recording = None if key is None else w1._recorded.get(key)
    if recording is None:
        return key, None
    x, weights, ids, expert_map, out = arrays
    if out is None:
        out = np.empty(x.shape, x.dtype)
    elif any(array is not None and np.may_share_memory(out, array) for array in arrays[:4]):
        return key, None
    taken = _NO_MAP if expert_map is None else expert_map[None].view(_BYTES)
    recording.run(x.view(_BYTES), weights.view(_BYTES), ids.view(_BYTES), taken, out.view(_BYTES))
    return key, out if side is None else side.leave(out)


def _key_of(arrays: tuple[Array, ...], activation: Any, on_input: Any, global_num_experts: Any) -> Any:
    """What a recording must have been made for; None for a call that is none to record, or one to refuse."""
    if type(activation) is not str or type(on_input) not in (bool, str):
        return None
    if global_num_experts is not None and type(global_num_experts) is not int:
        return None
    key = [activation, on_input, global_num_experts]
    for array in arrays:
        if array is None:
            key.append(None)
        elif type(array) is np.ndarray and array.flags.carray:
            key += (array.shape, array.dtype)
        else:
            return None
    is_float32 = arrays[1] is not None and arrays[1].dtype == np.float32
    return tuple(key) if is_float32 else None  # others are converted


def remember(prepared: PreparedExperts, key: tuple[Any, ...], call: Call, steps: Callable[[Call], None]) -> None:
    """Record `steps` of a checked call when it comes for the second time, if it can be recorded."""
    recorded = prepared._recorded
    if not _can_be_recorded(call):
        return
    if key not in recorded:
        if len(recorded) >= _MOST:
            recorded.clear()
        recorded[key] = None
    else:
        out = _arrays.bits(call.out)

        def record(recorder: Any, x: Any, weights: Any, ids: Any, expert_map: Any, out: Any) -> None:
            given = {"x": x, "topk_weights": weights, "topk_ids": ids, "expert_map": expert_map, "out": out}
            steps(call._replace(workspace=recorder, **given))

        given = call.x, call.topk_weights, call.topk_ids, call.expert_map, out
        recorded[key] = _arrays.room(np, "recording").record(record, given)


def _can_be_recorded(call: Call) -> bool:
    """Whether the rooms do all of the work, and read the caller's arrays themselves."""
    if not _arrays.room(np, "recording").is_worthwhile(call.topk_ids.size):
        return False
    scheme = call.experts.scheme
    if scheme is None:
        return True
    rows = [one for one in (scheme.a1, scheme.a2) if one is not None]
    on_tokens = call.on_input in (True, "hidden_states") and scheme.a1 is not None
    return not on_tokens and not any(one.is_batch_wide or one.is_by_expert for one in rows)
