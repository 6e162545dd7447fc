"""
One builder a quantisation scheme, each giving a FusedMoEQuantConfig, named as in vLLM.

All take ``**others``, the further fields of FusedMoEQuantConfig: `gemm1_alpha`, `gemm1_beta`,
`gemm1_clamp_limit`, `is_scale_swizzled`, `is_scale_transposed` and `mx_alignment`. Those of mxfp4 and nvfp4 take
`is_weight_scale_swizzled` besides: scales of weights in blocks of 128 x 4.
"""

from collections.abc import Sequence
from typing import Any

from cumoe import _check
from cumoe._arrays import Array
from cumoe._quant_config import FusedMoEQuantConfig
from cumoe._quant_desc import FLOAT8_E4M3FN, INT8, DType, FusedMoEQuantDesc, GroupShape, group_shape

Block = Sequence[int] | None

FUSED_MOE_UNQUANTIZED_CONFIG = FusedMoEQuantConfig.make()


def biased_moe_quant_config(w1_bias: Array, w2_bias: Array, **others: Any) -> FusedMoEQuantConfig:
    """
    Nothing quantised; a bias after each product.

    Parameters
    ----------
    w1_bias, w2_bias : (E, 2I) and (E, H) array, or None
        Biases, in the dtype of the weights.
    **others
        Further fields of FusedMoEQuantConfig.

    Returns
    -------
    config : FusedMoEQuantConfig

    Examples
    --------
    >>> import numpy as np
    >>> from cumoe import biased_moe_quant_config
    >>> config = biased_moe_quant_config(np.zeros((2, 8)), np.zeros((2, 4)), gemm1_clamp_limit=7.0)
    >>> config.w1_bias.shape, config.is_quantized
    ((2, 8), False)
    """
    return _weight_only(None, None, None, None, w1_bias=w1_bias, w2_bias=w2_bias, **others)


def fp8_w8a8_moe_quant_config(
    w1_scale: Array,
    w2_scale: Array,
    a1_scale: Array = None,
    a2_scale: Array = None,
    per_act_token_quant: bool = False,
    per_out_ch_quant: bool = False,
    block_shape: Block = None,
    **others: Any,
) -> FusedMoEQuantConfig:
    """
    Weights and activations in float8_e4m3fn.

    Parameters
    ----------
    w1_scale, w2_scale : float32 array
        (E,) per tensor, (E, N) or (E, N, 1) per channel, (E, ceil(N / rows), ceil(K / columns)) per block.
    a1_scale, a2_scale : float32 array, optional
        Static activation scales; None quantises each batch by its own maximum.
    per_act_token_quant, per_out_ch_quant : bool, default False
        One scale a token; one scale an output channel.
    block_shape : two ints, optional
        Rows and columns of a weight block; activations use its columns.
    **others
        `w1_bias`, `w2_bias`, `g1_alphas`, `g2_alphas`, `a1_gscale`, `a2_gscale` and further fields of
        FusedMoEQuantConfig.

    Returns
    -------
    config : FusedMoEQuantConfig

    Examples
    --------
    >>> import numpy as np
    >>> from cumoe import fp8_w8a8_moe_quant_config
    >>> scale = np.ones((8, 2, 2), np.float32)
    >>> fp8_w8a8_moe_quant_config(scale, scale, block_shape=[128, 128]).scale_shape(5, 200)
    (5, 2)
    """
    return FusedMoEQuantConfig.make(
        FLOAT8_E4M3FN,
        per_act_token_quant,
        per_out_ch_quant,
        block_shape,
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        a1_scale=a1_scale,
        a2_scale=a2_scale,
        **others,
    )


def int8_w8a8_moe_quant_config(
    w1_scale: Array,
    w2_scale: Array,
    a1_scale: Array = None,
    a2_scale: Array = None,
    per_act_token_quant: bool = False,
    **others: Any,
) -> FusedMoEQuantConfig:
    """
    Weights and activations in int8.

    Parameters
    ----------
    w1_scale, w2_scale : float32 array
        (E,) per tensor or (E, N, 1) per channel.
    a1_scale, a2_scale : float32 array, optional
        Static activation scales.
    per_act_token_quant : bool, default False
        One scale a token.
    **others
        `w1_bias`, `w2_bias` and further fields of FusedMoEQuantConfig.

    Returns
    -------
    config : FusedMoEQuantConfig

    Examples
    --------
    >>> import numpy as np
    >>> from cumoe import int8_w8a8_moe_quant_config
    >>> scale = np.ones(8, np.float32)
    >>> int8_w8a8_moe_quant_config(scale, scale, per_act_token_quant=True).scale_shape(5, 200)
    (5, 1)
    """
    return FusedMoEQuantConfig.make(
        INT8,
        per_act_token_quant,
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        a1_scale=a1_scale,
        a2_scale=a2_scale,
        **others,
    )


