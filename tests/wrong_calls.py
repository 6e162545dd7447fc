"""Arguments of wrong calls, small and right but for one change, and how a refusal is judged."""

import ml_dtypes  # noqa: F401  names bfloat16
import numpy as np
import pytest

import cumoe

T, K, E, H, I = 5, 2, 4, 32, 24
HUGE = 2**31
RNG = np.random.default_rng(0)
X = RNG.standard_normal((T, H), np.float32)
W1 = RNG.standard_normal((E, 2 * I, H), np.float32)
W2 = RNG.standard_normal((E, H, I), np.float32)
IDS = np.array([[0, 1], [2, 3], [1, 0], [3, 2], [0, 3]], np.int32)
WEIGHTS = np.full((T, K), 0.5, np.float32)
LOGITS = RNG.standard_normal((T, E), np.float32)
MAP = np.array([0, -1, 1, 2, -1, 3], np.int32)
PREPARED = cumoe.prepare(W1, W2)
INTERLEAVED = cumoe.prepare(W1, W2, activation="swigluoai")

LAYER = {"hidden_states": X, "w1": W1, "w2": W2, "topk_weights": WEIGHTS, "topk_ids": IDS}
READY = {**LAYER, "w1": PREPARED, "w2": None}


NAMES = (
    "silu, gelu, gelu_tanh, swigluoai, swigluoai_uninterleave, swiglustep, situ, reglu, relu2, identity, silu_no_mul, "
    "gelu_no_mul, gelu_tanh_no_mul, relu_no_mul, relu2_no_mul, identity_no_mul, geglu, gelu_pytorch_tanh, "
    "gelu_pytorch_tanh_no_mul or relu"
)


def put(array, index, value):
    """A copy with one element changed."""
    copy = array.copy()
    copy[index] = value
    return copy


def zeros(*shape, dtype="float32"):
    """An array of any size in a few bytes."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def read_only(array):
    array.flags.writeable = False
    return array


def unaligned(shape):
    return np.zeros(4 * int(np.prod(shape)) + 1, np.uint8)[1:].view(np.float32).reshape(shape)


def tensor(array, **keywords):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    return torch.tensor(array, **keywords)


def refused(function, arguments, message):
    """The call raises exactly this, told as "Kind: message", and a given `out` is as it was."""
    out = arguments.get("out")
    before = out.tobytes() if isinstance(out, np.ndarray) else None
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as raised:
        function(**arguments)
    assert f"{type(raised.value).__name__}: {raised.value}" == message
    assert before is None or out.tobytes() == before


def table(*rows):
    return pytest.mark.parametrize(("change", "message"), rows)
