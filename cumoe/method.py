"""
The life of an MoE layer: weights made, loaded, prepared and applied.

A layer is any object that takes attributes. The method makes its weights, packs them for the kernels
once they are loaded, and runs tokens through them, routed already (`apply`) or not (`apply_monolithic`).
"""

from typing import Any

from cumoe._arrays import on_callers_stream
from cumoe._backends import select_backend
from cumoe._layer_weights import check_sizes, set_weights, unquantised_weights, zero_padding
from cumoe._method_base import FusedMoEMethodBase
from cumoe._modular import ExpertTokensMetadata, FusedMoEActivationFormat
from cumoe._modular_experts import BatchedExperts, StandardExperts
from cumoe._parameter import Parameter
from cumoe._prepare_finalize import BatchedPrepareAndFinalize, MoEPrepareAndFinalizeNoEP
from cumoe._quantised_method import QuantizedFusedMoEMethod
from cumoe.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEQuantConfig, biased_moe_quant_config

__all__ = [
    "BatchedExperts",
    "BatchedPrepareAndFinalize",
    "ExpertTokensMetadata",
    "FusedMoEActivationFormat",
    "FusedMoEMethodBase",
    "MoEPrepareAndFinalizeNoEP",
    "Parameter",
    "QuantizedFusedMoEMethod",
    "StandardExperts",
    "UnquantizedFusedMoEMethod",
    "select_backend",
]


class UnquantizedFusedMoEMethod(FusedMoEMethodBase):
    """
    Weights and computation of an MoE layer without quantisation.

    Parameters
    ----------
    moe : FusedMoEConfig
        The layer. Its activation and backend are settled here.

    Attributes
    ----------
    moe : FusedMoEConfig
        As given.
    backend : str
        Who runs the layer.
    refused_backends : dict of str
        Why others do not, by name.
    moe_quant_config : FusedMoEQuantConfig or None
        Biases and parameters of the activation; known once the weights are processed.
    prepare_finalize : object or None
        Outer steps of a modular layer, where ranks exchange tokens.
    experts : StandardExperts, BatchedExperts or None
        Middle step of a modular layer, where ranks exchange tokens.

    Raises
    ------
    ValueError
        An unknown activation, backend, or a parameter that the activation does not take.
    NotImplementedError
        No backend can run the layer; the message has the reasons.

    Examples
    --------
    >>> import types
    >>> import numpy as np
    >>> from cumoe import FusedMoEConfig, FusedMoEParallelConfig, UnquantizedFusedMoEMethod
    >>> moe = FusedMoEConfig(4, 2, 8, 4, FusedMoEParallelConfig.make(), "float32")
    >>> method, layer = UnquantizedFusedMoEMethod(moe), types.SimpleNamespace()
    >>> method.create_weights(layer, 4, 8, 16, "float32")
    >>> layer.w13_weight[...] = layer.w2_weight[...] = 1
    >>> method.process_weights_after_loading(layer)
    >>> x, logits = np.full((1, 8), 0.125, np.float32), np.zeros((1, 4), np.float32)
    >>> method.apply_monolithic(layer, x, logits, top_k=2)[:, :3].round(3)
    array([[11.697, 11.697, 11.697]], dtype=float32)
    """

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
        Give a layer weights to load into.

        Sets `w13_weight` (E, 2I, H) ((E, I, H) without gate) and `w2_weight` (E, H, I), not initialised,
        and with biases `w13_bias` and `w2_bias`, zero, all on the device of the config.

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
            float32, float16 or bfloat16.
        **extra_weight_attrs
            Set on each weight, which is a `Parameter`, or on a GPU a CuPy array that carries attributes too.

        Raises
        ------
        ValueError
            A size other than that of the config.
        TypeError
            Another dtype.
        """
        sizes = num_experts, hidden_size, intermediate_size_per_partition
        dtype = check_sizes(self.moe, *sizes, params_dtype)
        set_weights(layer, self.moe, unquantised_weights(self.moe, *sizes, dtype), dtype, extra_weight_attrs)

    @on_callers_stream
    def process_weights_after_loading(self, layer: Any) -> None:
        """
        Make a layer with loaded weights ready to run; again whenever the weights have changed.

        The weights keep their memory, and so does their packed form `layer.prepared_experts`, which is
        written anew: what holds on to either sees the change.

        Parameters
        ----------
        layer : object
            Has `w13_weight` and `w2_weight`, and the biases if the config has them. Where the config has
            smaller unpadded sizes, what lies beyond them is set to zero.
        """
        zero_padding(self.moe, layer)
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        self._make_ready(layer, layer.w13_weight, layer.w2_weight)

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig:
        """
        Give the biases of a layer and the parameters of its activation.

        Parameters
        ----------
        layer : object
            Has `w13_bias` and `w2_bias` if the config has biases.

        Returns
        -------
        config : FusedMoEQuantConfig
            `FUSED_MOE_UNQUANTIZED_CONFIG` itself if there is nothing to give.
        """
        given = self._epilogue(layer)
        return (
            biased_moe_quant_config(**{"w1_bias": None, "w2_bias": None, **given})
            if given
            else FUSED_MOE_UNQUANTIZED_CONFIG
        )
