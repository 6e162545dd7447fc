"""The steps of the layer for some tokens: sort, first product, second product, add up; and the memory between them."""

import contextlib
import math
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from cumoe import _arrays, _quantised_rows
from cumoe._experts import Experts
from cumoe._workspace import Workspace


class Scratch(NamedTuple):
    """Memory between the steps of one piece."""

    expert_first_token_offset: Any  # (E + 1,) int64
    permuted_idx: Any  # (T*k,) int32, row -> pair
    inv_permuted_idx: Any  # (T, k) int32, pair -> row, -1 if skipped
    schedule: Any  # int32, which rows of which expert belong together; empty on the CPU
    activated: Any  # (T*k, I)
    rows: Any  # (T*k, H)
    tokens: _quantised_rows.Space | None  # of the tokens, if they are quantised
    between: _quantised_rows.Space | None  # of `activated`, in place unless they are bytes
    expanded: Any  # what the codes of one weight stand for, in a line; (0,) where that is found tile by tile


class Piece(NamedTuple):
    """The steps of the layer for some tokens; every array is checked, allocated and bits."""

    xp: ModuleType
    x: Any
    experts: Experts
    topk_weights: Any
    topk_ids: Any
    expert_map: Any
    on_input: bool | str
    scratch: Scratch
    block_rows: int
    out: Any
    workspace: Workspace | None

    def sort(self) -> None:
        """Sort the pairs by expert, and list which rows belong together."""
        if self.topk_ids.size == 0:  # k = 0: nothing to sort or to multiply
            return
        s = self.scratch
        _arrays.room(self.xp, "permute").sort_by_expert(
            self.topk_ids,
            self.expert_map,
            s.expert_first_token_offset,
            s.permuted_idx,
            s.inv_permuted_idx,
            s.schedule,
            self.block_rows,
        )

    def first_product(self) -> None:
        """First product, with gather, bias and activation."""
        if self.topk_ids.size == 0:
            return
        e, s = self.experts, self.scratch
        weights = self.topk_weights.reshape(-1)
        nothing, no_matrix = weights[:0], self.topk_weights[:0, :0]
        on_tokens = self.on_input in (True, "hidden_states")
        x, top_k, row_factor = self.x, self.topk_ids.shape[1], nothing
        if s.tokens is not None:
            x, top_k, row_factor, on_tokens = *self._quantised_tokens(s.tokens, on_tokens), False
        if s.between is not None and s.between.rows.is_batch_wide:
            s.activated.fill(0)  # the rows of skipped pairs must not count
        weight = None if e.scheme is None else e.scheme.w1
        _arrays.room(self.xp, "grouped_gemm").grouped_gemm(
            x,
            s.permuted_idx,
            top_k,
            weights if on_tokens else nothing,
            e.w1,
            None if weight is None else weight.format,
            s.expert_first_token_offset,
            e.w1_bias,
            weights if self.on_input == "accumulator" else nothing,
            row_factor,
            no_matrix if weight is None else weight.factor,
            e.activation,
            e.is_interleaved,
            e.alpha,
            e.beta,
            e.limit,
            e.dtype,
            e.kernel,
            s.schedule,
            self.block_rows,
            False,
            _first_elements(s.expanded, (e.num_experts, (1 + e.is_gated) * e.intermediate_size, e.hidden_size)),
            s.activated,
        )

    def second_product(self) -> None:
        """Second product, with bias and router weight."""
        if self.topk_ids.size == 0:
            return
        e, s = self.experts, self.scratch
        weights = self.topk_weights.reshape(-1)
        nothing, no_matrix = weights[:0], self.topk_weights[:0, :0]
        x, row_factor = s.activated, nothing
        if s.between is not None:
            self._quantise(s.activated, s.between)
            x, row_factor = s.between.numbers, s.between.factor
        weight = None if e.scheme is None else e.scheme.w2
        _arrays.room(self.xp, "grouped_gemm").grouped_gemm(
            x,
            s.permuted_idx,
            0,
            nothing,
            e.w2,
            None if weight is None else weight.format,
            s.expert_first_token_offset,
            e.w2_bias,
            nothing if self.on_input else weights,
            row_factor,
            no_matrix if weight is None else weight.factor,
            "",
            False,
            0.0,
            0.0,
            0.0,
            e.dtype,
            e.kernel,
            s.schedule,
            self.block_rows,
            s.between is None,
            _first_elements(s.expanded, (e.num_experts, e.hidden_size, e.intermediate_size)),
            s.rows,
        )

    def _quantised_tokens(self, to: _quantised_rows.Space, on_tokens: bool) -> tuple[Any, int, Any]:
        """The rows of the first product, how many pairs share one, and their factors."""
        x, top_k = self.x, self.topk_ids.shape[1]
        if on_tokens:  # k = 1
            scale_tokens = _arrays.room(self.xp, "unpermute").weighted_sum
            scaled = self.scratch.rows  # of no use before the second product
            scale_tokens(x[:, None], self.topk_weights, None, self.expert_map, scaled, self.experts.dtype, False)
            x = scaled
        if not to.rows.is_by_expert:
            self._quantise(x, to)
            return to.numbers, top_k, to.factor
        gather = _arrays.room(self.xp, "permute").gather_rows
        gather(x.view(np.uint8), self.scratch.permuted_idx, to.numbers.view(np.uint8), top_k)
        self._quantise(to.numbers, to)
        return to.numbers, 0, to.factor

    def _quantise(self, x: Any, to: _quantised_rows.Space) -> None:
        """Quantise rows, which are the sorted ones if each expert has a global scale."""
        scale = to.rows.global_scale
        if not to.rows.is_by_expert:
            _quantised_rows.quantise_rows(self.xp, x, self.experts.dtype, to, scale)
            return
        offsets, last = self.scratch.expert_first_token_offset, self.experts.num_experts - 1
        with contextlib.nullcontext() if self.workspace is None else self.workspace.borrowed():
            expert = self.xp.searchsorted(offsets, self.xp.arange(len(x)), side="right") - 1
            scale = scale[self.xp.clip(expert, 0, last)]
            _quantised_rows.quantise_rows(self.xp, x, self.experts.dtype, to, scale)

    def add_up(self) -> None:
        """Add the rows of each token."""
        _arrays.room(self.xp, "unpermute").unpermute(
            self.scratch.rows, None, self.scratch.inv_permuted_idx, self.out, self.experts.dtype
        )


def _first_elements(memory: Any, shape: tuple[int, ...]) -> Any:
    """An array of that shape at the start of memory, or an empty one of as many axes if there is none."""
    return memory[: math.prod(shape)].reshape(shape) if memory.size else memory.reshape((0,) * len(shape))