def fp8_w8a16_moe_quant_config(
    w1_scale: Array, w2_scale: Array, block_shape: Block = None, **others: Any
) -> FusedMoEQuantConfig:
    """
    Weights in float8_e4m3fn, 16-bit activations.

    Parameters
    ----------
    w1_scale, w2_scale : float32 array
        As for `fp8_w8a8_moe_quant_config`.
    block_shape : two ints, optional
        Rows and columns of a weight block. The config itself reports no `block_shape`, because that is
        read from the activations.
    **others
        `w1_bias`, `w2_bias` and further fields of FusedMoEQuantConfig.

    Returns
    -------
    config : FusedMoEQuantConfig

    Examples
    --------
    >>> import numpy as np
    >>> from cumoe import fp8_w8a16_moe_quant_config
    >>> scale = np.ones((8, 2, 2), np.float32)
    >>> fp8_w8a16_moe_quant_config(scale, scale, [128, 128]).use_fp8_w8a16
    True
    """
    return _weight_only(FLOAT8_E4M3FN, group_shape(block_shape), w1_scale, w2_scale, **others)


def int8_w8a16_moe_quant_config(
    w1_scale: Array,
    w2_scale: Array,
    w1_zp: Array = None,
    w2_zp: Array = None,
    block_shape: Block = None,
    **others: Any,
) -> FusedMoEQuantConfig:
    """
    Weights in int8, 16-bit activations.

    Parameters
    ----------
    w1_scale, w2_scale : array
        (E, N) per channel or (E, N, K / group) per group.
    w1_zp, w2_zp : uint8 array, optional
        Zero points, (E, N, K / group).
    block_shape : two ints, optional
        ``[0, group]``. The config reports it as `block_shape` although `is_quantized` is False.
    **others
        `w1_bias`, `w2_bias`, `a1_gscale`, `a2_gscale` and further fields of FusedMoEQuantConfig.

    Returns
    -------
    config : FusedMoEQuantConfig

    Examples
    --------
    >>> import numpy as np
    >>> from cumoe import int8_w8a16_moe_quant_config
    >>> scale = np.ones((8, 64), np.float16)
    >>> int8_w8a16_moe_quant_config(scale, scale).config_name("float16")
    'int8_w8a16'
    """
    group = group_shape(block_shape)
    return _weight_only(INT8, group, w1_scale, w2_scale, a_shape=group, w1_zp=w1_zp, w2_zp=w2_zp, **others)


def int4_w4a16_moe_quant_config(
    w1_scale: Array,
    w2_scale: Array,
    w1_zp: Array = None,
    w2_zp: Array = None,
    block_shape: Block = None,
    **others: Any,
) -> FusedMoEQuantConfig:
    """
    Weights in int4, packed two a byte along K, 16-bit activations.

    Parameters
    ----------
    w1_scale, w2_scale : (E, N, K / group) array
        One scale a group.
    w1_zp, w2_zp : (E, N / 2, K / group) uint8 array, optional
        Zero points, packed two a byte along N; None means 8.
    block_shape : two ints, optional
        ``[0, group]``. The config reports it as `block_shape` although `is_quantized` is False.
    **others
        `w1_bias`, `w2_bias`, `a1_gscale`, `a2_gscale` and further fields of FusedMoEQuantConfig.

    Returns
    -------
    config : FusedMoEQuantConfig

    Examples
    --------
    >>> import numpy as np
    >>> from cumoe import int4_w4a16_moe_quant_config
    >>> scale = np.ones((8, 64, 2), np.float16)
    >>> config = int4_w4a16_moe_quant_config(scale, scale, block_shape=[0, 32])
    >>> config.use_int4_w4a16, config.block_shape, config.is_quantized
    (True, [0, 32], False)
    """
    group = group_shape(block_shape)
    return _weight_only("int4", group, w1_scale, w2_scale, a_shape=group, w1_zp=w1_zp, w2_zp=w2_zp, **others)


