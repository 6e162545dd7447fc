"""One MoE layer of a model: router, experts and shared expert, ready to run."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cumoe import _arrays
from cumoe._grouped_gemm import grouped_gemm
from cumoe._grouped_route import grouped_topk
from cumoe._moe import fused_experts
from cumoe._quant_desc import dtype_name
from cumoe._route import fused_topk
from cumoe._unpermute import moe_sum

Array = _arrays.Array


@dataclass(frozen=True)
class Routing:
    """
    How a layer chooses experts; the fields are arguments of `cumoe.fused_topk` and `cumoe.grouped_topk`.

    With `num_expert_group` the choice is grouped. `rounded_weights` rounds the weights to the dtype of
    the logits, as the Qwen models do.
    """

    top_k: int
    renormalize: bool
    scoring_func: str = "softmax"
    num_expert_group: int | None = None
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    rounded_weights: bool = False


@dataclass(frozen=True)
class SharedExpert:
    """An expert that every token visits, weighted by ``sigmoid(gate_weight @ x)``, or by 1 without a gate."""

    experts: Any  # PreparedExperts with E = 1
    intermediate_size: int
    gate_weight: Array | None = None  # (1, H)


@dataclass(frozen=True, repr=False, eq=False)
class MoELayer:
    """
    One MoE layer, called as ``layer(hidden_states)``; `cumoe.load_layer` makes it from a checkpoint.

    Parameters
    ----------
    name : str
        Where the layer comes from, for `explain` and error messages.
    hidden_size, intermediate_size, num_experts : int
        H, I and E.
    dtype : str
        Dtype of the hidden states, and of weights that are not quantised: float32, float16 or bfloat16.
    routing : Routing
        How experts are chosen.
    router_weight : (E, H) array, float32, float16 or bfloat16
        Router logits are ``hidden_states @ router_weight.T``, summed in float32 and rounded to this dtype.
    experts : PreparedExperts
        The routed experts, from `cumoe.prepare`.
    router_bias : (E,) array, float32, optional
        Added to the scores for the choice of experts only.
    shared : SharedExpert, optional
        An expert that every token visits.
    logit_bias : (E,) array, optional
        Added to the router logits before they are rounded.
    quant_config : FusedMoEQuantConfig, optional
        What the codes of the routed experts mean, and their biases; None if they have neither.

    Notes
    -----
    ``out[t] = sum_j topk_weights[t, j] * expert[topk_ids[t, j]](x[t]) + shared_weight[t] * shared(x[t])``.
    Both parts are rounded to `dtype`, then added in float32 and rounded once more.
    A token's bits do not depend on the other tokens of the call.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    dtype: str
    routing: Routing
    router_weight: Array
    experts: Any
    router_bias: Array | None = None
    shared: SharedExpert | None = None
    logit_bias: Array | None = None
    quant_config: Any = None

    @_arrays.on_callers_stream
    def __call__(self, hidden_states: Array) -> Array:
        """
        Route the tokens, run them through their experts and the shared expert, and add the results.

        Parameters
        ----------
        hidden_states : (T, H) or (B, S, H) array
            Tokens, of the dtype of the layer. Never written.

        Returns
        -------
        out : array
            Same shape, dtype and kind as `hidden_states`.

        Raises
        ------
        TypeError
            Not an array, of another dtype than the layer, or on another device.
        ValueError
            A shape other than (T, H) or (B, S, H).
        """
        side, tokens = self._enter(hidden_states)
        topk_weights, topk_ids = self._route(side.xp, tokens)
        if self.shared is None:
            out = fused_experts(tokens, self.experts, None, topk_weights, topk_ids)
        else:
            parts = side.xp.empty((2, *tokens.shape), dtype=tokens.dtype)
            fused_experts(tokens, self.experts, None, topk_weights, topk_ids, out=parts[0])
            shared_weights, zeros = _shared_weights(side.xp, tokens, self.shared.gate_weight)
            fused_experts(tokens, self.shared.experts, None, shared_weights, zeros, out=parts[1])
            out = moe_sum(parts.transpose(1, 0, 2))
        return side.leave(out.reshape(tuple(hidden_states.shape)))

    @_arrays.on_callers_stream
    def route(self, hidden_states: Array) -> tuple[Array, Array]:
        """
        Choose the experts of each token, as a call of the layer does.

        Parameters
        ----------
        hidden_states : (T, H) or (B, S, H) array
            Tokens, of the dtype of the layer.

        Returns
        -------
        topk_weights : (T, k) array, float32
            Weight of each choice; T is B * S for three axes.
        topk_ids : (T, k) array, int32
            Expert of each choice.
        """
        side, tokens = self._enter(hidden_states)
        topk_weights, topk_ids = self._route(side.xp, tokens)
        return side.leave(topk_weights), side.leave(topk_ids)

    def explain(self) -> str:
        """
        Describe the layer in a few lines: sizes, routing and shared expert.

        Returns
        -------
        text : str
            One fact a line.
        """
        routing = self.routing
        choice = f"{routing.scoring_func}, top {routing.top_k} of {self.num_experts}"
        if routing.num_expert_group is not None:
            choice += f" from the best {routing.topk_group} of {routing.num_expert_group} groups"
        if self.router_bias is not None:
            choice += ", biased choice"
        if routing.renormalize:
            choice += ", weights sum to 1"
        if routing.routed_scaling_factor != 1:
            choice += f", times {routing.routed_scaling_factor:g}"
        numbers = self.dtype
        if self.quant_config is not None and self.quant_config.weight_quant_dtype is not None:
            weights, activations = dtype_name(self.quant_config.weight_quant_dtype), self.quant_config.quant_dtype
            numbers = f"{weights} weights, {dtype_name(activations) or self.dtype} activations"
        lines = [
            self.name,
            f"  experts  {self.num_experts} of (H, I) = ({self.hidden_size}, {self.intermediate_size}), {numbers}",
            f"  router   {choice}, logits {self.router_weight.dtype.name}",
        ]
        if self.shared is not None:
            gate = "no gate" if self.shared.gate_weight is None else "sigmoid gate"
            lines.append(f"  shared   I = {self.shared.intermediate_size}, {gate}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<MoELayer {self.explain()}>"

    def _enter(self, hidden_states: Array) -> tuple[_arrays.Side, Array]:
        """Check the argument and give it as (T, H)."""
        side, (tokens,) = _arrays.enter(hidden_states=hidden_states)
        shape, H = tuple(tokens.shape), self.hidden_size
        if len(shape) not in (2, 3) or shape[-1] != H:
            raise ValueError(f"hidden_states must have shape (T, H) or (B, S, H) with H = {H}, got {shape}")
        if tokens.dtype.name != self.dtype:
            raise TypeError(
                f"hidden_states must have the dtype of the layer = {self.dtype}, got {tokens.dtype.name}; convert it"
            )
        if _arrays.place(tokens) != _arrays.place(self.router_weight):
            raise TypeError(
                f"hidden_states must be where the layer is = {_arrays.place(self.router_weight)}, "
                f"got {_arrays.place(tokens)}; copy them there"
            )
        return side, tokens.reshape(int(np.prod(shape[:-1])), H)

    def _route(self, xp: Any, tokens: Array) -> tuple[Array, Array]:
        routing = self.routing
        logits = _linear(xp, tokens, self.router_weight, self.logit_bias)
        settings: dict[str, Any] = {
            "renormalize": routing.renormalize,
            "scoring_func": routing.scoring_func,
            "e_score_correction_bias": self.router_bias,
            "routed_scaling_factor": routing.routed_scaling_factor,
        }
        if routing.num_expert_group is None:
            topk_weights, topk_ids = fused_topk(logits, routing.top_k, **settings)
        else:
            topk_weights, topk_ids = grouped_topk(
                logits,
                routing.top_k,
                num_expert_group=routing.num_expert_group,
                topk_group=routing.topk_group,
                **settings,
            )
        if routing.rounded_weights:
            topk_weights = topk_weights.astype(logits.dtype).astype(np.float32)
        return topk_weights, topk_ids


def _shared_weights(xp: Any, tokens: Array, gate_weight: Array | None) -> tuple[Array, Array]:
    """Weights (T, 1) and ids (T, 1) of the shared expert: a choice among one."""
    if gate_weight is None:
        return xp.ones((len(tokens), 1), dtype=np.float32), xp.zeros((len(tokens), 1), dtype=np.int32)
    logits = _linear(xp, tokens, gate_weight)
    weights, ids = fused_topk(logits, 1, renormalize=False, scoring_func="sigmoid")
    return weights.astype(tokens.dtype).astype(np.float32), ids


def _linear(xp: Any, tokens: Array, weight: Array, bias: Array | None = None) -> Array:
    """``tokens @ weight.T + bias`` in the dtype of `weight`; a row's bits do not depend on the other rows."""
    whole = xp.arange(2, dtype=np.int64) * len(tokens)
    bias = None if bias is None else bias[None]
    return grouped_gemm(tokens.astype(weight.dtype, copy=False), weight[None], whole, bias=bias)
