"""The activations: every name and dtype against the reference's bound, and what the bound cannot see."""

import math
import re
from typing import NamedTuple

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sides import back

import cumoe
from cumoe import _act
from cumoe.cpu import act as loops
from cumoe.cpu import bits
from cumoe.reference import act as law
from cumoe.reference.rounding import FLUSH, rounded

NAMES = tuple(law.ACTIVATIONS)
GATED = tuple(name for name in NAMES if law.is_gated(name))
DTYPES = ("float32", "float16", "bfloat16")
SPECIAL = (np.nan, np.inf, -np.inf, 0.0, -0.0, 7.0, -7.0, 88.0, -88.0, 1e30, -1e30, 1e-40, 3e38, 6e4)


class Problem(NamedTuple):
    name: str
    x: np.ndarray
    chosen: dict

    @property
    def parameters(self):
        return law.ACTIVATIONS[self.name].parameters(**self.chosen)


def draw_parameters(draw, name):
    rule = law.ACTIVATIONS[name]
    ranges = {"alpha": (-3.0, 3.0), "beta": (0.1, 5.0) if rule.soft else (-2.0, 2.0), "limit": (0.01, 30.0)}
    needed = {parameter for parameter in rule.takes if getattr(rule, parameter) is None}
    return {
        parameter: draw(st.floats(*ranges[parameter]))
        for parameter in rule.takes
        if parameter in needed or draw(st.booleans())
    }


@st.composite
def problems(draw, names=NAMES, special=SPECIAL):
    name = draw(st.sampled_from(names))
    shape = *draw(st.sampled_from([(), (1,), (3,), (2, 5), (0,), (1, 0, 2)])), draw(st.integers(0, 70))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    width = shape[-1] * (2 if law.is_gated(name) else 1)
    x = random.standard_normal((*shape[:-1], width)) * 10.0 ** random.integers(-4, 4, (*shape[:-1], width))
    chosen = draw_parameters(draw, name)
    if special:
        limit = law.ACTIVATIONS[name].parameters(**chosen)[2]
        places = random.random(x.shape) < draw(st.sampled_from([0.0, 0.2]))
        x = np.where(places, random.choice([*special, limit, -limit], x.shape), x)
    with np.errstate(over="ignore", invalid="ignore"):
        x = x.astype(draw(st.sampled_from(DTYPES)))
    return Problem(name, x, chosen)


def check(out, problem):
    """
    Every element within the bound; where the value is not finite, the same NaN or infinity.

    A gate that may have come out as zero, times an infinite up, is 0 * inf.
    """
    g, u = law.split(problem.x, problem.name)
    rule, parameters, zero = law.ACTIVATIONS[problem.name], problem.parameters, np.zeros(g.shape)
    value = rule.value(g, u, *parameters)
    with np.errstate(all="ignore"):
        bound = rounded(value, rule.error(g, u, zero, zero, *parameters), problem.x.dtype)
        computed = out.astype(np.float64)
        finite = np.isfinite(value)
        gate, gate_error = rule.gate.bounded(g.astype(np.float64), zero, FLUSH, *parameters)
        lost = np.isnan(computed) & np.isinf(value) & (gate <= gate_error)
        same = (computed == value) | (np.isnan(computed) & np.isnan(value)) | lost
        assert same[~finite].all()
        # the dtype may be too small for the value, which shows as an infinite bound
        wrong = finite & ~(np.abs(computed - value) <= bound) & ~np.isinf(bound)
    i = tuple(axis[0] for axis in wrong.nonzero()) if wrong.any() else None
    assert i is None, f"at {i}: g={g[i]}, u={None if u is None else u[i]}, got {computed[i]}, expected {value[i]}"


