"""The middle step of a modular layer: both products, on tokens as they lie or grouped by expert."""

import numpy as np

from cumoe import _arrays, _check
from cumoe._act import is_gated
from cumoe._arrays import Array
from cumoe._layer_scheme import planned_rows
from cumoe._modular import ExpertTokensMetadata, FusedMoEActivationFormat
from cumoe._moe import fused_experts
from cumoe._prepare import PreparedExperts
from cumoe._quant_config import FusedMoEQuantConfig

Shape = tuple[int, ...]


class StandardExperts:
    """
    Both products for tokens in the standard format; the results are weighted and added up.

    Parameters
    ----------
    quant_config : FusedMoEQuantConfig
        Biases and parameters of the activation; not used with PreparedExperts, which bring their own.
    """

    activation_format = FusedMoEActivationFormat.Standard

    def __init__(self, quant_config: FusedMoEQuantConfig) -> None:
        self.quant_config = quant_config

    def supports_expert_map(self) -> bool:
        """Whether experts of other ranks may be mapped below 0: yes."""
        return True

    def finalize_weight_and_reduce_impl(self) -> str:
        """What is left to do in finalize: nothing."""
        return "noop"

    def workspace_shapes(
        self,
        num_tokens: int,
        w1_rows: int,
        hidden_size: int,
        top_k: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: ExpertTokensMetadata | None = None,
        activation: str = "silu",
    ) -> tuple[Shape, Shape, Shape]:
        """Shapes of the protocol's two workspaces and of the output; `w1_rows` is 2I, or I without gate."""
        width = w1_rows // 2 if is_gated(activation) else w1_rows
        return (
            (num_tokens, top_k, max(width, hidden_size)),
            (num_tokens, top_k, max(w1_rows, hidden_size)),
            (num_tokens, hidden_size),
        )

    @_arrays.on_callers_stream
    def apply(
        self,
        output: Array,
        hidden_states: Array,
        w1: Array | PreparedExperts,
        w2: Array | None,
        topk_weights: Array,
        topk_ids: Array,
        activation: str = "silu",
        global_num_experts: int | None = None,
        expert_map: Array | None = None,
        a1q_scale: Array | None = None,
        a2_scale: Array | None = None,
        workspace13: Array | None = None,
        workspace2: Array | None = None,
        expert_tokens_meta: ExpertTokensMetadata | None = None,
        apply_router_weight_on_input: bool = False,
        *,
        check: bool = False,
        workspace_limit: int | None = None,
        workspace: Array | None = None,
    ) -> None:
        """
        Write (T, H) results into `output`.

        With `apply_router_weight_on_input` the tokens are weighted already. `workspace13` and `workspace2`
        are those of the protocol and not used: scratch is `workspace`, or allocated, within
        `workspace_limit` bytes.
        """
        _refuse_scales(a1q_scale, a2_scale)
        if apply_router_weight_on_input:
            side, (weights,) = _arrays.enter(topk_weights=topk_weights)
            topk_weights = side.leave(side.xp.ones(weights.shape, np.float32))
        fused_experts(
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            activation=activation,
            quant_config=None if isinstance(w1, PreparedExperts) else self.quant_config,
            expert_map=expert_map,
            global_num_experts=global_num_experts,
            out=output,
            check=check,
            workspace_limit=workspace_limit,
            workspace=workspace,
        )


