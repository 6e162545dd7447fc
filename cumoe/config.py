"""
The configuration of an MoE layer: its sizes, how it is cut over devices, how it routes, how it is quantised.

Numbers and names only; the arrays that a quantisation config carries are held and never looked into.
"""

from dataclasses import KW_ONLY, dataclass
from enum import IntEnum
from operator import attrgetter
from typing import Any

from cumoe import _check
from cumoe._parallel_config import FusedMoEParallelConfig
from cumoe._quant_builders import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    biased_moe_quant_config,
    fp8_w8a8_moe_quant_config,
    fp8_w8a16_moe_quant_config,
    gptq_marlin_moe_quant_config,
    int4_w4a16_moe_quant_config,
    int4_w4afp8_moe_quant_config,
    int8_w8a8_moe_quant_config,
    int8_w8a16_moe_quant_config,
)
from cumoe._quant_builders_mx import (
    mxfp4_moe_quant_config,
    mxfp4_mxfp8_moe_quant_config,
    mxfp4_w4a4_moe_quant_config,
    mxfp4_w4a8_moe_quant_config,
    mxfp4_w4a16_moe_quant_config,
    nvfp4_moe_quant_config,
    nvfp4_w4a16_moe_quant_config,
    ocp_mx_moe_quant_config,
)
from cumoe._quant_config import FusedMoEQuantConfig, _get_config_dtype_str
from cumoe._quant_desc import DType, FusedMoEQuantDesc, GroupShape, _quant_flags_to_group_shape, dtype_name

__all__ = [
    "DEFAULT_MAX_NUM_TOKENS",
    "FUSED_MOE_UNQUANTIZED_CONFIG",
    "FusedMoEConfig",
    "FusedMoEParallelConfig",
    "FusedMoEQuantConfig",
    "FusedMoEQuantDesc",
    "GroupShape",
    "RoutingMethodType",
    "_get_config_dtype_str",
    "_quant_flags_to_group_shape",
    "biased_moe_quant_config",
    "fp8_w8a8_moe_quant_config",
    "fp8_w8a16_moe_quant_config",
    "get_routing_method_type",
    "gptq_marlin_moe_quant_config",
    "int4_w4a16_moe_quant_config",
    "int4_w4afp8_moe_quant_config",
    "int8_w8a8_moe_quant_config",
    "int8_w8a16_moe_quant_config",
    "mxfp4_moe_quant_config",
    "mxfp4_mxfp8_moe_quant_config",
    "mxfp4_w4a4_moe_quant_config",
    "mxfp4_w4a8_moe_quant_config",
    "mxfp4_w4a16_moe_quant_config",
    "nvfp4_moe_quant_config",
    "nvfp4_w4a16_moe_quant_config",
    "ocp_mx_moe_quant_config",
]

DEFAULT_MAX_NUM_TOKENS = 256  # rows that each rank may send to one expert in the batched format


class RoutingMethodType(IntEnum):
    """
    How a router turns logits into experts and weights.

    The numbers are those of vLLM; other libraries number the same names differently, so exchange names.
    """

    Default = 0  # softmax, then top-k
    Renormalize = 1  # top-k, then softmax over the chosen
    DeepSeekV3 = 2  # sigmoid, bias, groups by their two best, top-k
    Llama4 = 3  # top-k of the logits, then sigmoid
    RenormalizeNaive = 4  # softmax, top-k, divide by the sum of the chosen
    TopK = 5  # top-k of the logits as they are
    SigmoidRenorm = 6  # sigmoid, top-k, divide by the sum of the chosen
    MiniMax2 = 7  # sigmoid, bias, top-k, divide by the sum of the chosen, scale
    Sigmoid = 8  # sigmoid, top-k
    Unspecified = 9
    DeepseekV4 = 100  # sqrt(softplus), bias, top-k, divide by the sum of the chosen
    Custom = 101
    Simulated = 102


def get_routing_method_type(
    scoring_func: str,
    top_k: int,
    renormalize: bool,
    num_expert_group: int | None,
    has_e_score_bias: bool,
) -> RoutingMethodType:
    """
    Name the routing method that a router's settings amount to.

    Parameters
    ----------
    scoring_func : {"softmax", "sigmoid", "sqrtsoftplus"}
        From logit to score; any other name gives ``Unspecified``.
    top_k : int
        Experts a token; no method depends on it.
    renormalize : bool
        Whether the weights of a token are divided by their sum.
    num_expert_group : int or None
        Expert groups; None or 0 without.
    has_e_score_bias : bool
        Whether a bias takes part in the choice.

    Returns
    -------
    method : RoutingMethodType

    Examples
    --------
    >>> from cumoe import get_routing_method_type
    >>> get_routing_method_type("sigmoid", 8, True, 8, True).name
    'DeepSeekV3'
    """
    method = RoutingMethodType
    if scoring_func == "sqrtsoftplus":
        return method.DeepseekV4 if renormalize else method.Unspecified
    if has_e_score_bias:
        if scoring_func != "sigmoid" or not renormalize:
            return method.Unspecified
        return method.DeepSeekV3 if (num_expert_group or 0) > 0 else method.MiniMax2
    if scoring_func == "sigmoid":
        return method.SigmoidRenorm if renormalize else method.Sigmoid
    if scoring_func == "softmax":
        return method.RenormalizeNaive if renormalize else method.Default
    return method.Unspecified


