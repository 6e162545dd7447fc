"""
Builders of the 4-bit floating-point schemes: OCP microscaling (mxfp4, mxfp6, mxfp8) and nvfp4.

With ``is_weight_scale_swizzled=True``, which all but one take, `w1_scale` and `w2_scale` are as `swizzle_scales`
gives them, (E, 128 ceil(N / 128), 4 ceil(K / group / 4)), in blocks of 128 x 4.
"""

from typing import Any

from cumoe import _check
from cumoe._arrays import Array
from cumoe._quant_builders import Block, _weight_only
from cumoe._quant_config import FusedMoEQuantConfig
from cumoe._quant_desc import FusedMoEQuantDesc, dtype_name

_OCP_MX_DTYPES = ("mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8", "fp8")


def mxfp4_w4a16_moe_quant_config(w1_scale: Any, w2_scale: Any, **others: Any) -> FusedMoEQuantConfig:
    """
    Weights in mxfp4, 16-bit activations.

    Parameters
    ----------
    w1_scale, w2_scale : (E, N, K / 32) uint8 array, or PrecisionConfig
        Powers of two as biased exponents.
    **others
        `w1_bias`, `w2_bias`, `is_weight_scale_swizzled` and further fields of FusedMoEQuantConfig.

    Returns
    -------
    config : FusedMoEQuantConfig

    Examples
    --------
    >>> import numpy as np
    >>> from cumoe import mxfp4_w4a16_moe_quant_config
    >>> scale = np.full((8, 64, 2), 127, np.uint8)
    >>> config = mxfp4_w4a16_moe_quant_config(scale, scale, gemm1_alpha=1.702)
    >>> config.use_mxfp4_w4a16, config.ocp_mx_scheme
    (True, 'w_mxfp4')
    """
    return _weight_only("mxfp4", None, w1_scale, w2_scale, **others)


def mxfp4_w4a4_moe_quant_config(
    w1_scale: Any,
    w2_scale: Any,
    a1_scale: Array = None,
    a2_scale: Array = None,
    w1_bias: Array = None,
    w2_bias: Array = None,
    block_shape: Block = None,
    **others: Any,
) -> FusedMoEQuantConfig:
    """
    Weights and activations in mxfp4.

    Parameters
    ----------
    w1_scale, w2_scale : (E, N, K / 32) uint8 array, or PrecisionConfig
        Powers of two as biased exponents.
    a1_scale, a2_scale : array, optional
        Static activation scales.
    w1_bias, w2_bias : array, optional
        Biases.
    block_shape : two ints, optional
        Rows and columns of a block.
    **others
        `is_weight_scale_swizzled` and further fields of FusedMoEQuantConfig.

    Returns
    -------
    config : FusedMoEQuantConfig

    Examples
    --------
    >>> import numpy as np
    >>> from cumoe import mxfp4_w4a4_moe_quant_config
    >>> scale = np.full((8, 64, 2), 127, np.uint8)
    >>> mxfp4_w4a4_moe_quant_config(scale, scale).config_name("bfloat16")
    'mxfp4_w4a4'
    """
    return FusedMoEQuantConfig.make(
        "mxfp4",
        block_shape=block_shape,
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        a1_scale=a1_scale,
        a2_scale=a2_scale,
        w1_bias=w1_bias,
        w2_bias=w2_bias,
        **others,
    )


def mxfp4_moe_quant_config(w1_scale: Array, w2_scale: Array) -> FusedMoEQuantConfig:
    """
    Weights and activations in mxfp4, block scales only.

    Parameters
    ----------
    w1_scale, w2_scale : (E, N, K / 32) uint8 array
        Powers of two as biased exponents.

    Returns
    -------
    config : FusedMoEQuantConfig

    Examples
    --------
    >>> import numpy as np
    >>> from cumoe import mxfp4_moe_quant_config
    >>> scale = np.full((8, 64, 2), 127, np.uint8)
    >>> mxfp4_moe_quant_config(scale, scale).use_mxfp4_w4a4
    True
    """
    return mxfp4_w4a4_moe_quant_config(w1_scale, w2_scale)