class BatchedExperts:
    """
    Both products for tokens that are grouped by local expert; results are neither weighted nor added.

    Parameters
    ----------
    max_num_tokens : int
        Rows that each rank may send to one expert.
    num_dispatchers : int
        Ranks that send.
    quant_config : FusedMoEQuantConfig
        Biases and parameters of the activation; not used with PreparedExperts, which bring their own.
    """

    activation_format = FusedMoEActivationFormat.BatchedExperts

    def __init__(self, max_num_tokens: int, num_dispatchers: int, quant_config: FusedMoEQuantConfig) -> None:
        self.max_num_tokens = _check.integer("max_num_tokens", max_num_tokens, 1)
        self.num_dispatchers = _check.integer("num_dispatchers", num_dispatchers, 1)
        self.quant_config = quant_config

    def supports_expert_map(self) -> bool:
        """Whether experts of other ranks may be mapped below 0: no, all rows are local already."""
        return False

    def finalize_weight_and_reduce_impl(self) -> str:
        """What is left to do in finalize: weighting and adding up, in a form that it knows."""
        return "delegate"

    def workspace_shapes(
        self,
        num_tokens: int,
        w1_rows: int,
        hidden_size: int,
        top_k: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: ExpertTokensMetadata | None = None,
        activation: str = "silu",
    ) -> tuple[Shape, Shape, Shape]:
        """Shapes of the protocol's two workspaces and of the output; `w1_rows` is 2I, or I without gate."""
        rows = self.max_num_tokens * self.num_dispatchers
        width = w1_rows // 2 if is_gated(activation) else w1_rows
        return (
            (local_num_experts, rows, max(hidden_size, w1_rows)),
            (local_num_experts, rows, width),
            (local_num_experts, rows, hidden_size),
        )

    @_arrays.on_callers_stream
    def apply(
        self,
        output: Array,
        hidden_states: Array,
        w1: Array | PreparedExperts,
        w2: Array | None,
        topk_weights: Array,
        topk_ids: Array,
        activation: str = "silu",
        global_num_experts: int | None = None,
        expert_map: Array | None = None,
        a1q_scale: Array | None = None,
        a2_scale: Array | None = None,
        workspace13: Array | None = None,
        workspace2: Array | None = None,
        expert_tokens_meta: ExpertTokensMetadata | None = None,
        apply_router_weight_on_input: bool = False,
        *,
        check: bool = False,
        workspace_limit: int | None = None,
        workspace: Array | None = None,
    ) -> None:
        """
        Write (E_l, rows, H) results into `output`; rows beyond `expert_num_tokens` are not read and become 0.

        `check` looks at the counts. The routing, the map, `workspace13` and `workspace2` are those of the
        protocol and not used here.
        """
        _refuse_scales(a1q_scale, a2_scale)
        if expert_tokens_meta is None:
            raise ValueError("expert_tokens_meta must be given for the batched format, got None")
        side, (x, counts, target) = _arrays.enter(
            hidden_states=hidden_states, expert_num_tokens=expert_tokens_meta.expert_num_tokens, output=output
        )
        _check.ndim("hidden_states", x, "(E_l, rows, H)", 3)
        num_experts, rows, hidden_size = x.shape
        _check.integer("rows of hidden_states", rows, 0, self.max_num_tokens * self.num_dispatchers)
        _check.shape("expert_num_tokens", counts, "(E_l,)", (num_experts,))
        _check.output("output", target, "(E_l, rows, H)", x.shape, x.dtype.name, hidden_states=x)
        if check and bool(((counts < 0) | (counts > rows)).any()):
            raise ValueError(f"expert_num_tokens must be in 0..{rows}, got {counts.tolist()}")
        # each row is a token with one choice of weight 1: its expert, or none beyond the count
        xp = side.xp
        used = xp.arange(rows)[None, :] < counts[:, None]
        ids = xp.where(used, xp.arange(num_experts)[:, None], -1).astype(np.int32).reshape(-1, 1)
        weights = xp.ones(ids.shape, np.float32)
        quantised = None if self.quant_config is None else planned_rows(1, self.quant_config._a1)
        if quantised is not None and quantised.is_batch_wide:
            bits = _arrays.bits(x)  # one scale serves all rows that are used
            x = xp.where(used[:, :, None], bits, bits.dtype.type(0)).view(x.dtype)
        fused_experts(
            side.leave(x.reshape(-1, hidden_size)),
            w1,
            w2,
            side.leave(weights),
            side.leave(ids),
            activation=activation,
            quant_config=None if isinstance(w1, PreparedExperts) else self.quant_config,
            out=side.leave(target.reshape(-1, hidden_size)),
            workspace_limit=workspace_limit,
            workspace=workspace,
        )


def _refuse_scales(a1q_scale: Array | None, a2_scale: Array | None) -> None:
    for name, scale in (("a1q_scale", a1q_scale), ("a2_scale", a2_scale)):
        if scale is not None:
            raise NotImplementedError(
                f"no kernel for activations that come quantised ({name} is given); available: None, "
                "the experts quantise them as quant_config says"
            )