@given(problem=problems())
def test_equals_reference(xp, problem):
    x = xp.asarray(problem.x)
    out = cumoe.moe_activation(x, problem.name, **problem.chosen)
    assert isinstance(out, xp.ndarray)
    assert out.dtype == x.dtype
    check(back(out), problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_name_and_dtype_equals_reference(xp, name, dtype):
    random = np.random.default_rng(3)
    x = (random.standard_normal((11, 302)) * random.choice([1e-3, 1.0, 30.0], (11, 302))).astype(dtype)
    rule = law.ACTIVATIONS[name]
    chosen = {parameter: 2.5 for parameter in rule.takes if getattr(rule, parameter) is None}
    problem = Problem(name, x, chosen)
    check(back(cumoe.moe_activation(xp.asarray(x), name, **chosen)), problem)


@given(problem=problems(special=()), seed=st.integers(0, 2**32))
def test_bound_covers_inexact_inputs(xp, problem, seed):
    random = np.random.default_rng(seed)
    x = problem.x.astype(np.float32)
    x = np.where(np.isfinite(x), x, np.float32(0))
    out = back(cumoe.moe_activation(xp.asarray(x), problem.name, **problem.chosen)).astype(np.float64)
    error = np.abs(x) * 10.0 ** random.uniform(-6, 0, x.shape) + random.choice([0.0, 1e-3, 1.0], x.shape)
    inexact = x + error * random.choice([-1.0, 1.0], x.shape) * random.choice([1.0, 0.5], x.shape)
    (g, u), (e_g, e_u) = law.split(inexact, problem.name), law.split(error * (1 + 1e-12), problem.name)
    rule, parameters = law.ACTIVATIONS[problem.name], problem.parameters
    with np.errstate(invalid="ignore"):
        assert not np.any(np.abs(out - rule.value(g, u, *parameters)) > rule.error(g, u, e_g, e_u, *parameters))


# -- exact properties -------------------------------------------------------------------------------


@given(problem=problems())
def test_small_floats_are_rounded_once(xp, problem):
    wide = back(cumoe.moe_activation(xp.asarray(problem.x.astype(np.float32)), problem.name, **problem.chosen))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = wide.astype(problem.x.dtype)
    out = back(cumoe.moe_activation(xp.asarray(problem.x), problem.name, **problem.chosen))
    assert np.array_equal(np.isnan(out), np.isnan(expected))
    assert out[~np.isnan(out)].tobytes() == expected[~np.isnan(out)].tobytes()


@given(problem=problems(names=["swigluoai"]))
def test_interleaved_equals_halves(xp, problem):
    limit = problem.parameters[2]
    halves = np.concatenate(law.split(problem.x, "swigluoai"), axis=-1)
    out = cumoe.moe_activation(xp.asarray(problem.x), "swigluoai", **problem.chosen)
    same = cumoe.moe_activation(xp.asarray(halves), "swigluoai_uninterleave", **{**problem.chosen, "limit": limit})
    # NumPy's comparison takes two bfloat16 NaNs for different
    np.testing.assert_array_equal(back(out).astype(np.float32), back(same).astype(np.float32))


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("geglu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "reglu"),
        ("gelu_pytorch_tanh_no_mul", "gelu_tanh_no_mul"),
    ],
)
def test_aliases(xp, alias, name):
    x = xp.asarray(np.random.default_rng(0).standard_normal((4, 20), np.float32))
    np.testing.assert_array_equal(back(cumoe.moe_activation(x, alias)), back(cumoe.moe_activation(x, name)))


@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_rows_and_threads(xp, name):
    random = np.random.default_rng(9)
    x = (random.standard_normal((300, 404)) * 4).astype(np.float32)  # enough for all threads
    chosen = {"beta": 4.0} if name == "situ" else {"limit": 3.0} if name == "swigluoai_uninterleave" else {}
    out = back(cumoe.moe_activation(xp.asarray(x), name, **chosen))
    for r in (0, 17, 299):
        alone = back(cumoe.moe_activation(xp.asarray(x[r]), name, **chosen))
        assert alone.tobytes() == out[r].tobytes()
    again = back(cumoe.moe_activation(xp.asarray(x), name, **chosen))
    assert again.tobytes() == out.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_nan(xp, name, dtype):
    # clamps would hide it if they compared the other way round
    x = np.full((33, 2), 2.0, dtype)
    chosen = {name: 2.0 for name in law.ACTIVATIONS[name].takes}
    for column in range(2):
        y = x.copy()
        y[:, column] = np.nan
        out = back(cumoe.moe_activation(xp.asarray(y), name, **chosen))
        assert np.isnan(out if law.is_gated(name) else out[:, column]).all()
        assert law.is_gated(name) or np.isfinite(out[:, 1 - column]).all()


