"""Where the parameters of an activation come from, and every refusal of the activations, word for word."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cumoe
from cumoe import _act
from cumoe.reference import act as law

NAMES = tuple(law.ACTIVATIONS)


def quant(**fields):
    return SimpleNamespace(**{"gemm1_alpha": None, "gemm1_beta": None, "gemm1_clamp_limit": None, **fields})


def moe(**fields):
    names = ("swiglu_alpha", "swiglu_beta", "swiglu_limit", "activation_situ_beta", "activation_situ_linear_beta")
    return SimpleNamespace(**{**dict.fromkeys(names), **fields})


@pytest.mark.parametrize(
    ("name", "quant_config", "moe_config", "expected"),
    [
        ("silu", None, None, (1.0, 0.0, math.inf)),
        ("silu", quant(), moe(), (1.0, 0.0, math.inf)),
        ("silu", quant(gemm1_clamp_limit=10), moe(swiglu_limit=3.0), (1.0, 0.0, 10.0)),
        ("silu", quant(), moe(swiglu_limit=3.0, swiglu_alpha=1.0, swiglu_beta=0.0), (1.0, 0.0, 3.0)),
        ("swigluoai", None, None, (1.702, 1.0, 7.0)),
        ("swigluoai", quant(gemm1_alpha=1.5), moe(swiglu_alpha=9.0, swiglu_beta=0.5), (1.5, 0.5, 7.0)),
        ("swigluoai_uninterleave", quant(gemm1_clamp_limit=5.0), None, (1.702, 1.0, 5.0)),
        ("swigluoai_uninterleave", None, moe(swiglu_limit=np.float32(2)), (1.702, 1.0, 2.0)),
        ("swiglustep", quant(), None, (1.0, 0.0, 7.0)),
        ("situ", None, moe(activation_situ_beta=4.0, swiglu_limit=9.0), (1.0, 4.0, math.inf)),
        ("situ", quant(gemm1_beta=2.0), moe(activation_situ_linear_beta=25.0), (1.0, 2.0, 25.0)),
        ("gelu", quant(), moe(), (1.0, 0.0, math.inf)),
        ("relu2_no_mul", None, None, (1.0, 0.0, math.inf)),
    ],
)
def test_parameter_precedence(name, quant_config, moe_config, expected):
    found = _act.parameters(name, quant_config, moe_config)
    assert found == expected
    assert [type(value) for value in found] == [float] * 3


def test_parameters_come_from_the_real_configurations():
    quant_config = cumoe.FusedMoEQuantConfig.make(gemm1_alpha=1.5, gemm1_clamp_limit=3.0)
    assert _act.parameters("swigluoai", quant_config) == (1.5, 1.0, 3.0)
    fields = cumoe.FusedMoEConfig.__dataclass_fields__
    for _, field in (*_act._FIELDS.values(), *_act._SITU_FIELDS.values()):
        assert not field or field in fields


PARAMETER_ERRORS = [
    (
        lambda: _act.parameters("swigluoai_uninterleave"),
        ValueError,
        "limit must be given for 'swigluoai_uninterleave', got None; "
        "set quant_config.gemm1_clamp_limit or moe_config.swiglu_limit",
    ),
    (
        lambda: _act.parameters("situ", quant(), moe(swiglu_beta=2.0)),
        ValueError,
        "beta must be given for 'situ', got None; set quant_config.gemm1_beta or moe_config.activation_situ_beta",
    ),
    (
        lambda: _act.parameters("silu", quant(gemm1_alpha=1.702)),
        ValueError,
        "quant_config.gemm1_alpha must be None for 'silu', which does not use it, got 1.702",
    ),
    (
        lambda: _act.parameters("gelu", None, moe(swiglu_limit=7.0)),
        ValueError,
        "moe_config.swiglu_limit must be None for 'gelu', which does not use it, got 7.0",
    ),
    (
        lambda: _act.parameters("silu", quant(gemm1_clamp_limit=0)),
        ValueError,
        "quant_config.gemm1_clamp_limit must be > 0, got 0.0",
    ),
    (
        lambda: _act.parameters("silu", quant(gemm1_clamp_limit=np.ones(3))),
        TypeError,
        "quant_config.gemm1_clamp_limit must be a number, got ndarray",
    ),
    (
        lambda: _act.parameters("swish"),
        ValueError,
        f"activation must be {', '.join(NAMES[:-1])} or {NAMES[-1]}, got 'swish'",
    ),
    (
        lambda: _act.is_gated("swigluoai_no_mul"),
        ValueError,
        f"activation must be {', '.join(NAMES[:-1])} or {NAMES[-1]}, got 'swigluoai_no_mul'",
    ),
]

X = np.zeros((3, 8), np.float32)
LOCKED = np.zeros((3, 4), np.float32)
LOCKED.flags.writeable = False
CALL_ERRORS = [
    (
        lambda: cumoe.silu_and_mul([1.0, 2.0]),
        TypeError,
        "x must be a NumPy, CuPy or DLPack array, got list; use numpy.asarray",
    ),
    (
        lambda: cumoe.silu_and_mul(X.astype(np.float64)),
        TypeError,
        "x must be float32, float16 or bfloat16, got float64",
    ),
    (lambda: cumoe.silu_and_mul(X.astype(np.int32)), TypeError, "x must be float32, float16 or bfloat16, got int32"),
    (
        lambda: cumoe.silu_and_mul(X[:, :7]),
        ValueError,
        "x must have an even last axis (..., 2I) for 'silu', got shape (3, 7)",
    ),
    (lambda: cumoe.silu_and_mul(X[0, 0, ...]), ValueError, "x must have at least 1 axis (..., 2I), got shape ()"),
    (lambda: cumoe.silu_no_mul(X[0, 0, ...]), ValueError, "x must have at least 1 axis (..., I), got shape ()"),
    (
        lambda: cumoe.silu_and_mul(X, out=X[:, :4]),
        ValueError,
        "out must be C-contiguous, got strides (32, 4) for shape (3, 4); pass a separate array or out=None",
    ),
    (
        lambda: cumoe.silu_and_mul(X, out=X.reshape(-1)[:12].reshape(3, 4)),
        ValueError,
        "out must not share memory with x; pass a separate array or out=None",
    ),
    (lambda: cumoe.silu_and_mul(X, out=X.copy()), ValueError, "out must have shape (..., I) = (3, 4), got (3, 8)"),
    (lambda: cumoe.silu_and_mul(X, out=np.zeros((3, 4), np.float16)), TypeError, "out must be float32, got float16"),
    (
        lambda: cumoe.silu_and_mul(X, out=LOCKED),
        ValueError,
        "out must be writeable, got a read-only array; pass a copy",
    ),
    (
        lambda: cumoe.silu_and_mul(X, out=torch.zeros(3, 4)),
        TypeError,
        "arguments must be all NumPy arrays, all CuPy arrays or all of one DLPack library, got x: numpy, out: torch",
    ),
    (lambda: cumoe.silu_and_mul(X, limit=-1), ValueError, "limit must be > 0, got -1.0"),
    (lambda: cumoe.silu_and_mul(X, limit=math.nan), ValueError, "limit must be > 0, got nan"),
    (lambda: cumoe.silu_and_mul(X, limit=1e-60), ValueError, "limit must be > 0, got 1e-60"),
    (lambda: cumoe.silu_and_mul(X, limit="7"), TypeError, "limit must be a number, got str"),
    (lambda: cumoe.silu_and_mul(X, limit=True), TypeError, "limit must be a number, got bool"),
    (lambda: cumoe.swigluoai_and_mul(X, alpha=math.inf), ValueError, "alpha must be finite in float32, got inf"),
    (lambda: cumoe.situ_and_mul(X, beta=0.0), ValueError, "beta must be > 0, got 0.0"),
    (lambda: cumoe.situ_and_mul(X, beta=1e39), ValueError, "beta must be finite in float32, got 1e+39"),
    (lambda: cumoe.situ_and_mul(X, beta=4.0, linear_beta=-1.0), ValueError, "linear_beta must be > 0, got -1.0"),
    (lambda: cumoe.moe_activation(X, "situ"), ValueError, "beta must be given for 'situ', got None"),
    (
        lambda: cumoe.moe_activation(X, "gelu", limit=7.0),
        ValueError,
        "limit must be None for 'gelu', which does not use it, got 7.0",
    ),
    (
        lambda: cumoe.moe_activation(X, "silu", alpha=1.7),
        ValueError,
        "alpha must be None for 'silu', which does not use it, got 1.7",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), [*PARAMETER_ERRORS, *CALL_ERRORS])
def test_refusals(call, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call()
