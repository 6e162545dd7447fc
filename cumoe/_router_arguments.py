"""What the functions that route tokens check in common, and the results that they write."""

import numbers
from typing import Any

from cumoe import _arrays, _check
from cumoe._arrays import Array

FLOATS = ("float32", "float16", "bfloat16")
INTEGERS = ("int32", "int64", "uint32")
SCORING_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")


def signed(ids: Array) -> Array:
    """View uint32 ids as int32, so that the -1 of a padding token is below 0 again."""
    return ids.view("int32") if ids.dtype.name == "uint32" else ids


def shape_of(logits: Array) -> tuple[int, int]:
    """Check router logits and return (T, E)."""
    _check.ndim("router_logits", logits, "(T, E)", 2)
    _check.dtype("router_logits", logits, FLOATS)
    num_tokens, num_experts = logits.shape
    _check.integer("router_logits.shape[1]", num_experts, 1, 2**31 - 1)
    return num_tokens, num_experts


def empty(side: _arrays.Side, num_tokens: int, top_k: int, indices_dtype: str) -> tuple[Array, Array]:
    """Allocate topk_weights and topk_ids."""
    _check.choice("indices_dtype", indices_dtype, INTEGERS)
    return side.xp.empty((num_tokens, top_k), "float32"), side.xp.empty((num_tokens, top_k), indices_dtype)


def of_experts(name: str, array: Array | None, num_experts: int) -> Array | None:
    """Check an (E,) array; kernels take it as float32."""
    if array is None:
        return None
    _check.shape(name, array, "(E,)", (num_experts,))
    _check.dtype(name, array, FLOATS)
    return _arrays.bits(array.astype("float32", copy=False))


def padding(array: Array | None, num_tokens: int) -> Array | None:
    """Check a (T,) mask of padding tokens."""
    if array is None:
        return None
    _check.shape("is_padding", array, "(T,)", (num_tokens,))
    _check.dtype("is_padding", array, ("bool",))
    return _arrays.bits(array)


def token_ids(array: Array | None, num_tokens: int) -> Array | None:
    """Check (T,) vocabulary ids; kernels take them as int64."""
    if array is None:
        return None
    _check.shape("input_ids", array, "(T,)", (num_tokens,))
    _check.dtype("input_ids", array, INTEGERS)
    return _arrays.bits(array.astype("int64", copy=False))


def known_scoring(scoring_func: str) -> str:
    """Return the name of a scoring function if it is one."""
    _check.choice("scoring_func", scoring_func, SCORING_FUNCTIONS)
    return scoring_func


def number(name: str, value: Any) -> float:
    """Return a real number as a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)