@pytest.mark.parametrize("name", ["silu", "swigluoai_uninterleave", "swiglustep"])
def test_clamps_at_their_borders(xp, name):
    limit = np.float32(7)
    beyond = [limit, np.nextafter(limit, np.float32(np.inf)), np.float32(1e30), np.float32(np.inf)]

    def apply(g, u):
        return back(cumoe.moe_activation(xp.asarray(np.array([g, u], np.float32)), name, limit=7.0))[0]

    for u in beyond:  # the up is cut at the limit, from both sides
        assert apply(2.0, u) == apply(2.0, limit)
        assert apply(2.0, -u) == apply(2.0, -limit)
    assert apply(2.0, np.nextafter(limit, np.float32(0))) < apply(2.0, limit)
    if name == "swiglustep":  # silu comes before the cut: silu(7) < 7 < silu(7.1)
        assert apply(7.0, 1.0) < 7.0
        assert [apply(g, 1.0) for g in (7.1, 1e30, np.inf)] == [7.0] * 3
    else:
        assert [apply(g, 1.0) for g in beyond] == [apply(limit, 1.0)] * 4
        assert apply(6.9999, 1.0) < apply(limit, 1.0)
    assert apply(-100.0, 1.0) == 0  # not cut from below


def test_infinite_limit_is_no_clamp(xp):
    x = xp.asarray(np.random.default_rng(0).standard_normal((4, 20), np.float32) * 100)
    plain = back(cumoe.silu_and_mul(x))
    np.testing.assert_array_equal(back(cumoe.silu_and_mul(x, limit=math.inf)), plain)
    np.testing.assert_array_equal(back(cumoe.moe_activation(x, "silu", limit=3.4e38)), plain)
    soft = back(cumoe.situ_and_mul(x, beta=4.0, linear_beta=1e6))
    np.testing.assert_allclose(back(cumoe.situ_and_mul(x, beta=4.0)), soft, rtol=1e-5)


def test_infinities(xp):
    def apply(name, g, u, **chosen):
        return float(cumoe.moe_activation(xp.asarray(np.array([g, u], np.float32)), name, **chosen)[0])

    inf = np.inf
    assert apply("silu", inf, 2.0) == inf
    assert math.isnan(apply("silu", -inf, 2.0))  # -inf * 0, as the formula says
    assert apply("silu", -3e38, 2.0) == 0
    assert apply("gelu_tanh", -1e30, 2.0) == 0  # its cube overflows
    assert apply("gelu_tanh", 1e30, 2.0) == pytest.approx(2e30)
    assert apply("relu", -inf, 2.0) == 0
    assert apply("relu2", 1e20, 2.0) == inf
    assert apply("situ", inf, inf, beta=2.0, limit=3.0) == 6
    assert apply("situ", -inf, 5.0, beta=2.0) == 0


# -- arrays of every kind ---------------------------------------------------------------------------


def strided(xp, x):
    """The same numbers in several layouts."""
    bits = xp.asarray(x.view(f"u{x.itemsize}"))
    wide = xp.zeros((*x.shape[:-1], 2 * x.shape[-1] + 3), bits.dtype)
    wide[..., 1:-2:2] = bits
    layouts = {
        "sliced": wide[..., 1:-2:2],
        "reversed": bits[::-1, ::-1].copy()[::-1, ::-1],
        "transposed": bits.T.copy().T,
        "fortran": xp.asfortranarray(bits),
    }
    layouts = {name: layout.view(x.dtype) for name, layout in layouts.items()}
    if xp is np:
        layouts["read-only"] = x.copy()
        layouts["read-only"].flags.writeable = False
    return layouts


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_untouched_inputs(xp, dtype):
    x = np.random.default_rng(0).standard_normal((6, 10)).astype(dtype)
    for name in ("silu", "swigluoai", "relu2_no_mul"):
        expected = back(cumoe.moe_activation(xp.asarray(x), name))
        for layout, y in strided(xp, x).items():
            out = cumoe.moe_activation(y, name)
            np.testing.assert_array_equal(back(out), expected, err_msg=layout)
            assert np.array_equal(back(y), x), layout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu", "swigluoai", "gelu_no_mul"])
def test_every_size_of_a_piece(xp, name, dtype):
    """Kernels move 16, 8, 4 or 2 bytes at a time, as sizes and addresses allow."""
    x = np.random.default_rng(0).standard_normal((7, 96)).astype(dtype)
    for width in (48, 46, 45, 44, 40, 1):
        for start in (0, 1, 2, 4):
            rows = np.ascontiguousarray(x[:, : width * (1 + law.is_gated(name))])
            buffer = xp.asarray(np.concatenate([np.zeros(start, dtype), rows.ravel()]))
            target = xp.asarray(np.zeros(start + 7 * width, dtype))
            out = cumoe.moe_activation(
                buffer[start:].reshape(rows.shape),
                name,
                out=target[start:].reshape(7, width),
            )
            check(back(out), Problem(name, rows, {}))
            assert not back(target)[:start].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_arrays(xp, dtype):
    for shape, expected in (((0, 8), (0, 4)), ((3, 0), (3, 0)), ((0,), (0,)), ((2, 0, 6), (2, 0, 3))):
        out = cumoe.silu_and_mul(xp.empty(shape, dtype))
        assert (out.shape, out.dtype) == (expected, dtype)
        assert cumoe.silu_no_mul(xp.empty(shape, dtype)).shape == shape


