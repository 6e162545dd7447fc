"""The life of an MoE layer whose weights are quantised: made, loaded, prepared and applied."""

from collections.abc import Sequence
from typing import Any

from cumoe._arrays import Array, on_callers_stream
from cumoe._layer_weights import check_sizes, set_weights, weight_of
from cumoe._method_base import FusedMoEMethodBase
from cumoe._quantised_layer_config import codes_of, config_of
from cumoe._quantised_weights import group_of, options_of, weights_of
from cumoe.config import FusedMoEConfig, FusedMoEQuantConfig


class QuantizedFusedMoEMethod(FusedMoEMethodBase):
    """
    Weights and computation of an MoE layer in a quantisation scheme.

    Parameters
    ----------
    moe : FusedMoEConfig
        The layer. Its activation and backend are settled here.
    scheme : str
        Number formats of weights (w) and activations (a), 16 for those that stay as they are: ``"fp8_w8a8"``,
        ``"fp8_w8a16"``, ``"int8_w8a8"``, ``"int8_w8a16"``, ``"int4_w4a16"``, ``"int4_w4afp8"``, ``"mxfp4_w4a16"``,
        ``"mxfp4_w4a4"``, ``"mxfp4_mxfp8"``, ``"mxfp4_w4a8"``, ``"nvfp4_w4a4"`` or ``"nvfp4_w4a16"``.
    per_act_token_quant : bool, default False
        One scale a token instead of one for all, with fp8 and int8 activations.
    per_out_ch_quant : bool, default False
        One scale a row of a weight instead of one for each of gate, up and down, with fp8 weights and ``"int8_w8a8"``.
    block_shape : two ints, optional
        Rows and columns of a block of a weight, as (128, 128), with fp8 weights and ``"int8_w8a8"``; activations have
        one scale for as many columns.
    group_size : int, optional
        Columns of a group of an integer weight, -1 for all. Must be given for int4; ``"int8_w8a16"`` has signed codes
        and one scale a row without it.
    has_zero_points : bool, default False
        Whether groups have a zero point each, with ``"int4_w4a16"`` and ``"int8_w8a16"``.
    static_activations : bool, default False
        The one scale of fp8 and int8 activations is a weight of the layer and not found for each batch.

    Attributes
    ----------
    moe : FusedMoEConfig
        As given.
    scheme : str
        As given.
    backend : str
        Who runs the layer.
    refused_backends : dict of str
        Why others do not, by name.
    moe_quant_config : FusedMoEQuantConfig or None
        What the codes mean; known once the weights are processed.
    prepare_finalize : object or None
        Outer steps of a modular layer, where ranks exchange tokens.
    experts : StandardExperts, BatchedExperts or None
        Middle step of a modular layer, where ranks exchange tokens.

    Raises
    ------
    TypeError, ValueError
        An unknown scheme or activation, or an option that the scheme does not have or that excludes another.
    NotImplementedError
        No backend can run the layer; the message has the reasons.

    See Also
    --------
    UnquantizedFusedMoEMethod : The same without quantisation.

    Notes
    -----
    Names and shapes are those of vLLM's methods, with N rows and K columns of a weight, after "w13_" and "w2_";
    ``qzeros`` only with zero points, ``input_scale`` of the others than nvfp4 only for static activations:

    ======================= ================================================================================
    scheme                  weights
    ======================= ================================================================================
    fp8, int8_w8a8          ``weight`` (E, N, K); ``weight_scale`` (E, 2) and (E,), or (E, N, 1) per channel;
                            ``weight_scale_inv`` (E, N / rows, K / columns) per block, rounded up, for gate and
                            up each; ``input_scale`` (E,)
    int8_w8a16              ``weight`` (E, N, K); ``scale`` (E, N)
    int8_w8a16 with groups  ``qweight`` (E, N, K); ``scales`` (E, N, K / g); ``qzeros`` (E, N, K / g)
    int4_w4a16              ``qweight`` (E, N, K / 2); ``scales`` (E, N, K / g); ``qzeros`` (E, N / 2, K / g)
    int4_w4afp8             ``weight_packed`` (E, N, K / 8) int32; ``weight_scale`` (E, N, K / g);
                            ``input_scale`` (E,)
    mxfp4                   ``weight`` (E, N, K / 2); ``weight_scale`` (E, N, K / 32) uint8; ``input_scale`` (E,)
    nvfp4                   ``weight`` (E, N, K / 2); ``weight_scale`` (E, N, K / 16) float8_e4m3fn;
                            ``weight_scale_2`` and, with w4a4, ``input_scale`` (E, 2) and (E,)
    ======================= ================================================================================

    Two scales of w13, for the gate and the up projection, are both exact: nothing is quantised again with the larger,
    and the rows of nvfp4 have an alpha each, where vLLM gives the up rows the scale of the gate. A static input scale
    is the largest of this rank's experts; that of nvfp4 is each expert's own, the larger of its gate and up projection.

    References
    ----------
    .. [1] vLLM, ``model_executor/layers/quantization``: ``fp8.py``, ``experts_int8.py``, ``moe_wna16.py``,
       ``mxfp4.py``, ``modelopt.py`` and ``compressed_tensors``.

    Examples
    --------
    >>> import types
    >>> import numpy as np
    >>> import cumoe
    >>> from cumoe import FusedMoEConfig, FusedMoEParallelConfig, QuantizedFusedMoEMethod
    >>> moe = FusedMoEConfig(4, 2, 8, 4, FusedMoEParallelConfig.make(), "float32")
    >>> method, layer = QuantizedFusedMoEMethod(moe, "int8_w8a16"), types.SimpleNamespace()
    >>> method.create_weights(layer, 4, 8, 16, "float32")
    >>> {name: weight.shape for name, weight in vars(layer).items()}
    {'w13_weight': (4, 32, 8), 'w13_scale': (4, 32), 'w2_weight': (4, 8, 16), 'w2_scale': (4, 8)}
    >>> layer.w13_weight[...] = layer.w2_weight[...] = 100
    >>> layer.w13_scale[...] = layer.w2_scale[...] = 0.01
    >>> method.process_weights_after_loading(layer)
    >>> x, logits = np.full((1, 8), 0.125, np.float32), np.zeros((1, 4), np.float32)
    >>> method.apply_monolithic(layer, x, logits, top_k=2)[:, :3].round(3)
    array([[11.697, 11.697, 11.697]], dtype=float32)
    """

    def __init__(
        self,
        moe: FusedMoEConfig,
        scheme: str,
        *,
        per_act_token_quant: bool = False,
        per_out_ch_quant: bool = False,
        block_shape: Sequence[int] | None = None,
        group_size: int | None = None,
        has_zero_points: bool = False,
        static_activations: bool = False,
    ) -> None:
        self._options = options_of(
            scheme, per_act_token_quant, per_out_ch_quant, block_shape, group_size, has_zero_points, static_activations
        )
        super().__init__(moe)
        self.scheme = scheme

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: Any,
        **extra_weight_attrs: Any,
    ) -> None:
        """
        Give a layer weights to load into, on the device of the config.

        Names and shapes are in the notes of the class. What a loader leaves out, such as padding, contributes nothing:
        codes are zero, scales that are numbers one, and those of groups zero. With biases there are `w13_bias` and
        `w2_bias`, zero. With a `group_size`, `layer.group_size` is it, or its half, quarter and so on if only that
        divides both sizes, and `layer.group_size_div_factor` says how often a loader must repeat each scale.

        Parameters
        ----------
        layer : object
            Takes the attributes.
        num_experts : int
            E, experts of this device.
        hidden_size : int
            H, length of a token.
        intermediate_size_per_partition : int
            I, width of this device's part of an expert.
        params_dtype : dtype or str
            float32, float16 or bfloat16: dtype of the biases and of the scales of int4 and other groups.
        **extra_weight_attrs
            Set on each weight. Scales have `quant_method` as well: "tensor", "channel", "group" or "block".

        Raises
        ------
        ValueError
            A size other than that of the config, or one that blocks, groups or packed codes do not fit.
        TypeError
            Another dtype.
        """
        sizes = num_experts, hidden_size, intermediate_size_per_partition
        dtype = check_sizes(self.moe, *sizes, params_dtype)
        specs = weights_of(self._options, self.moe, *sizes, dtype)
        set_weights(layer, self.moe, specs, dtype, extra_weight_attrs)
        if self._options.group_size is not None:
            layer.group_size, layer.group_size_div_factor = group_of(self._options, *sizes[1:])

    @on_callers_stream
    def process_weights_after_loading(self, layer: Any) -> None:
        """
        Make a layer with loaded weights ready to run; again whenever the weights have changed.

        The weights keep their memory, and so does `layer.prepared_experts`, which is written anew: what holds on to
        either sees the change.

        Parameters
        ----------
        layer : object
            Has the weights of `create_weights`.
        """
        weights = self._weights(layer)
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        self._make_ready(layer, *codes_of(self._options, weights))

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig:
        """
        Give the scales, zero points and biases of a layer and the parameters of its activation.

        Parameters
        ----------
        layer : object
            Has the weights of `create_weights`.

        Returns
        -------
        config : FusedMoEQuantConfig
            As the builder of the scheme makes it. Holds the arrays of the layer where they are what it takes.
        """
        return config_of(self._options, self.moe.activation, self._weights(layer), self._epilogue(layer))

    def _weights(self, layer: Any) -> dict[str, Array]:
        return {name: weight_of(layer, name) for name in self._options.names}
