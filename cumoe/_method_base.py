"""
What every method has in common: who runs the layer, and how tokens go through it.

The subclass knows the weights.
"""

from collections.abc import Callable
from typing import Any

from cumoe import _act, _arrays, _check
from cumoe._arrays import Array
from cumoe._backends import select_backend
from cumoe._layer_weights import weight_of
from cumoe._modular import FusedMoEActivationFormat, run_modular
from cumoe._modular_experts import BatchedExperts, StandardExperts
from cumoe._moe import fused_experts
from cumoe._prepare import prepare
from cumoe._prepare_finalize import BatchedPrepareAndFinalize, MoEPrepareAndFinalizeNoEP
from cumoe._quant_config import FusedMoEQuantConfig
from cumoe._select_experts import select_experts
from cumoe.config import FusedMoEConfig


class FusedMoEMethodBase:
    """Backend and computation of an MoE layer; a subclass makes and prepares the weights."""

    def __init__(self, moe: FusedMoEConfig) -> None:
        if not isinstance(moe, FusedMoEConfig):
            raise TypeError(f"moe must be a FusedMoEConfig, got {type(moe).__name__}")
        _act.parameters(moe.activation, None, moe)
        self.moe = moe
        self.backend, self.refused_backends = select_backend(moe)
        self.moe_quant_config: FusedMoEQuantConfig | None = None
        self.prepare_finalize: Any = None
        self.experts: StandardExperts | BatchedExperts | None = None

    @property
    def supports_eplb(self) -> bool:
        """Whether experts may be replicated to balance the load."""
        return True

    @property
    def allow_inplace(self) -> bool:
        """Whether results may overwrite the tokens."""
        return True

    @property
    def is_monolithic(self) -> bool:
        """Whether the backend routes too, so that `apply_monolithic` is the way to call it."""
        return self.backend == "cpu"

    @property
    def topk_indices_dtype(self) -> str | None:
        """Dtype of expert ids that a transport insists on; None takes any."""
        return None if self.prepare_finalize is None else self.prepare_finalize.topk_indices_dtype()

    def maybe_make_prepare_finalize(self, routing_tables: tuple[Array, Array, Array] | None = None) -> Any:
        """
        Make the outer steps of a modular layer, if ranks exchange tokens.

        Parameters
        ----------
        routing_tables : three arrays, optional
            From `round_robin_routing_tables`, if experts are dealt out in turn.

        Returns
        -------
        prepare_finalize : object or None
            None if tokens stay on their rank.
        """
        moe, parallel = self.moe, self.moe.moe_parallel_config
        if not parallel.use_all2all_kernels or not moe.num_local_experts:
            return None
        if not parallel.use_batched_activation_format:
            return MoEPrepareAndFinalizeNoEP()
        each, rest = divmod(moe.num_experts, parallel.ep_size)
        return BatchedPrepareAndFinalize(
            moe.max_num_tokens,
            moe.num_local_experts,
            num_dispatchers=parallel.dp_size * parallel.pcp_size * parallel.sp_size,
            first_expert=parallel.ep_rank * each + min(parallel.ep_rank, rest),
            routing_tables=routing_tables,
        )

    def select_gemm_impl(self, prepare_finalize: Any, layer: Any) -> StandardExperts | BatchedExperts:
        """
        Choose the middle step of a modular layer for the format that its outer steps speak.

        Parameters
        ----------
        prepare_finalize : object
            Has `activation_format` and `num_dispatchers`.
        layer : object
            The layer, processed.

        Returns
        -------
        experts : StandardExperts or BatchedExperts
            Has `apply` and `workspace_shapes`.

        Raises
        ------
        ValueError
            The weights are not processed yet.
        """
        if self.moe_quant_config is None:
            raise ValueError("moe_quant_config must be set, got None; call process_weights_after_loading first")
        if prepare_finalize.activation_format is FusedMoEActivationFormat.BatchedExperts:
            return BatchedExperts(self.moe.max_num_tokens, prepare_finalize.num_dispatchers(), self.moe_quant_config)
        return StandardExperts(self.moe_quant_config)

    @_arrays.on_callers_stream
    def apply(
        self,
        layer: Any,
        x: Array,
        topk_weights: Array,
        topk_ids: Array,
        *,
        activation: str | None = None,
        apply_router_weight_on_input: bool | str | None = None,
        global_num_experts: int | None = None,
        expert_map: Array | None = None,
        inplace: bool = False,
        out: Array | None = None,
        check: bool = False,
        workspace_limit: int | None = None,
        workspace: Array | None = None,
    ) -> Array:
        """
        Run routed tokens through their experts.

        An argument that is None is taken from the attribute of that name of `layer`, if there is one,
        else from the config.

        Parameters
        ----------
        layer : object
            Processed by `process_weights_after_loading`.
        x : (T, H) array, float32, float16 or bfloat16
            Tokens, of the dtype of the weights.
        topk_weights : (T, k) array, float32
            Weight of each choice.
        topk_ids : (T, k) array, int32, int64 or uint32
            Expert of each choice; ids below 0 are skipped.
        activation : str, optional
            Must be that of the config, for which the weights are packed.
        apply_router_weight_on_input : bool or str, optional
            As in `fused_experts`; default False.
        global_num_experts : int, optional
            Experts that ids count over; also -1 stands for that of the config.
        expert_map : (global_num_experts,) int32 array, optional
            Row of each expert in the weights of this rank, from `determine_expert_map`.
        inplace : bool, default False
            Write the results over `x` and return it.
        out : (T, H) array, optional
            Written and returned if given.
        check, workspace_limit, workspace
            As in `fused_experts`.

        Returns
        -------
        out : (T, H) array, dtype of `x`
            The part that the experts of this rank contribute.

        Raises
        ------
        TypeError, ValueError, NotImplementedError
            As `fused_experts` raises them, or the layer is not processed.
        """
        if activation not in (None, self.moe.activation):
            raise ValueError(f"activation must be that of the config = {self.moe.activation!r}, got {activation!r}")
        if inplace and out is not None:
            raise ValueError(f"out must be None with inplace=True, got {type(out).__name__}")
        on_input = _chosen(layer, "apply_router_weight_on_input", apply_router_weight_on_input, False)
        num_global = _chosen(layer, "global_num_experts", global_num_experts, self.moe.num_experts)
        num_global = self.moe.num_experts if num_global == -1 else num_global
        expert_map = _chosen(layer, "expert_map", expert_map, None)
        if not self.moe.num_local_experts:
            result = _zeros(x, out)
        elif getattr(layer, "prepared_experts", None) is None:
            raise ValueError("layer must have prepared_experts; call process_weights_after_loading first")
        elif self.prepare_finalize is not None and self.experts is not None and self.moe_quant_config is not None:
            if self.experts.supports_expert_map():
                self._need_map(expert_map)
            result = run_modular(
                self.prepare_finalize,
                self.experts,
                x,
                layer.prepared_experts,
                topk_weights,
                topk_ids,
                self.moe_quant_config,
                on_input,
                num_global,
                expert_map,
                out,
                check,
                workspace_limit,
                workspace,
            )
        else:
            self._need_map(expert_map)
            result = fused_experts(
                x,
                layer.prepared_experts,
                None,
                topk_weights,
                topk_ids,
                activation=self.moe.activation,
                apply_router_weight_on_input=on_input,
                expert_map=expert_map,
                global_num_experts=num_global,
                out=out,
                check=check,
                workspace_limit=workspace_limit,
                workspace=workspace,
            )
        if not inplace:
            return result
        _, (target, source) = _arrays.enter(x=x, result=result)
        _check.writeable("x", target)
        target[...] = source
        return x

    @_arrays.on_callers_stream
    def apply_monolithic(
        self,
        layer: Any,
        x: Array,
        router_logits: Array,
        *,
        top_k: int | None = None,
        renormalize: bool | None = None,
        use_grouped_topk: bool | None = None,
        topk_group: int | None = None,
        num_expert_group: int | None = None,
        custom_routing_function: Callable[..., tuple[Array, Array]] | None = None,
        scoring_func: str | None = None,
        routed_scaling_factor: float | None = None,
        e_score_correction_bias: Array | None = None,
        routing: dict[str, Any] | None = None,
        **experts: Any,
    ) -> Array:
        """
        Route tokens and run them through their experts.

        An argument that is None is taken from the attribute of that name of `layer`, if there is one,
        else it has the default of `select_experts`; `top_k` that of the config.

        Parameters
        ----------
        layer : object
            Processed by `process_weights_after_loading`.
        x : (T, H) array, float32, float16 or bfloat16
            Tokens.
        router_logits : (T, E) array, float32, float16 or bfloat16
            One logit for each token and expert of all ranks.
        top_k, renormalize, use_grouped_topk, topk_group, num_expert_group : optional
            As in `select_experts`.
        custom_routing_function, scoring_func, routed_scaling_factor, e_score_correction_bias : optional
            As in `select_experts`.
        routing : dict, optional
            Further arguments of `select_experts`, such as `hash_indices_table` and `input_ids`.
        **experts
            Further arguments of `apply`: `global_num_experts`, `expert_map`, `activation`,
            `apply_router_weight_on_input`, `inplace`, `out`, `check`, `workspace_limit` and `workspace`.

        Returns
        -------
        out : (T, H) array, dtype of `x`
            The part that the experts of this rank contribute.

        Raises
        ------
        TypeError, ValueError, NotImplementedError
            As `select_experts` and `apply` raise them.
        """
        if (routing or {}).get("zero_expert_type") is not None:
            raise NotImplementedError("no way to route zero_expert_type here; call select_experts, apply and add")
        topk_weights, topk_ids = select_experts(
            x,
            router_logits,
            _chosen(layer, "top_k", top_k, self.moe.experts_per_token),
            renormalize=_chosen(layer, "renormalize", renormalize, True),
            use_grouped_topk=_chosen(layer, "use_grouped_topk", use_grouped_topk, False),
            topk_group=_chosen(layer, "topk_group", topk_group, None),
            num_expert_group=_chosen(layer, "num_expert_group", num_expert_group, None),
            custom_routing_function=_chosen(layer, "custom_routing_function", custom_routing_function, None),
            scoring_func=_chosen(layer, "scoring_func", scoring_func, "softmax"),
            routed_scaling_factor=_chosen(layer, "routed_scaling_factor", routed_scaling_factor, 1.0),
            e_score_correction_bias=_chosen(layer, "e_score_correction_bias", e_score_correction_bias, None),
            **{"indices_dtype": self.topk_indices_dtype or "int32", **(routing or {})},
        )
        return self.apply(layer, x, topk_weights, topk_ids, **experts)

    def _make_ready(self, layer: Any, w13: Array, w2: Array) -> None:
        """Pack the weights of a layer, in the memory of last time, and make the steps of a modular one."""
        if self.moe.num_local_experts:
            layer.prepared_experts = prepare(
                w13,
                w2,
                quant_config=self.moe_quant_config,
                activation=self.moe.activation,
                out=getattr(layer, "prepared_experts", None),
            )
        self.prepare_finalize = self.maybe_make_prepare_finalize(getattr(layer, "expert_routing_tables", None))
        self.experts = None if self.prepare_finalize is None else self.select_gemm_impl(self.prepare_finalize, layer)

    def _epilogue(self, layer: Any) -> dict[str, Any]:
        """Biases of a layer and parameters of its activation, as the builders of a quantisation config take them."""
        moe = self.moe
        situ = moe.activation == "situ"
        parameters = {
            "gemm1_alpha": moe.swiglu_alpha,
            "gemm1_beta": moe.activation_situ_beta if situ else moe.swiglu_beta,
            "gemm1_clamp_limit": moe.activation_situ_linear_beta if situ else moe.swiglu_limit,
        }
        given = {name: value for name, value in parameters.items() if value is not None}
        if not moe.has_bias:
            return given
        return {"w1_bias": weight_of(layer, "w13_bias"), "w2_bias": weight_of(layer, "w2_bias"), **given}

    def _need_map(self, expert_map: Array | None) -> None:
        moe = self.moe
        if expert_map is None and moe.num_local_experts < moe.num_experts:
            raise ValueError(
                f"expert_map must be given for num_local_experts = {moe.num_local_experts} of {moe.num_experts} "
                "experts, got None; see determine_expert_map"
            )


def _chosen(layer: Any, name: str, given: Any, default: Any) -> Any:
    """Give the argument, else the layer's attribute, else the default."""
    value = getattr(layer, name, None) if given is None else given
    return default if value is None else value


def _zeros(x: Array, out: Array | None) -> Array:
    """What a rank without experts contributes."""
    side, (tokens, target) = _arrays.enter(x=x, out=out)
    if target is None:
        return side.leave(side.xp.zeros(tokens.shape, tokens.dtype))
    _check.output("out", target, "(T, H)", tuple(tokens.shape), tokens.dtype.name, x=tokens)
    target[...] = 0
    return side.leave(target)
