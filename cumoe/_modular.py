"""
The words that the steps of a modular layer share.

The steps are prepare (bring tokens to their experts), experts (both products) and finalize (bring the
results back and add them up per token).
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from cumoe import _arrays
from cumoe._act import is_gated
from cumoe._arrays import Array
from cumoe._prepare import PreparedExperts
from cumoe._quant_config import FusedMoEQuantConfig


class FusedMoEActivationFormat(Enum):
    """How activations lie between prepare and finalize."""

    Standard = "standard"  # (T, H): tokens, each with its own choices
    BatchedExperts = "batched_experts"  # (E_l, slots, H): the tokens of each local expert


@dataclass(frozen=True, eq=False)
class ExpertTokensMetadata:
    """
    How many tokens each local expert has.

    Parameters
    ----------
    expert_num_tokens : (E_l,) array, int32
        On the side of the tokens.
    expert_num_tokens_cpu : (E_l,) NumPy array, int32, optional
        The same on the host, if someone knows it there.
    """

    expert_num_tokens: Array
    expert_num_tokens_cpu: Array = None


def run_modular(
    outer: Any,
    inner: Any,
    x: Array,
    prepared: PreparedExperts,
    topk_weights: Array,
    topk_ids: Array,
    quant_config: FusedMoEQuantConfig,
    on_input: bool | str,
    num_global: int,
    expert_map: Array | None,
    out: Array | None,
    check: bool,
    workspace_limit: int | None,
    workspace: Array | None,
) -> Array:
    """Prepare, experts, finalize: `outer` has the first and the last step, `inner` the one between."""
    if on_input == "accumulator":
        raise NotImplementedError(
            "no modular layer with apply_router_weight_on_input='accumulator'; available: False, 'hidden_states'"
        )
    weighted = bool(on_input)
    a1, a1_scale, counts, new_ids, new_weights = outer.prepare(
        x, topk_weights, topk_ids, num_global, expert_map, weighted, quant_config
    )
    ids = topk_ids if new_ids is None else new_ids
    weights = topk_weights if new_weights is None else new_weights
    activation, width = prepared.activation, prepared.intermediate_size
    rows = 2 * width if is_gated(activation) else width
    sizes = len(x), rows, prepared.hidden_size, ids.shape[1], num_global, prepared.num_experts
    side, (tokens,) = _arrays.enter(a1=a1)
    results = side.leave(side.xp.empty(inner.workspace_shapes(*sizes, counts, activation)[2], tokens.dtype))
    inner.apply(
        results,
        a1,
        prepared,
        None,
        weights,
        ids,
        activation,
        num_global,
        expert_map,
        a1q_scale=a1_scale,
        expert_tokens_meta=counts,
        apply_router_weight_on_input=weighted,
        check=check,
        workspace_limit=workspace_limit,
        workspace=workspace,
    )
    return outer.finalize(out, results, weights, ids, weighted, inner.finalize_weight_and_reduce_impl())
