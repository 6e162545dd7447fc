"""The weights of an MoE layer, checked: what `fused_experts`, `prepare` and `verify` have in common."""

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from cumoe import _arrays, _check
from cumoe._act import is_gated, is_interleaved, parameters
from cumoe._arrays import Array
from cumoe._kernel_choice import choose_kernel, rows_are_aligned
from cumoe._quant_config import FusedMoEQuantConfig
from cumoe._quant_desc import dtype_name

DTYPES = ("float32", "float16", "bfloat16")


class Experts(NamedTuple):
    """Weights as kernels see them; sizes and names in the words of design.md."""

    w1: Any  # bits: (E, 2I, H) or packed
    w2: Any  # bits: (E, H, I) or packed
    w1_bias: Any  # float32 (E, 2I), or (0, 0)
    w2_bias: Any  # float32 (E, H), or (0, 0)
    dtype: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: str
    alpha: float
    beta: float
    limit: float  # inf: no clamp
    kernel: str
    aligned: bool  # rows begin where every kernel of the side can load them

    @property
    def is_gated(self) -> bool:
        """Rows of `w1` come in pairs."""
        return is_gated(self.activation)

    @property
    def is_interleaved(self) -> bool:
        """Gate and up rows alternate."""
        return is_interleaved(self.activation)


def weight_arrays(w1: Array, w2: Array, quant_config: Any) -> dict[str, Array]:
    """The arrays that the weights of a call consist of, by name; None where there is none."""
    refuse_quantised(quant_config)
    w1_bias, w2_bias = (None, None) if quant_config is None else (quant_config.w1_bias, quant_config.w2_bias)
    return {"w1": w1, "w2": w2, "w1_bias": w1_bias, "w2_bias": w2_bias}


def make_experts(
    xp: ModuleType, arrays: list[Array], activation: str, quant_config: Any, hidden_states: Array = None
) -> Experts:
    """
    Check weights, biases and activation against each other; arrays that kernels cannot read are converted.

    `arrays` are those of `weight_arrays`, taken in.
    """
    w1, w2, w1_bias, w2_bias = arrays
    alpha, beta, limit = parameters(activation, quant_config)
    hidden_size, intermediate_size = check_weights(w1, w2, activation, hidden_states)
    num_experts, rows, letters = len(w1), w1.shape[1], "(E, 2I)" if is_gated(activation) else "(E, I)"
    dtype, bits = w1.dtype.name, (_weight_bits(w1), _weight_bits(w2))
    aligned = xp is np or rows_are_aligned(*bits)
    return Experts(
        *bits,
        _bias(xp, "w1_bias", w1_bias, letters, (num_experts, rows)),
        _bias(xp, "w2_bias", w2_bias, "(E, H)", (num_experts, hidden_size)),
        dtype,
        num_experts,
        hidden_size,
        intermediate_size,
        activation,
        alpha,
        beta,
        limit,
        choose_kernel(xp, None, dtype, hidden_size, intermediate_size, aligned),
        aligned,
    )


def check_weights(w1: Array, w2: Array, activation: str, hidden_states: Array | None = None) -> tuple[int, int]:
    """Check the weights against each other and return H and I; of arrays that disagree, the odd one is named."""
    for name, array, letters in (("w1", w1, "(E, 2I, H)"), ("w2", w2, "(E, H, I)")):
        _check.ndim(name, array, letters, 3)
    _check.dtype("w1", w1, DTYPES)
    _check.same_dtype("w2", w2, "w1", w1)
    letters, factor = ("(E, 2I, H)", 2) if is_gated(activation) else ("(E, I, H)", 1)
    votes = [w1.shape[2], w2.shape[1]]
    if hidden_states is not None and hidden_states.ndim == 2:
        votes.append(hidden_states.shape[1])
    if tuple(w1.shape[1:]) == (w2.shape[1], factor * w2.shape[2]):  # the axes of w1 look swapped
        votes.append(w2.shape[1])
    hidden_size = max(votes, key=votes.count)
    intermediate_size = w2.shape[2] if w2.shape[1] == hidden_size else w1.shape[1] // factor
    for letter, size in (("E", len(w1)), ("H", hidden_size), ("I", intermediate_size)):
        if size < 1:
            raise ValueError(f"w1 and w2 must have {letter} >= 1, got shapes {tuple(w1.shape)} and {tuple(w2.shape)}")
    _check.shape("w1", w1, letters, (len(w1), factor * intermediate_size, hidden_size))
    _check.shape("w2", w2, "(E, H, I)", (len(w1), hidden_size, intermediate_size))
    return hidden_size, intermediate_size


def _weight_bits(weights: Array) -> Array:
    """Bits of weights whose rows lie anywhere; copied only if the elements of a row are not neighbours."""
    if weights.dtype.itemsize == 2:
        weights = weights.view("u2")
    if weights.strides[2] != weights.itemsize and weights.shape[2] > 1:
        return _arrays.bits(weights)
    return _arrays.read_only_as_plain(weights)


def _bias(xp: ModuleType, name: str, bias: Array, letters: str, shape: tuple[int, int]) -> Array:
    if bias is None:
        return xp.empty((0, 0), np.float32)
    check_bias(name, bias, letters, shape)
    return _arrays.bits(bias.astype(np.float32, copy=False))


def check_bias(name: str, bias: Array | None, letters: str, shape: tuple[int, int]) -> None:
    """Check a bias against the rows of its weights; None passes."""
    if bias is not None:
        _check.shape(name, bias, letters, shape)
        _check.dtype(name, bias, DTYPES)


def refuse_quantised(quant_config: Any) -> None:
    """Raise unless `quant_config` is None or says that nothing is quantised."""
    if quant_config is None:
        return
    if not isinstance(quant_config, FusedMoEQuantConfig):
        raise TypeError(f"quant_config must be a FusedMoEQuantConfig, got {type(quant_config).__name__}")
    for desc in (quant_config._a1, quant_config._a2, quant_config._w1, quant_config._w2):
        if desc.dtype is not None:
            raise NotImplementedError(
                f"no kernel for quant_config with dtype {dtype_name(desc.dtype)!r}; available: unquantised, biased"
            )
