"""
The Mixture-of-Experts layer as array functions: NumPy in, NumPy out; CuPy in, CuPy out.

Every public name is imported at its first use, so that ``import cumoe`` loads neither numba nor cupy.
"""

import importlib
from typing import Any

from cumoe._version import __version__

# public name -> the module that defines it
_HOME: dict[str, str] = {
    "moe_activation": "cumoe._act",
    "gelu_and_mul": "cumoe._activations",
    "gelu_no_mul": "cumoe._activations",
    "gelu_tanh_and_mul": "cumoe._activations",
    "gelu_tanh_no_mul": "cumoe._activations",
    "relu2_no_mul": "cumoe._activations",
    "silu_and_mul": "cumoe._activations",
    "silu_no_mul": "cumoe._activations",
    "situ_and_mul": "cumoe._activations",
    "swigluoai_and_mul": "cumoe._activations",
    "swiglustep_and_mul": "cumoe._activations",
    "batched_moe_align_block_size": "cumoe._align",
    "count_expert_num_tokens": "cumoe._align",
    "moe_align_block_size": "cumoe._align",
    "naive_block_assignment": "cumoe._align",
    "use_naive_block_assignment": "cumoe._align",
    "moe_batch": "cumoe._batched",
    "moe_unbatch": "cumoe._batched",
    "from_compressed_tensors_fp8": "cumoe._checkpoint_8bit",
    "from_compressed_tensors_int8": "cumoe._checkpoint_8bit",
    "from_deepseek_fp8": "cumoe._checkpoint_8bit",
    "to_compressed_tensors_fp8": "cumoe._checkpoint_8bit",
    "to_compressed_tensors_int8": "cumoe._checkpoint_8bit",
    "to_deepseek_fp8": "cumoe._checkpoint_8bit",
    "from_compressed_tensors_nvfp4": "cumoe._checkpoint_fp4",
    "from_gpt_oss_mxfp4": "cumoe._checkpoint_fp4",
    "from_modelopt_nvfp4": "cumoe._checkpoint_fp4",
    "to_compressed_tensors_nvfp4": "cumoe._checkpoint_fp4",
    "to_gpt_oss_mxfp4": "cumoe._checkpoint_fp4",
    "to_modelopt_nvfp4": "cumoe._checkpoint_fp4",
    "from_awq": "cumoe._checkpoint_int4",
    "from_gptq": "cumoe._checkpoint_int4",
    "to_awq": "cumoe._checkpoint_int4",
    "to_gptq": "cumoe._checkpoint_int4",
    "from_compressed_tensors_packed": "cumoe._checkpoint_packed",
    "to_compressed_tensors_packed": "cumoe._checkpoint_packed",
    "dense_from_topk": "cumoe._dense_route",
    "topk_from_dense": "cumoe._dense_route",
    "detect_layout": "cumoe._detect_layout",
    "dequantize": "cumoe._formats",
    "quantize": "cumoe._formats",
    "grouped_gemm": "cumoe._grouped_gemm",
    "grouped_topk": "cumoe._grouped_route",
    "aligned_end_offsets": "cumoe._layouts",
    "first_token_offset": "cumoe._layouts",
    "grouped_mm_offsets": "cumoe._layouts",
    "ragged_dot_group_sizes": "cumoe._layouts",
    "tma_aligned_scale": "cumoe._layouts",
    "fused_experts": "cumoe._moe",
    "fused_moe": "cumoe._moe",
    "pack_int4": "cumoe._packing",
    "swizzle_scales": "cumoe._packing",
    "unpack_int4": "cumoe._packing",
    "unswizzle_scales": "cumoe._packing",
    "aligned_num_rows": "cumoe._permute",
    "moe_permute": "cumoe._permute",
    "moe_permute_aligned": "cumoe._permute",
    "Plan": "cumoe._plan",
    "plan": "cumoe._plan",
    "prepare": "cumoe._prepare",
    "PreparedExperts": "cumoe._prepare",
    "topk_weight_and_reduce": "cumoe._reduce",
    "fused_topk": "cumoe._route",
    "hash_topk": "cumoe._route",
    "Quantized": "cumoe._schemes",
    "append_shared_experts": "cumoe._select_experts",
    "llama4_routing": "cumoe._select_experts",
    "select_experts": "cumoe._select_experts",
    "halve_groups": "cumoe._shard_scales",
    "merge_w13_scales": "cumoe._shard_scales",
    "w4a8_scales": "cumoe._shard_scales",
    "simulated_routing": "cumoe._simulated_routing",
    "zero_experts": "cumoe._special_experts",
    "moe_fused_mul_sum": "cumoe._unpermute",
    "moe_sum": "cumoe._unpermute",
    "moe_unpermute": "cumoe._unpermute",
    "Verification": "cumoe._verify",
    "verify": "cumoe._verify",
    "Layout": "cumoe._weight_layout",
    "load_layer": "cumoe.checkpoints",
    "biased_moe_quant_config": "cumoe.config",
    "fp8_w8a16_moe_quant_config": "cumoe.config",
    "fp8_w8a8_moe_quant_config": "cumoe.config",
    "FUSED_MOE_UNQUANTIZED_CONFIG": "cumoe.config",
    "FusedMoEConfig": "cumoe.config",
    "FusedMoEParallelConfig": "cumoe.config",
    "FusedMoEQuantConfig": "cumoe.config",
    "FusedMoEQuantDesc": "cumoe.config",
    "get_routing_method_type": "cumoe.config",
    "gptq_marlin_moe_quant_config": "cumoe.config",
    "GroupShape": "cumoe.config",
    "int4_w4a16_moe_quant_config": "cumoe.config",
    "int4_w4afp8_moe_quant_config": "cumoe.config",
    "int8_w8a16_moe_quant_config": "cumoe.config",
    "int8_w8a8_moe_quant_config": "cumoe.config",
    "mxfp4_moe_quant_config": "cumoe.config",
    "mxfp4_mxfp8_moe_quant_config": "cumoe.config",
    "mxfp4_w4a16_moe_quant_config": "cumoe.config",
    "mxfp4_w4a4_moe_quant_config": "cumoe.config",
    "mxfp4_w4a8_moe_quant_config": "cumoe.config",
    "nvfp4_moe_quant_config": "cumoe.config",
    "nvfp4_w4a16_moe_quant_config": "cumoe.config",
    "ocp_mx_moe_quant_config": "cumoe.config",
    "RoutingMethodType": "cumoe.config",
    "routing_report": "cumoe.inspection",
    "RoutingReport": "cumoe.inspection",
    "MoELayer": "cumoe.layer",
    "Parameter": "cumoe.method",
    "QuantizedFusedMoEMethod": "cumoe.method",
    "UnquantizedFusedMoEMethod": "cumoe.method",
    "determine_expert_map": "cumoe.parallel",
    "round_robin_routing_tables": "cumoe.parallel",
}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604  they are strings


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cumoe' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