def _of_parallel(name: str) -> Any:
    return property(attrgetter(f"moe_parallel_config.{name}"), doc=f"The `{name}` of `moe_parallel_config`.")


@dataclass(frozen=True)
class FusedMoEConfig:
    """
    Everything about an MoE layer but its arrays.

    Parameters
    ----------
    num_experts : int
        Experts of the whole layer.
    experts_per_token : int
        Experts that each token goes to.
    hidden_dim : int
        Length of a token.
    num_local_experts : int
        Experts that this device owns.
    moe_parallel_config : FusedMoEParallelConfig
        How the layer is cut over devices.
    in_dtype : dtype or str
        Number format of the tokens: NumPy, ml_dtypes, torch or a name.
    max_num_tokens : int, default 256
        Tokens that a rank sends at most in the batched format.
    has_bias : bool, default False
        Whether each product has a bias.
    is_act_and_mul : bool, optional
        Whether w13 holds gate and up rows; follows from `activation` if None. False turns a gated
        activation into its plain form: ``"silu"`` into ``"silu_no_mul"``.
    activation : str, default "silu"
        Name of the activation; plain ones end in ``_no_mul``.
    intermediate_size, intermediate_size_per_partition : int, optional
        Width of an expert, in all and on this device; each follows from the other.
    hidden_dim_unpadded, intermediate_size_per_partition_unpadded : int, optional
        Sizes before padding; the padded ones if None.
    num_logical_experts : int, optional
        Experts before replication; `num_experts` if None.
    device : str or device object, default "cpu"
        Where the layer runs: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
    routing_method : RoutingMethodType or str, default "Unspecified"
        How the router works; a name or a member.
    router_logits_dtype : dtype or str, optional
        Number format of the router's output; `in_dtype` if None.
    moe_backend : str, default "auto"
        Which kernels run the layer.
    is_lora_enabled, has_hash_routing : bool, default False
        Whether experts have low-rank adapters; whether token ids choose the experts.
    skip_final_all_reduce : bool, default False
        Leave partial sums of tensor parallel devices to the caller.
    max_capture_size : int, default 0
        Largest batch that a graph captures.
    tp_shard_with_padding : bool, default False
        Round each device's share of the width up when it does not divide.
    swiglu_limit, swiglu_alpha, swiglu_beta : float, optional
        Parameters of the clamped gated activations.
    activation_situ_beta, activation_situ_linear_beta : float, optional
        Parameters of ``"situ"``.

    Raises
    ------
    ValueError
        A size out of range, or sizes that contradict each other.

    Examples
    --------
    >>> from cumoe import FusedMoEConfig, FusedMoEParallelConfig
    >>> parallel = FusedMoEParallelConfig.make(tp_size=2)
    >>> config = FusedMoEConfig(8, 2, 4096, 8, parallel, "bfloat16", intermediate_size=14336)
    >>> config.intermediate_size_per_partition, config.tp_size, config.is_act_and_mul
    (7168, 2, True)
    """

    num_experts: int
    experts_per_token: int
    hidden_dim: int
    num_local_experts: int
    moe_parallel_config: FusedMoEParallelConfig
    in_dtype: DType
    max_num_tokens: int = DEFAULT_MAX_NUM_TOKENS
    has_bias: bool = False
    _: KW_ONLY
    is_act_and_mul: bool | None = None
    activation: str = "silu"
    intermediate_size: int | None = None
    intermediate_size_per_partition: int | None = None
    intermediate_size_per_partition_unpadded: int | None = None
    hidden_dim_unpadded: int | None = None
    num_logical_experts: int | None = None
    device: Any = "cpu"
    routing_method: RoutingMethodType | str = RoutingMethodType.Unspecified
    router_logits_dtype: DType = None
    moe_backend: str = "auto"
    is_lora_enabled: bool = False
    has_hash_routing: bool = False
    skip_final_all_reduce: bool = False
    max_capture_size: int = 0
    tp_shard_with_padding: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float | None = None
    swiglu_beta: float | None = None
    activation_situ_beta: float | None = None
    activation_situ_linear_beta: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.moe_parallel_config, FusedMoEParallelConfig):
            kind = type(self.moe_parallel_config).__name__
            raise TypeError(f"moe_parallel_config must be a FusedMoEParallelConfig, got {kind}")
        _check.integer("num_experts", self.num_experts, 1)
        _check.integer("experts_per_token", self.experts_per_token, 1, self.num_experts)
        _check.integer("hidden_dim", self.hidden_dim, 1)
        _check.integer("num_local_experts", self.num_local_experts, 0, self.num_experts)
        _check.integer("max_num_tokens", self.max_num_tokens, 1)
        _check.integer("max_capture_size", self.max_capture_size, 0)
        if dtype_name(self.in_dtype) is None:
            raise TypeError("in_dtype must be a dtype or a name, got None")
        self._settle("router_logits_dtype", self.in_dtype)
        self._settle("hidden_dim_unpadded", self.hidden_dim)
        self._settle("num_logical_experts", self.num_experts)
        _check.integer("hidden_dim_unpadded", self.hidden_dim_unpadded, 1, self.hidden_dim)
        _check.integer("num_logical_experts", self.num_logical_experts, 1, self.num_experts)
        if isinstance(self.routing_method, str):
            _check.choice("routing_method", self.routing_method, RoutingMethodType.__members__)
            object.__setattr__(self, "routing_method", RoutingMethodType[self.routing_method])
        self._settle_activation()
        self._settle_width()

    def _settle(self, name: str, default: Any) -> None:
        """Fill a field that was left open; the class is frozen for everyone else."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, default)

    def _settle_activation(self) -> None:
        plain = self.activation.endswith("_no_mul")
        if self.is_act_and_mul and plain:
            raise ValueError(f"activation must be gated when is_act_and_mul is True, got {self.activation!r}")
        if self.is_act_and_mul is False and not plain:
            object.__setattr__(self, "activation", f"{self.activation}_no_mul")
        self._settle("is_act_and_mul", not plain)

    def _settle_width(self) -> None:
        whole, part, tp_size = self.intermediate_size, self.intermediate_size_per_partition, self.tp_size
        for name in ("intermediate_size", "intermediate_size_per_partition"):
            if getattr(self, name) is not None:
                _check.integer(name, getattr(self, name), 1)
        if whole is not None:
            if whole % tp_size and not self.tp_shard_with_padding:
                raise ValueError(
                    f"intermediate_size must be a multiple of tp_size = {tp_size}, got {whole}; "
                    "or set tp_shard_with_padding=True"
                )
            share = -(-whole // tp_size)
            if part not in (None, share):
                raise ValueError(
                    f"intermediate_size_per_partition must be intermediate_size / tp_size = {share}, got {part}"
                )
            self._settle("intermediate_size_per_partition", share)
        elif part is not None:
            self._settle("intermediate_size", part * tp_size)
        self._settle("intermediate_size_per_partition_unpadded", self.intermediate_size_per_partition)
        unpadded = self.intermediate_size_per_partition_unpadded
        if unpadded is not None:
            _check.integer(
                "intermediate_size_per_partition_unpadded", unpadded, 1, self.intermediate_size_per_partition
            )

    # what the parallel config knows
    tp_size = _of_parallel("tp_size")
    tp_rank = _of_parallel("tp_rank")
    dp_size = _of_parallel("dp_size")
    dp_rank = _of_parallel("dp_rank")
    pcp_size = _of_parallel("pcp_size")
    pcp_rank = _of_parallel("pcp_rank")
    ep_size = _of_parallel("ep_size")
    ep_rank = _of_parallel("ep_rank")
    sp_size = _of_parallel("sp_size")
    use_ep = _of_parallel("use_ep")
    is_sequence_parallel = _of_parallel("is_sequence_parallel")
    use_all2all_kernels = _of_parallel("use_all2all_kernels")
    use_pplx_kernels = _of_parallel("use_pplx_kernels")
    use_deepep_ht_kernels = _of_parallel("use_deepep_ht_kernels")
    use_deepep_ll_kernels = _of_parallel("use_deepep_ll_kernels")
    use_deepep_v2_kernels = _of_parallel("use_deepep_v2_kernels")
    use_mori_kernels = _of_parallel("use_mori_kernels")
    use_nixl_ep_kernels = _of_parallel("use_nixl_ep_kernels")
    use_fi_nvl_two_sided_kernels = _of_parallel("use_fi_nvl_two_sided_kernels")
    use_fi_nvl_one_sided_kernels = _of_parallel("use_fi_nvl_one_sided_kernels")
    use_ag_rs_all2all_kernels = _of_parallel("use_ag_rs_all2all_kernels")
    needs_round_robin_routing_tables = _of_parallel("needs_round_robin_routing_tables")

    @property
    def use_flashinfer_cutlass_kernels(self) -> bool:
        """Whether FlashInfer's CUTLASS kernels run the layer: never, cumoe has its own."""
        return False

    @property
    def w13_num_shards(self) -> int:
        """Matrices stacked in w13: gate and up, or up alone."""
        return 2 if self.is_act_and_mul else 1
