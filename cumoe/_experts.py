"""The weights of an MoE layer, checked: what `fused_experts`, `prepare` and `verify` have in common."""

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from cumoe import _arrays, _check, _layer_scheme
from cumoe._act import is_gated, is_interleaved, parameters
from cumoe._arrays import Array
from cumoe._kernel_choice import choose_kernel, rows_are_aligned
from cumoe._quant_config import FusedMoEQuantConfig

DTYPES = ("float32", "float16", "bfloat16")


class Experts(NamedTuple):
    """Weights as kernels see them; sizes and names in the words of design.md."""

    w1: Any  # bits: (E, 2I, H) or packed; or codes
    w2: Any  # bits: (E, H, I) or packed; or codes
    w1_bias: Any  # float32 (E, 2I), or (0, 0)
    w2_bias: Any  # float32 (E, H), or (0, 0)
    dtype: str  # of the activations
    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: str
    alpha: float
    beta: float
    limit: float  # inf: no clamp
    kernel: str
    aligned: bool  # rows begin where every kernel of the side can load them
    scheme: _layer_scheme.Scheme | None = None  # how codes become numbers, and rows codes

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
    quantised = _layer_scheme.is_quantised(quant_config)
    w1_bias, w2_bias = (None, None) if quant_config is None else (quant_config.w1_bias, quant_config.w2_bias)
    arrays = {"w1": w1, "w2": w2, "w1_bias": w1_bias, "w2_bias": w2_bias}
    return arrays | _layer_scheme.parts(quant_config) if quantised else arrays


def make_experts(
    xp: ModuleType, arrays: dict[str, Array], activation: str, quant_config: Any, hidden_states: Array = None
) -> Experts:
    """
    Check weights, biases and activation against each other; arrays that kernels cannot read are converted.

    `arrays` are those of `weight_arrays`, taken in. Quantised weights take their dtype from `hidden_states`; without
    them it is "", for `for_rows` to fill in.
    """
    w1, w2 = arrays["w1"], arrays["w2"]
    alpha, beta, limit = parameters(activation, quant_config)
    scheme: _layer_scheme.Scheme | None = None
    if _layer_scheme.is_quantised(quant_config):
        hidden_size, intermediate_size, scheme = _quantised(xp, arrays, activation, quant_config, hidden_states)
        dtype, bits = "", (_arrays.bits(w1), _arrays.bits(w2))
    else:
        hidden_size, intermediate_size = check_weights(w1, w2, activation, hidden_states)
        dtype, bits = w1.dtype.name, (_weight_bits(w1), _weight_bits(w2))
    aligned = xp is np or rows_are_aligned(*bits)
    num_experts, rows, letters = len(w1), w1.shape[1], "(E, 2I)" if is_gated(activation) else "(E, I)"
    experts = Experts(
        *bits,
        _bias(xp, "w1_bias", arrays["w1_bias"], letters, (num_experts, rows)),
        _bias(xp, "w2_bias", arrays["w2_bias"], "(E, H)", (num_experts, hidden_size)),
        dtype,
        num_experts,
        hidden_size,
        intermediate_size,
        activation,
        alpha,
        beta,
        limit,
        "",
        aligned,
        scheme,
    )
    if scheme is None:
        return experts._replace(kernel=choose_kernel(xp, None, dtype, hidden_size, intermediate_size, aligned))
    return experts if hidden_states is None else for_rows(xp, experts, hidden_states)


def for_rows(xp: ModuleType, experts: Experts, hidden_states: Array) -> Experts:
    """Quantised weights, to be multiplied in the dtype of the tokens."""
    _check.dtype("hidden_states", hidden_states, DTYPES)
    dtype = _check.name_of(hidden_states.dtype)
    sizes = experts.hidden_size, experts.intermediate_size
    return experts._replace(dtype=dtype, kernel=choose_kernel(xp, None, dtype, *sizes, experts.aligned, coded=True))


def _quantised(
    xp: ModuleType, arrays: dict[str, Array], activation: str, quant_config: FusedMoEQuantConfig, hidden_states: Array
) -> tuple[int, int, _layer_scheme.Scheme]:
    """H, I and the scheme of quantised weights, checked."""
    gated, (desc1, desc2) = is_gated(activation), (quant_config._w1, quant_config._w2)
    letters = "(E, 2I, H)" if gated else "(E, I, H)"
    shape1 = _layer_scheme.logical_shape("w1", arrays["w1"], desc1, letters)
    shape2 = _layer_scheme.logical_shape("w2", arrays["w2"], desc2, "(E, H, I)")
    num_experts, hidden_size, intermediate_size = shape2
    if hidden_states is not None and hidden_states.ndim == 2 and hidden_states.shape[1] == shape1[2] != hidden_size:
        hidden_size = shape1[2]  # two agree: w2 is the odd one
    for letter, size in (("E", num_experts), ("H", hidden_size), ("I", intermediate_size)):
        if size < 1:
            raise ValueError(f"w1 and w2 must have {letter} >= 1, got sizes {shape1} and {shape2}")
    expected = {"w1": (shape1, (num_experts, (1 + gated) * intermediate_size, hidden_size), letters)}
    expected["w2"] = (shape2, (num_experts, hidden_size, intermediate_size), "(E, H, I)")
    for name, (got, wanted, axes) in expected.items():
        if got != wanted:
            packed = " (K counts the codes, two a byte)" if got[2] != arrays[name].shape[2] else ""
            raise ValueError(f"{name} must be {axes} = {wanted}{packed}, got {got}")
    halves = gated and not is_interleaved(activation)
    a1 = _layer_scheme.rows_of(1, quant_config._a1, arrays, num_experts)
    a2 = _layer_scheme.rows_of(2, quant_config._a2, arrays, num_experts)
    scheme = _layer_scheme.Scheme(
        _layer_scheme.weight_of(xp, 1, arrays["w1"], desc1, arrays, shape1, halves, a1),
        _layer_scheme.weight_of(xp, 2, arrays["w2"], desc2, arrays, shape2, False, a2),
        a1,
        a2,
    )
    return hidden_size, intermediate_size, scheme


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