def gptq_marlin_moe_quant_config(
    w1_scale: Array,
    w2_scale: Array,
    weight_bits: int,
    group_size: int,
    w1_zp: Array = None,
    w2_zp: Array = None,
    **others: Any,
) -> FusedMoEQuantConfig:
    """
    GPTQ weights of 4 or 8 bits, 16-bit activations.

    Parameters
    ----------
    w1_scale, w2_scale : array
        One scale a group.
    weight_bits : {4, 8}
        Bits of a weight.
    group_size : int
        Weights along K that share a scale; -1 for one scale a channel.
    w1_zp, w2_zp : array, optional
        Zero points.
    **others
        `w1_bias`, `w2_bias` and further fields of FusedMoEQuantConfig.

    Returns
    -------
    config : FusedMoEQuantConfig

    Examples
    --------
    >>> import numpy as np
    >>> from cumoe import gptq_marlin_moe_quant_config
    >>> scale = np.ones((8, 64, 2), np.float16)
    >>> gptq_marlin_moe_quant_config(scale, scale, weight_bits=4, group_size=64).block_shape
    [1, 64]
    """
    _check.choice("weight_bits", weight_bits, (4, 8))
    if group_size != -1:
        _check.integer("group_size", group_size, 1)
    dtype = "int4" if weight_bits == 4 else INT8
    group = None if group_size == -1 else GroupShape(1, group_size)
    return _weight_only(dtype, group, w1_scale, w2_scale, a_shape=group, w1_zp=w1_zp, w2_zp=w2_zp, **others)


def int4_w4afp8_moe_quant_config(
    w1_scale: Array,
    w2_scale: Array,
    g1_alphas: Array,
    g2_alphas: Array,
    per_act_token_quant: bool = False,
    per_out_ch_quant: bool = False,
    block_shape: Block = None,
    **others: Any,
) -> FusedMoEQuantConfig:
    """
    Weights in int4, activations in float8_e4m3fn.

    Parameters
    ----------
    w1_scale, w2_scale : float8_e4m3fn array
        One scale a group.
    g1_alphas, g2_alphas : float32 array
        One factor an output channel.
    per_act_token_quant, per_out_ch_quant : bool, default False
        One scale a token; one scale an output channel.
    block_shape : two ints, optional
        Rows and columns of a block.
    **others
        Further fields of FusedMoEQuantConfig.

    Returns
    -------
    config : FusedMoEQuantConfig

    Examples
    --------
    >>> import numpy as np
    >>> from cumoe import int4_w4afp8_moe_quant_config
    >>> scale, alphas = np.ones((8, 64, 2), np.float32), np.ones((8, 64), np.float32)
    >>> int4_w4afp8_moe_quant_config(scale, scale, alphas, alphas).weight_quant_dtype
    'int4'
    """
    return FusedMoEQuantConfig.make(
        FLOAT8_E4M3FN,
        per_act_token_quant,
        per_out_ch_quant,
        block_shape,
        weight_dtype="int4",
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        g1_alphas=g1_alphas,
        g2_alphas=g2_alphas,
        **others,
    )


def _weight_only(
    weight_dtype: DType,
    w_shape: GroupShape | None,
    w1_scale: Any,
    w2_scale: Any,
    *,
    a_shape: GroupShape | None = None,
    a1_gscale: Array = None,
    a2_gscale: Array = None,
    w1_zp: Array = None,
    w2_zp: Array = None,
    w1_bias: Array = None,
    w2_bias: Array = None,
    is_weight_scale_swizzled: bool = False,
    **others: Any,
) -> FusedMoEQuantConfig:
    """Activations without a dtype; their shape is set only where the scheme's readers expect it."""
    return FusedMoEQuantConfig(
        FusedMoEQuantDesc(None, a_shape, None, a1_gscale),
        FusedMoEQuantDesc(None, a_shape, None, a2_gscale),
        FusedMoEQuantDesc(weight_dtype, w_shape, w1_scale, None, w1_zp, w1_bias, is_weight_scale_swizzled),
        FusedMoEQuantDesc(weight_dtype, w_shape, w2_scale, None, w2_zp, w2_bias, is_weight_scale_swizzled),
        **others,
    )
