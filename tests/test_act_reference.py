"""The reference of the activations: its formulas against torch and against numbers, and its bound."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cumoe.reference import act as law


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("silu", torch.nn.functional.silu),
        ("gelu", torch.nn.functional.gelu),
        ("gelu_tanh", lambda g: torch.nn.functional.gelu(g, approximate="tanh")),
        ("relu", torch.nn.functional.relu),
        ("relu2", lambda g: torch.nn.functional.relu(g) ** 2),
        ("identity", lambda g: g),
    ],
)
def test_reference_equals_torch_in_float64(name, formula):
    g, u = torch.linspace(-40, 40, 4001, dtype=torch.float64), torch.linspace(3, -5, 4001, dtype=torch.float64)
    for one, expected in ((name, formula(g) * u), (f"{name}_no_mul", formula(g))):
        rule = law.ACTIVATIONS[one]
        value = rule.value(g.numpy(), u.numpy(), *rule.parameters())
        np.testing.assert_allclose(value, expected.numpy(), rtol=1e-13, atol=1e-15)


def scalar_value(name, g, u, alpha, beta, limit):
    """The table of formulas, once more, for one number."""
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    cap, clamp = min(g, limit), max(-limit, min(u, limit))
    return {
        "silu": lambda: cap * sigmoid(cap) * clamp,
        "swigluoai": lambda: (clamp + beta) * cap * sigmoid(alpha * cap),
        "swigluoai_uninterleave": lambda: (clamp + beta) * cap * sigmoid(alpha * cap),
        "swiglustep": lambda: min(g * sigmoid(g), limit) * clamp,
        "situ": lambda: beta * math.tanh(g / beta) * sigmoid(g) * limit * math.tanh(u / limit),
    }[name]()


@pytest.mark.parametrize("name", ["silu", "swigluoai", "swigluoai_uninterleave", "swiglustep", "situ"])
@given(st.floats(-20, 20), st.floats(-20, 20), st.floats(-2, 2), st.floats(0.1, 5), st.floats(0.1, 20))
def test_reference_equals_the_table(name, g, u, alpha, beta, limit):
    value = law.ACTIVATIONS[name].value(g, u, alpha, beta, limit)
    assert value == pytest.approx(scalar_value(name, g, u, alpha, beta, limit), rel=1e-12, abs=1e-300)


def test_split_says_which_columns_are_gates():
    h = np.arange(8)[None]
    assert [part.tolist() for part in law.split(h, "silu")] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert [part.tolist() for part in law.split(h, "swigluoai")] == [[[0, 2, 4, 6]], [[1, 3, 5, 7]]]
    assert law.split(h, "silu_no_mul") == (h, None)


def test_reference_defaults():
    assert law.ACTIVATIONS["silu"].parameters() == (1.0, 0.0, math.inf)
    assert law.ACTIVATIONS["swigluoai"].parameters() == (1.702, 1.0, 7.0)
    assert law.ACTIVATIONS["swiglustep"].parameters(None, None, 3) == (1.0, 0.0, 3.0)
    with pytest.raises(ValueError, match="limit must be given for this activation, got None"):
        law.ACTIVATIONS["swigluoai_uninterleave"].parameters()


@pytest.mark.parametrize("name", law.ACTIVATIONS)
def test_bound_is_not_far_from_what_it_bounds(name):
    random = np.random.default_rng(5)
    g, u = random.uniform(-8, 8, (2, 1000))
    parameters = law.ACTIVATIONS[name].parameters(1.702, 4.0 if name == "situ" else 1.0, 7.0)
    rule, error = law.ACTIVATIONS[name], np.full(1000, 2.0**-9)
    moved = [rule.value(g + a * error, u + b * error, *parameters) for a in (-1, 1) for b in (-1, 1)]
    truth = np.max(np.abs(np.array(moved) - rule.value(g, u, *parameters)), axis=0)
    bound = rule.error(g, u, error, error, *parameters)
    assert np.median(bound / np.maximum(truth, 1e-3)) < 10
