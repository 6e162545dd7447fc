"""The outer steps of a modular layer on one rank: tokens to their experts, results back to their tokens."""

from typing import Any

import numpy as np

from cumoe import _arrays, _check
from cumoe._arrays import Array
from cumoe._batched import moe_batch, moe_unbatch
from cumoe._modular import ExpertTokensMetadata, FusedMoEActivationFormat
from cumoe._quant_config import FusedMoEQuantConfig
from cumoe._reduce import topk_weight_and_reduce

# activations, their scales, counts, ids and weights; the last two are None if they stay as they were
Prepared = tuple[Array, Array | None, ExpertTokensMetadata | None, Array | None, Array | None]


class MoEPrepareAndFinalizeNoEP:
    """
    Tokens stay where they are, in the standard format: there is no transport between ranks.

    What other ranks must see or add is moved by the caller, before `prepare` and after `finalize`.
    """

    activation_format = FusedMoEActivationFormat.Standard

    def topk_indices_dtype(self) -> str | None:
        """Dtype of ids that `prepare` insists on: none."""
        return None

    def max_num_tokens_per_rank(self) -> int | None:
        """Most tokens that a rank may bring: any number."""
        return None

    def num_dispatchers(self) -> int:
        """Ranks that bring tokens: this one."""
        return 1

    def output_is_reduced(self) -> bool:
        """Whether `finalize` adds up over ranks: no."""
        return False

    @_arrays.on_callers_stream
    def prepare(
        self,
        a1: Array,
        topk_weights: Array,
        topk_ids: Array,
        num_experts: int,
        expert_map: Array | None,
        apply_router_weight_on_input: bool,
        quant_config: FusedMoEQuantConfig,
    ) -> Prepared:
        """
        Give the tokens as they are, weighted if `apply_router_weight_on_input`, which needs k = 1.

        The experts quantise them, if `quant_config` says so.
        """
        return _weighted(a1, topk_weights) if apply_router_weight_on_input else a1, None, None, None, None

    @_arrays.on_callers_stream
    def finalize(
        self,
        output: Array | None,
        fused_expert_output: Array,
        topk_weights: Array,
        topk_ids: Array,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: str,
    ) -> Array:
        """
        Weight and add up what the experts left to do.

        `weight_and_reduce_impl` is a form of `topk_weight_and_reduce`; "delegate" means "contiguous".
        Returns `output`, or a new array if that is None.
        """
        form = "contiguous" if weight_and_reduce_impl == "delegate" else weight_and_reduce_impl
        return topk_weight_and_reduce(
            fused_expert_output,
            topk_weights,
            topk_ids,
            form=form,
            apply_router_weight_on_input=apply_router_weight_on_input,
            out=output,
        )


