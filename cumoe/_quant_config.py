"""
How the four operands of an MoE layer are quantised, and what follows from it.

These classes hold arrays and never look inside: NumPy, CuPy and torch arrays stay as they were given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cumoe import _check
from cumoe._arrays import Array
from cumoe._quant_desc import (
    DType,
    FusedMoEQuantDesc,
    GroupShape,
    _quant_flags_to_group_shape,
    dtype_name,
    group_shape,
    is_array,
)

_FLOAT8_E4M3 = ("float8_e4m3fn", "float8_e4m3fnuz")
_MX = ("mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8")
_ACTIVATION_DTYPES = ("nvfp4", *_MX, "fp8", *_FLOAT8_E4M3, "float8_e5m2", "float8_e5m2fnuz", "int8")
_WEIGHT_DTYPES = (*_ACTIVATION_DTYPES, "int4")

# weight dtype -> the activation dtypes that make a named OCP microscaling scheme with it; None is 16-bit
_OCP_MX_SCHEMES: dict[str, tuple[str | None, ...]] = {
    "mxfp4": (None, "mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "fp8"),
    "mxfp6_e3m2": (None, "mxfp6_e3m2", "fp8"),
    "mxfp6_e2m3": (None, "mxfp6_e2m3", "fp8"),
}


@dataclass(frozen=True, eq=False)
class FusedMoEQuantConfig:
    """
    How the two activations and the two weights of an MoE layer are quantised.

    Use `make` or a builder such as `fp8_w8a8_moe_quant_config`. Two configs are equal only if they are
    the same object, because the arrays inside have no single truth value.

    Parameters
    ----------
    _a1, _a2 : FusedMoEQuantDesc
        What goes into the first and into the second product.
    _w1, _w2 : FusedMoEQuantDesc
        The weights of the first and of the second product.
    is_scale_swizzled : bool, default True
        Activation scales are in the 128x4 tile order of Blackwell tensor cores, where a format knows it.
    is_scale_transposed : bool, default False
        Activation scales are stored column-major.
    gemm1_alpha, gemm1_beta, gemm1_clamp_limit : float, optional
        Parameters of the gated activations; they take precedence over those of `FusedMoEConfig`.
    mx_alignment : int, default 0
        Multiple to which the hidden size is padded for microscaling kernels; 0 does not pad.

    Examples
    --------
    >>> from cumoe import FusedMoEQuantConfig
    >>> config = FusedMoEQuantConfig.make("int8", per_act_token_quant=True)
    >>> config.use_int8_w8a8, config.scale_shape(7, 4096), config.batched_scale_shape(4, 7, 4096)
    (True, (7, 1), (4, 7, 1))
    """

    _a1: FusedMoEQuantDesc
    _a2: FusedMoEQuantDesc
    _w1: FusedMoEQuantDesc
    _w2: FusedMoEQuantDesc
    is_scale_swizzled: bool = True
    is_scale_transposed: bool = False
    gemm1_alpha: float | None = None
    gemm1_beta: float | None = None
    gemm1_clamp_limit: float | None = None
    mx_alignment: int = 0

    def __post_init__(self) -> None:
        for name in ("_a1", "_a2", "_w1", "_w2"):
            if not isinstance(getattr(self, name), FusedMoEQuantDesc):
                raise TypeError(f"{name} must be a FusedMoEQuantDesc, got {type(getattr(self, name)).__name__}")

    @property
    def quant_dtype(self) -> DType:
        """Number format of the activations, None if they are not quantised."""
        return self._a1.dtype

    @property
    def weight_quant_dtype(self) -> DType:
        """Number format of the weights, None if they are not quantised."""
        return self._w1.dtype

    @property
    def is_quantized(self) -> bool:
        """Whether the activations are quantised; weight-only schemes say False."""
        return self.quant_dtype is not None

    @property
    def is_per_act_token(self) -> bool:
        """Whether each token of the activations has a scale."""
        return self._a1.shape == GroupShape.PER_TOKEN

    @property
    def per_act_token_quant(self) -> bool:
        """Whether each token of the activations has a scale."""
        return self.is_per_act_token

    @property
    def per_out_ch_quant(self) -> bool:
        """Whether each output channel of the weights has a scale; its shape is called PER_TOKEN."""
        return self._w1.shape == GroupShape.PER_TOKEN

    @property
    def is_per_tensor(self) -> bool:
        """Whether one scale serves all activations."""
        return self._a1.shape == GroupShape.PER_TENSOR

    @property
    def block_shape(self) -> list[int] | None:
        """Rows and columns of a block; the integer weight-only schemes have one although `is_quantized` is False."""
        shape = self._a1.shape
        return None if shape in (None, GroupShape.PER_TENSOR, GroupShape.PER_TOKEN) else list(shape)

    @property
    def is_block_quantized(self) -> bool:
        """Whether there is a `block_shape`."""
        return self.block_shape is not None

    @property
    def a1_scale(self) -> Array:
        """Scales of the first activation."""
        return _array("a1_scale", self._a1.scale)

    @property
    def a2_scale(self) -> Array:
        """Scales of the second activation."""
        return _array("a2_scale", self._a2.scale)

    @property
    def w1_scale(self) -> Array:
        """Scales of the first weight."""
        return _array("w1_scale", self._w1.scale)

    @property
    def w2_scale(self) -> Array:
        """Scales of the second weight."""
        return _array("w2_scale", self._w2.scale)

    @property
    def w1_precision(self) -> Any:
        """The ``PrecisionConfig`` of the first weight."""
        return _precision("w1_precision", self._w1.scale)

    @property
    def w2_precision(self) -> Any:
        """The ``PrecisionConfig`` of the second weight."""
        return _precision("w2_precision", self._w2.scale)

    @property
    def a1_gscale(self) -> Array:
        """Global scale of the first activation: the reciprocal of the checkpoint's input scale."""
        return self._a1.alpha_or_gscale

    @property
    def a2_gscale(self) -> Array:
        """Global scale of the second activation: the reciprocal of the checkpoint's input scale."""
        return self._a2.alpha_or_gscale

    @property
    def g1_alphas(self) -> Array:
        """Factors of the first product, one an expert or one a channel."""
        return self._w1.alpha_or_gscale

    @property
    def g2_alphas(self) -> Array:
        """Factors of the second product, one an expert or one a channel."""
        return self._w2.alpha_or_gscale

    @property
    def w1_zp(self) -> Array:
        """Zero points of the first weight."""
        return self._w1.zp

    @property
    def w2_zp(self) -> Array:
        """Zero points of the second weight."""
        return self._w2.zp

    @property
    def w1_bias(self) -> Array:
        """Bias of the first product."""
        return self._w1.bias

    @property
    def w2_bias(self) -> Array:
        """Bias of the second product."""
        return self._w2.bias

    @property
    def use_fp8_w8a8(self) -> bool:
        """Whether activations are float8_e4m3."""
        return dtype_name(self._a1.dtype) in _FLOAT8_E4M3

    @property
    def use_int8_w8a8(self) -> bool:
        """Whether activations are int8."""
        return dtype_name(self._a1.dtype) == "int8"

    @property
    def use_nvfp4_w4a4(self) -> bool:
        """Whether activations are nvfp4."""
        return dtype_name(self._a1.dtype) == "nvfp4"

    @property
    def use_fp8_w8a16(self) -> bool:
        """Whether only the weights are quantised, to float8_e4m3."""
        return self._a1.dtype is None and dtype_name(self._w1.dtype) in _FLOAT8_E4M3

    @property
    def use_int8_w8a16(self) -> bool:
        """Whether only the weights are quantised, to int8."""
        return self._is_scheme(None, "int8")

    @property
    def use_int4_w4a16(self) -> bool:
        """Whether only the weights are quantised, to int4."""
        return self._is_scheme(None, "int4")

    @property
    def use_mxfp4_w4a16(self) -> bool:
        """Whether only the weights are quantised, to mxfp4."""
        return self._is_scheme(None, "mxfp4")

    @property
    def use_nvfp4_w4a16(self) -> bool:
        """Whether only the weights are quantised, to nvfp4."""
        return self._is_scheme(None, "nvfp4")

    @property
    def use_mxfp4_w4a4(self) -> bool:
        """Whether activations and weights are mxfp4."""
        return self._is_scheme("mxfp4", "mxfp4")

    @property
    def use_mxfp4_w4a8(self) -> bool:
        """Whether weights are mxfp4 and activations fp8."""
        return self._is_scheme("fp8", "mxfp4")

    @property
    def ocp_mx_scheme(self) -> str | None:
        """Name of the OCP microscaling scheme, such as ``"w_mxfp4_a_fp8"``, or None."""
        activation, weight = dtype_name(self._a1.dtype), dtype_name(self._w1.dtype)
        if weight is None or activation not in _OCP_MX_SCHEMES.get(weight, ()):
            return None
        return f"w_{weight}" if activation is None else f"w_{weight}_a_{activation}"

    def _is_scheme(self, activation: str | None, weight: str) -> bool:
        return dtype_name(self._a1.dtype) == activation and dtype_name(self._w1.dtype) == weight

    def config_name(self, dtype: DType) -> str | None:
        """Name of the scheme in the file names of tuned configurations; None for the schemes without one."""
        return _get_config_dtype_str(
            dtype,
            use_fp8_w8a8=self.use_fp8_w8a8,
            use_int8_w8a16=self.use_int8_w8a16,
            use_int4_w4a16=self.use_int4_w4a16,
            use_mxfp4_w4a4=self.use_mxfp4_w4a4,
            use_fp8_w8a16=self.use_fp8_w8a16,
        )

    def scale_shape(self, max_tokens: int, hidden_dim: int) -> tuple[int, int] | None:
        """Shape of the scales of ``(max_tokens, hidden_dim)`` activations; None if they are not quantised."""
        if not self.is_quantized:
            return None
        block_shape = self.block_shape
        if block_shape is None:
            return (max_tokens, 1) if self.is_per_act_token else (1, 1)
        if block_shape[1] < 1:
            raise ValueError(f"block_shape must have >= 1 columns to cut a row into blocks, got {block_shape}")
        return max_tokens, -(-hidden_dim // block_shape[1])

    def batched_scale_shape(self, num_experts: int, max_tokens: int, hidden_dim: int) -> tuple[int, int, int] | None:
        """Shape of the scales of ``(num_experts, max_tokens, hidden_dim)`` activations; None if not quantised."""
        shape = self.scale_shape(max_tokens, hidden_dim)
        return None if shape is None else (num_experts, *shape)

    @staticmethod
    def make(
        quant_dtype: DType = None,
        per_act_token_quant: bool = False,
        per_out_ch_quant: bool = False,
        block_shape: Sequence[int] | None = None,
        w1_scale: Any = None,
        w2_scale: Any = None,
        a1_scale: Array = None,
        a2_scale: Array = None,
        g1_alphas: Array = None,
        g2_alphas: Array = None,
        a1_gscale: Array = None,
        a2_gscale: Array = None,
        w1_bias: Array = None,
        w2_bias: Array = None,
        w1_zp: Array = None,
        w2_zp: Array = None,
        weight_dtype: DType = None,
        is_weight_scale_swizzled: bool = False,
        **others: Any,
    ) -> "FusedMoEQuantConfig":
        """
        Make a config from flags.

        Parameters
        ----------
        quant_dtype : dtype or str, optional
            Number format of the activations; None leaves them as they are.
        per_act_token_quant, per_out_ch_quant : bool, default False
            One scale a token; one scale an output channel of the weights.
        block_shape : two ints, optional
            One scale a block of this many rows and columns, for activations and weights.
        w1_scale, w2_scale, a1_scale, a2_scale : array, optional
            Scales; those of the weights may be ``PrecisionConfig`` objects.
        g1_alphas, g2_alphas, a1_gscale, a2_gscale : array, optional
            Alphas of the products and global scales of the activations.
        w1_bias, w2_bias, w1_zp, w2_zp : array, optional
            Biases and zero points.
        weight_dtype : dtype or str, optional
            Number format of the weights; that of the activations if None.
        is_weight_scale_swizzled : bool, default False
            Scales of weights in mxfp4, mxfp8 or nvfp4 are in blocks of 128 x 4 (`swizzle_scales`).
        **others
            Further fields of the class: `is_scale_swizzled`, `gemm1_alpha`, ...

        Returns
        -------
        config : FusedMoEQuantConfig

        Raises
        ------
        ValueError
            An unknown number format, or flags that exclude each other.
        """
        if quant_dtype is not None:
            _check.choice("quant_dtype", dtype_name(quant_dtype), _ACTIVATION_DTYPES)
        if weight_dtype is not None:
            _check.choice("weight_dtype", dtype_name(weight_dtype), _WEIGHT_DTYPES)
        if block_shape is not None and group_shape(block_shape) in (GroupShape.PER_TENSOR, GroupShape.PER_TOKEN):
            raise ValueError(
                f"block_shape must name the rows and columns of a block, got {list(block_shape)}; "
                "pass None with per_act_token_quant=True for one scale a token, or alone for one a tensor"
            )
        a_shape, w_shape = _quant_flags_to_group_shape(quant_dtype, per_act_token_quant, per_out_ch_quant, block_shape)
        w_dtype = quant_dtype if weight_dtype is None else weight_dtype
        return FusedMoEQuantConfig(
            FusedMoEQuantDesc(quant_dtype, a_shape, a1_scale, a1_gscale),
            FusedMoEQuantDesc(quant_dtype, a_shape, a2_scale, a2_gscale),
            FusedMoEQuantDesc(w_dtype, w_shape, w1_scale, g1_alphas, w1_zp, w1_bias, is_weight_scale_swizzled),
            FusedMoEQuantDesc(w_dtype, w_shape, w2_scale, g2_alphas, w2_zp, w2_bias, is_weight_scale_swizzled),
            **others,
        )


def _get_config_dtype_str(
    dtype: DType,
    use_fp8_w8a8: bool = False,
    use_int8_w8a16: bool = False,
    use_int4_w4a16: bool = False,
    use_mxfp4_w4a4: bool = False,
    use_fp8_w8a16: bool = False,
) -> str | None:
    """First scheme whose flag is set, as file names of tuned configurations spell it."""
    if use_fp8_w8a8:
        return "fp8_w8a8"
    if use_fp8_w8a16:
        return "fp8_w8a16"
    if use_int8_w8a16:
        return "int8_w8a16"
    if use_int4_w4a16:
        return "int4_w4a16"
    if use_mxfp4_w4a4:
        return "mxfp4_w4a4"
    # 16-bit floats share the files without a dtype
    return "float32" if dtype_name(dtype) == "float32" else None


def _array(name: str, value: Any) -> Any:
    if value is None or is_array(value):
        return value
    fix = f"; a PrecisionConfig is under {name[:2]}_precision" if name.startswith("w") else ""
    raise TypeError(f"{name} must be an array, got {type(value).__name__}{fix}")


def _precision(name: str, value: Any) -> Any:
    if is_array(value):
        raise TypeError(f"{name} must be a PrecisionConfig, got an array; arrays are under {name[:2]}_scale")
    return value