def test_out_is_written_and_returned(xp):
    x = xp.asarray(np.random.default_rng(0).standard_normal((6, 10), np.float32))
    out = xp.full((6, 5), np.nan, np.float32)
    assert cumoe.silu_and_mul(x, out=out) is out
    np.testing.assert_array_equal(back(out), back(cumoe.silu_and_mul(x)))
    part = xp.zeros((8, 5), np.float32)
    cumoe.silu_and_mul(x, out=part[1:7])
    np.testing.assert_array_equal(back(part[1:7]), back(out))
    assert not back(part[[0, 7]]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_tensors(dtype):
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = cumoe.silu_and_mul(x)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == dtype
    expected = cumoe.silu_and_mul(x.float().numpy())
    assert torch.equal(out, torch.from_numpy(expected).to(dtype))
    given_out = torch.empty(5, 6, dtype=dtype)
    assert cumoe.silu_and_mul(x, out=given_out) is given_out
    assert torch.equal(given_out, out)


@pytest.mark.parametrize(
    ("function", "name", "chosen"),
    [
        (cumoe.silu_and_mul, "silu", {}),
        (cumoe.silu_and_mul, "silu", {"limit": 0.5}),
        (cumoe.gelu_and_mul, "gelu", {}),
        (cumoe.gelu_tanh_and_mul, "gelu_tanh", {}),
        (cumoe.swigluoai_and_mul, "swigluoai", {}),
        (cumoe.swigluoai_and_mul, "swigluoai", {"alpha": 1.5, "limit": 0.5}),
        (cumoe.swiglustep_and_mul, "swiglustep", {}),
        (cumoe.swiglustep_and_mul, "swiglustep", {"limit": 0.5}),
        (cumoe.silu_no_mul, "silu_no_mul", {}),
        (cumoe.gelu_no_mul, "gelu_no_mul", {}),
        (cumoe.gelu_tanh_no_mul, "gelu_tanh_no_mul", {}),
        (cumoe.relu2_no_mul, "relu2_no_mul", {}),
    ],
)
def test_functions_by_name(xp, function, name, chosen):
    x = xp.asarray(np.random.default_rng(0).standard_normal((3, 8), np.float32))
    out = back(function(x, **chosen))
    np.testing.assert_array_equal(out, back(cumoe.moe_activation(x, name, **chosen)))
    given_out = xp.empty(out.shape, np.float32)
    assert function(x, **chosen, out=given_out) is given_out


def test_situ_by_name(xp):
    x = xp.asarray(np.random.default_rng(0).standard_normal((3, 8), np.float32))
    for linear_beta in (None, 25.0):
        expected = cumoe.moe_activation(x, "situ", beta=4.0, limit=linear_beta)
        out = cumoe.situ_and_mul(x, beta=4.0, linear_beta=linear_beta)
        np.testing.assert_array_equal(back(out), back(expected))


# -- the loops --------------------------------------------------------------------------------------


def test_every_name_is_everywhere():
    assert set(loops.SCALAR) == set(law.ACTIVATIONS)
    for name, rule in law.ACTIVATIONS.items():
        assert rule.is_gated == (not name.endswith("_no_mul")) == _act.is_gated(name) == law.is_gated(name)
        assert _act.is_interleaved(name) == (name == "swigluoai")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", loops.SCALAR)
def test_every_loop_is_vector_code(name, dtype):
    load, store = bits.CODECS[dtype]
    template = (
        loops._alone if name.endswith("_no_mul") else loops._interleaved if name == "swigluoai" else loops._halves
    )
    scope = {**template.__globals__, "ACT": loops.SCALAR[name], "LOAD": load, "STORE": store}
    loop = numba.njit(error_model="numpy")(type(template)(template.__code__, scope, name))
    kind = np.float32 if dtype == "float32" else np.uint16
    x, one = np.zeros((2, 4), kind), np.float32(1)
    loop(0, 2, (x, one, one, one, np.zeros((2, 4 if name.endswith("_no_mul") else 2), kind)))
    code = loop.inspect_llvm(loop.signatures[0])
    lanes = "float" if dtype == "float32" else "i32"
    assert re.search(rf"= .*<\d+ x {lanes}>", code)
    assert not re.search(r"call \S*float @(?!llvm\.)", code)