class BatchedPrepareAndFinalize:
    """
    Tokens are copied to the slots of this rank's experts: the batched format, without transport.

    What other ranks must see or add is moved by the caller, before `prepare` and after `finalize`.

    Parameters
    ----------
    max_num_tokens : int
        Tokens that each dispatcher brings at most.
    num_local_experts : int
        E_l, experts of this rank.
    num_dispatchers : int
        Ranks whose tokens arrive here; an expert has ``max_num_tokens * num_dispatchers`` slots.
    first_expert : int
        First expert of this rank, for calls without an `expert_map`.
    routing_tables : three arrays, optional
        From `round_robin_routing_tables`: `first_expert` is a place in the first table then.
    """

    activation_format = FusedMoEActivationFormat.BatchedExperts

    def __init__(
        self,
        max_num_tokens: int,
        num_local_experts: int,
        num_dispatchers: int = 1,
        first_expert: int = 0,
        routing_tables: tuple[Array, Array, Array] | None = None,
    ) -> None:
        self._max_num_tokens = _check.integer("max_num_tokens", max_num_tokens, 1)
        self._num_local_experts = _check.integer("num_local_experts", num_local_experts, 1)
        self._num_dispatchers = _check.integer("num_dispatchers", num_dispatchers, 1)
        self._first_expert = _check.integer("first_expert", first_expert, 0)
        self._global_to_physical = None if routing_tables is None else routing_tables[0]

    def topk_indices_dtype(self) -> str | None:
        """Dtype of ids that `prepare` insists on: none."""
        return None

    def max_num_tokens_per_rank(self) -> int | None:
        """Most tokens that a rank may bring."""
        return self._max_num_tokens

    def num_dispatchers(self) -> int:
        """Ranks that bring tokens."""
        return self._num_dispatchers

    def output_is_reduced(self) -> bool:
        """Whether `finalize` adds up over ranks: no."""
        return False

    @_arrays.on_callers_stream
    def prepare(
        self,
        a1: Array,
        topk_weights: Array,
        topk_ids: Array,
        num_experts: int,
        expert_map: Array | None,
        apply_router_weight_on_input: bool,
        quant_config: FusedMoEQuantConfig,
    ) -> Prepared:
        """
        Copy the tokens to the slots of their experts.

        The ids that come back are those of this rank's experts, -1 for the others; `finalize` takes them. The
        experts quantise the tokens, if `quant_config` says so.
        """
        if apply_router_weight_on_input:
            a1 = _weighted(a1, topk_weights)
        slots = self._max_num_tokens * self._num_dispatchers
        if len(a1) > slots:
            raise ValueError(f"a1 must have at most max_num_tokens * num_dispatchers = {slots} tokens, got {len(a1)}")
        ids = self._local_ids(topk_ids, expert_map)
        batched, counts = moe_batch(
            a1, ids, self._num_local_experts, self._max_num_tokens, num_dispatchers=self._num_dispatchers
        )
        return batched, None, ExpertTokensMetadata(counts), ids, None

    @_arrays.on_callers_stream
    def finalize(
        self,
        output: Array | None,
        fused_expert_output: Array,
        topk_weights: Array,
        topk_ids: Array,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: str,
    ) -> Array:
        """
        Weight and add up the slots of each token; `topk_ids` are those that `prepare` gave.

        `weight_and_reduce_impl` must be "delegate" or "naive_batched". Returns `output`, or a new array if
        that is None.
        """
        _check.choice("weight_and_reduce_impl", weight_and_reduce_impl, ("delegate", "naive_batched"))
        weights = None if apply_router_weight_on_input else topk_weights
        return moe_unbatch(fused_expert_output, weights, topk_ids, out=output)

    def _local_ids(self, topk_ids: Array, expert_map: Array | None) -> Array:
        """Place of each id in this rank's weights, -1 if it has none here."""
        table = self._global_to_physical if expert_map is None else expert_map
        side, (ids,) = _arrays.enter(topk_ids=topk_ids)
        xp = side.xp
        ids = ids.astype(np.int64)  # uint32 has no -1
        if table is not None:
            table = _arrays.enter(table=table)[1][0].astype(np.int64)
            known = (ids >= 0) & (ids < len(table))
            ids = xp.where(known, table[xp.where(known, ids, 0)], -1)
        if expert_map is None:
            ids = xp.where(ids < 0, -1, ids - self._first_expert)
        here = (ids >= 0) & (ids < self._num_local_experts)
        return side.leave(xp.where(here, ids, -1).astype(np.int32))


def _weighted(a1: Array, topk_weights: Array) -> Array:
    """Tokens times the weight of their only choice, in float32, rounded once."""
    side, (x, weights) = _arrays.enter(a1=a1, topk_weights=topk_weights)
    _check.ndim("a1", x, "(T, H)", 2)
    if tuple(weights.shape) != (len(x), 1):
        raise ValueError(
            f"topk_weights must have shape (T, 1) = ({len(x)}, 1) with apply_router_weight_on_input, "
            f"got {tuple(weights.shape)}"
        )
    scaled: Any = x.astype(np.float32) * weights.astype(np.float32)
    return side.leave(scaled.astype(x.dtype))