def mxfp4_mxfp8_moe_quant_config(
    w1_scale: Any,
    w2_scale: Any,
    a1_scale: Array = None,
    a2_scale: Array = None,
    w1_bias: Array = None,
    w2_bias: Array = None,
    block_shape: Block = None,
    **others: Any,
) -> FusedMoEQuantConfig:
    """
    Weights in mxfp4, activations in mxfp8.

    Parameters
    ----------
    w1_scale, w2_scale : (E, N, K / 32) uint8 array, or PrecisionConfig
        Powers of two as biased exponents.
    a1_scale, a2_scale : None
        The scales of mxfp8 follow from each batch; only None is legal.
    w1_bias, w2_bias : array, optional
        Biases.
    block_shape : None
        A block is always 32 elements of a row; only None is legal.
    **others
        `is_weight_scale_swizzled` and further fields of FusedMoEQuantConfig.

    Returns
    -------
    config : FusedMoEQuantConfig

    Raises
    ------
    ValueError
        `a1_scale`, `a2_scale` or `block_shape` is given.

    Examples
    --------
    >>> import numpy as np
    >>> from cumoe import mxfp4_mxfp8_moe_quant_config
    >>> scale = np.full((8, 64, 2), 127, np.uint8)
    >>> mxfp4_mxfp8_moe_quant_config(scale, scale, mx_alignment=128).quant_dtype
    'mxfp8'
    """
    _must_be_none("mxfp8", a1_scale=a1_scale, a2_scale=a2_scale, block_shape=block_shape)
    return _mxfp4_weights("mxfp8", w1_scale, w2_scale, None, None, w1_bias, w2_bias, **others)


def mxfp4_w4a8_moe_quant_config(
    w1_scale: Any,
    w2_scale: Any,
    a1_scale: Array = None,
    a2_scale: Array = None,
    w1_bias: Array = None,
    w2_bias: Array = None,
    block_shape: Block = None,
    **others: Any,
) -> FusedMoEQuantConfig:
    """
    Weights in mxfp4, activations in fp8.

    Parameters
    ----------
    w1_scale, w2_scale : (E, N, K / 32) uint8 array, or PrecisionConfig
        Powers of two as biased exponents.
    a1_scale, a2_scale : array, optional
        Static activation scales.
    w1_bias, w2_bias : array, optional
        Biases.
    block_shape : None
        A block is always 32 elements of a row; only None is legal.
    **others
        `is_weight_scale_swizzled` and further fields of FusedMoEQuantConfig.

    Returns
    -------
    config : FusedMoEQuantConfig

    Raises
    ------
    ValueError
        `block_shape` is given.

    Examples
    --------
    >>> import numpy as np
    >>> from cumoe import mxfp4_w4a8_moe_quant_config
    >>> scale = np.full((8, 64, 2), 127, np.uint8)
    >>> mxfp4_w4a8_moe_quant_config(scale, scale).ocp_mx_scheme
    'w_mxfp4_a_fp8'
    """
    _must_be_none("mxfp4", block_shape=block_shape)
    return _mxfp4_weights("fp8", w1_scale, w2_scale, a1_scale, a2_scale, w1_bias, w2_bias, **others)


def ocp_mx_moe_quant_config(
    quant_dtype: str | None,
    w1_scale: Any,
    w2_scale: Any,
    weight_dtype: str | None = None,
    a1_scale: Array = None,
    a2_scale: Array = None,
    w1_bias: Array = None,
    w2_bias: Array = None,
    block_shape: Block = None,
    **others: Any,
) -> FusedMoEQuantConfig:
    """
    Any of the OCP microscaling schemes.

    Parameters
    ----------
    quant_dtype : {"mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8", "fp8"} or None
        Number format of the activations; None leaves them at 16 bits.
    w1_scale, w2_scale : (E, N, K / 32) uint8 array, or PrecisionConfig
        Powers of two as biased exponents.
    weight_dtype : {"mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8"}, optional
        Number format of the weights; that of the activations if None.
    a1_scale, a2_scale : array, optional
        Static activation scales.
    w1_bias, w2_bias : array, optional
        Biases.
    block_shape : two ints, optional
        Rows and columns of a block.
    **others
        `is_weight_scale_swizzled` and further fields of FusedMoEQuantConfig.

    Returns
    -------
    config : FusedMoEQuantConfig

    Raises
    ------
    ValueError
        An unknown number format.

    Examples
    --------
    >>> import numpy as np
    >>> from cumoe import ocp_mx_moe_quant_config
    >>> scale = np.full((8, 64, 2), 127, np.uint8)
    >>> ocp_mx_moe_quant_config("fp8", scale, scale, weight_dtype="mxfp6_e3m2").ocp_mx_scheme
    'w_mxfp6_e3m2_a_fp8'
    """
    if quant_dtype is not None:
        _check.choice("quant_dtype", dtype_name(quant_dtype), _OCP_MX_DTYPES)
    weight_name = dtype_name(quant_dtype if weight_dtype is None else weight_dtype)
    _check.choice("weight_dtype", weight_name, _OCP_MX_DTYPES[:-1])
    return FusedMoEQuantConfig.make(
        quant_dtype,
        block_shape=block_shape,
        weight_dtype=weight_dtype,
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        a1_scale=a1_scale,
        a2_scale=a2_scale,
        w1_bias=w1_bias,
        w2_bias=w2_bias,
        **others,
    )


