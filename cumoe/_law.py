"""
The law's side of a call: the door of what compares with it, and operands in its words, on the host.

What `verify` and `detect_layout` have in common.
"""

from typing import Any, NamedTuple

import numpy as np

from cumoe import _arrays, _check
from cumoe._arrays import Array, Side
from cumoe._call import ON_INPUT, check_routing
from cumoe._experts import weight_arrays
from cumoe._layer_scheme import Rows
from cumoe._prepare import PreparedExperts
from cumoe._schemes import SCHEMES
from cumoe.reference import experts, formats, quantised


class Given(NamedTuple):
    """The arguments of a call and a result, taken in; what of them depends on the weights is not checked yet."""

    side: Side
    own: dict[str, Array]  # of `weight_arrays`
    result: Array
    x: Array
    topk_weights: Array
    topk_ids: Array
    expert_map: Array


def enter_compared(
    hidden_states: Array,
    w1: Array,
    w2: Array,
    topk_weights: Array,
    topk_ids: Array,
    expert_map: Array | None,
    quant_config: Any,
    on_input: bool | str,
    **result: Array,
) -> Given:
    """Take in a call and the one `result` that goes with it."""
    if isinstance(w1, PreparedExperts):
        raise TypeError("w1 must be an array (E, 2I, H), got PreparedExperts; pass what it was prepared from")
    _check.choice("apply_router_weight_on_input", on_input, ON_INPUT)
    own = weight_arrays(w1, w2, quant_config)
    side, inside = _arrays.enter(
        **own,
        **result,
        hidden_states=hidden_states,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        expert_map=expert_map,
    )
    given = Given(side, dict(zip(own, inside, strict=False)), *inside[-5:])
    _check.ndim("hidden_states", given.x, "(T, H)", 2)
    check_routing(given.topk_weights, given.topk_ids, len(given.x))
    _check.expert_map(given.expert_map)
    return given


def needs_all_tokens(a1: Rows | None, a2: Rows | None, on_input: bool | str) -> bool:
    """Whether a scale of the second product, or one after the router weights, depends on all tokens."""
    on_tokens = on_input in (True, "hidden_states")
    return (a2 is not None and a2.is_batch_wide) or (a1 is not None and a1.is_batch_wide and on_tokens)


def rows_law(rows: Any, used: Any, batch: Any = None) -> Any:
    """The law's words for quantised rows, of the used experts."""
    if rows is None:
        return None
    global_scale = host(rows.global_scale)
    if rows.is_by_expert:
        global_scale = global_scale[used]
    return quantised.Rows(rows.scheme, rows.cols, rows.per_tensor, host(rows.scale), global_scale, batch)


def weight_law(codes: Any, scheme: Any, name: str, used: Any) -> Any:
    """The law's words for a weight, of the used experts."""
    if scheme is None:
        return host_rows(codes, used)
    weight = getattr(scheme, name)
    form = weight.format
    values = host_rows(_arrays.bits(codes), used)
    if SCHEMES[form.rule].is_packed:
        values = formats.unpack(values, -1)
    elif form.rule == "int8":
        values = values.view(np.int8)
    scale, zeros, factor = (host_rows(array, used) for array in (form.scale, form.zero_points, weight.factor))
    return quantised.Weights(form.rule, values, scale, zeros, form.group_rows, form.group_cols, factor)


def used_experts(ids: Any, expert_map: Any, num_experts: int) -> tuple[Any, Any]:
    """The experts that `ids` choose, and a map to their places: all of them may be more than the host can hold."""
    local = np.arange(num_experts, dtype=np.int32) if expert_map is None else expert_map
    used = np.unique(experts.local_experts(ids, num_experts, expert_map))
    used = used[used >= 0]
    place = np.full(num_experts + 1, -1, np.int32)  # the last one: of no expert here
    place[used] = np.arange(len(used))
    is_here = (local >= 0) & (local < num_experts)
    return used, place[np.where(is_here, local, num_experts)]


def host_rows(array: Any, rows: Any) -> Any:
    """Some entries along the first axis, on the host; what is not there stays so."""
    if array is None or array.size == 0:
        return host(array)
    if isinstance(array, np.ndarray):
        return array[rows]
    if len(rows) == len(array):
        return host(array)
    found = np.empty((len(rows), *array.shape[1:]), array.dtype)
    for at, row in enumerate(rows):
        found[at] = host(array[int(row)])
    return found


def host(array: Any) -> Any:
    """A copy on the host; CuPy copies bits."""
    if array is None or isinstance(array, np.ndarray):
        return array
    return _arrays.bits(array).get().view(array.dtype)