def nvfp4_moe_quant_config(
    g1_alphas: Array,
    g2_alphas: Array,
    a1_gscale: Array,
    a2_gscale: Array,
    w1_scale: Array,
    w2_scale: Array,
    **others: Any,
) -> FusedMoEQuantConfig:
    """
    Weights and activations in nvfp4.

    Parameters
    ----------
    g1_alphas, g2_alphas : (E,) float32 array
        Product of the weight's and the input's decode scales, for each expert.
    a1_gscale, a2_gscale : float32 array
        Reciprocal of the checkpoint's input scale.
    w1_scale, w2_scale : (E, N, K / 16) float8_e4m3fn array
        Block scales.
    **others
        `w1_bias`, `w2_bias`, `is_weight_scale_swizzled` and further fields of FusedMoEQuantConfig.

    Returns
    -------
    config : FusedMoEQuantConfig

    Examples
    --------
    >>> import numpy as np
    >>> from cumoe import nvfp4_moe_quant_config
    >>> scale, one = np.ones((8, 64, 4), np.float32), np.ones(8, np.float32)
    >>> nvfp4_moe_quant_config(one, one, one, one, scale, scale).use_nvfp4_w4a4
    True
    """
    return FusedMoEQuantConfig.make(
        "nvfp4",
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        g1_alphas=g1_alphas,
        g2_alphas=g2_alphas,
        a1_gscale=a1_gscale,
        a2_gscale=a2_gscale,
        **others,
    )


def nvfp4_w4a16_moe_quant_config(
    g1_alphas: Array, g2_alphas: Array, w1_scale: Array, w2_scale: Array, **others: Any
) -> FusedMoEQuantConfig:
    """
    Weights in nvfp4, 16-bit activations.

    Parameters
    ----------
    g1_alphas, g2_alphas : (E,) float32 array
        The weight's decode scale, for each expert.
    w1_scale, w2_scale : (E, N, K / 16) float8_e4m3fn array
        Block scales.
    **others
        `w1_bias`, `w2_bias`, `is_weight_scale_swizzled` and further fields of FusedMoEQuantConfig.

    Returns
    -------
    config : FusedMoEQuantConfig

    Examples
    --------
    >>> import numpy as np
    >>> from cumoe import nvfp4_w4a16_moe_quant_config
    >>> scale, one = np.ones((8, 64, 4), np.float32), np.ones(8, np.float32)
    >>> nvfp4_w4a16_moe_quant_config(one, one, scale, scale).use_nvfp4_w4a16
    True
    """
    return FusedMoEQuantConfig.make(
        None,
        weight_dtype="nvfp4",
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        g1_alphas=g1_alphas,
        g2_alphas=g2_alphas,
        **others,
    )


def _mxfp4_weights(
    activation: str,
    w1_scale: Any,
    w2_scale: Any,
    a1_scale: Array,
    a2_scale: Array,
    w1_bias: Array,
    w2_bias: Array,
    is_weight_scale_swizzled: bool = False,
    **others: Any,
) -> FusedMoEQuantConfig:
    """All shapes None: the blocks of both formats are fixed."""
    return FusedMoEQuantConfig(
        FusedMoEQuantDesc(activation, None, a1_scale),
        FusedMoEQuantDesc(activation, None, a2_scale),
        FusedMoEQuantDesc("mxfp4", None, w1_scale, None, None, w1_bias, is_weight_scale_swizzled),
        FusedMoEQuantDesc("mxfp4", None, w2_scale, None, None, w2_bias, is_weight_scale_swizzled),
        **others,
    )


def _must_be_none(scheme: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None for {scheme}, whose blocks and scales are fixed, got {type(value).__name__}"
            )
