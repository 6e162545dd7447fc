"""How the CPU suite holds weights: bytes, configs, the numbers that codes stand for, and the ceilings that apply."""

import numpy as np
import pytest

import cumoe
from cumoe.bench import ceilings, schemes, shapes, weights
from cumoe.cpu import coded_panels

TINY = shapes.SHAPES["tiny"]
ODD = shapes.Shape("odd", num_experts=2, top_k=1, hidden_size=160, intermediate_size=96)


@pytest.mark.parametrize("name", schemes.SCHEMES)
@pytest.mark.parametrize("shape", [TINY, ODD], ids=lambda shape: shape.name)
def test_bytes_are_those_of_what_is_drawn(name, shape):
    scheme = schemes.SCHEMES[name]
    w1, w2 = scheme.draw(shape)
    assert scheme.weight_bytes(shape) == schemes.num_bytes(w1) + schemes.num_bytes(w2)
    assert scheme.weight_bytes(shape) == shape.num_experts * scheme.expert_bytes(shape)
    tokens = 2 * 3 * shape.hidden_size * (4 if name == "float32" else 2)
    assert scheme.moved_bytes(shape, 3, 2) == 2 * scheme.expert_bytes(shape) + tokens
    plain = shape.weight_bytes(scheme.dtype)
    assert scheme.drawing_bytes(shape) == (0 if isinstance(w1, np.ndarray) else plain)
    assert scheme.weight_bytes(shape) <= plain


def test_bytes_of_an_expert_of_a_named_shape():
    qwen = shapes.SHAPES["qwen3-30b-a3b"]
    numbers = 3 * 2048 * 768
    rows = 2 * 768 + 2048
    expected = {
        "bfloat16": 2 * numbers,
        "float32": 4 * numbers,
        "int8 w8a8": numbers + 4 * rows,
        "int8 w8a16": numbers + 4 * rows,
        "int4 w4a16": numbers // 2 + numbers // 128 * 2,
        "int4 w4a8": numbers // 2 + numbers // 128 * 2,
        "fp8 w8a16": numbers + numbers // 128**2 * 4,
        "mxfp4 w4a16": numbers // 2 + numbers // 32,
    }
    assert {name: schemes.SCHEMES[name].expert_bytes(qwen) for name in expected} == expected


@pytest.mark.parametrize("name", schemes.SCHEMES)
def test_the_layer_of_a_scheme_is_that_of_the_numbers_it_stands_for(name):
    scheme = schemes.SCHEMES[name]
    w1, w2 = scheme.draw(ODD, seed=3)
    numbers = schemes.numbers(w1), schemes.numbers(w2)
    assert numbers[0].shape == (2, 192, 160) and numbers[1].shape == (2, 160, 96)
    for part, w, plain in zip(numbers, (w1, w2), weights.draw(ODD, scheme.dtype, seed=3), strict=True):
        whole = w if isinstance(w, np.ndarray) else cumoe.dequantize(w)
        for e in range(2):
            np.testing.assert_array_equal(part[e], whole[e])
        assert np.corrcoef(whole.astype("f8").ravel(), plain.astype("f8").ravel())[0, 1] > 0.98
    x, routed = shapes.tokens(ODD, 3, scheme.dtype), shapes.routing(ODD, 3)
    stored = schemes.stored(w1), schemes.stored(w2)
    config = scheme.config(w1, w2)
    out = cumoe.fused_experts(x, *stored, *routed, quant_config=config)
    whole = [np.stack([part[e] for e in range(2)]).astype(np.float32) for part in numbers]
    exact = cumoe.fused_experts(x.astype(np.float32), *whole, *routed)
    error = np.linalg.norm(out.astype("f8") - exact) / np.linalg.norm(exact)
    assert error < (0.06 if scheme.products == "int8" else 0.01)


def test_a_scheme_says_what_it_is_named():
    for name, scheme in schemes.SCHEMES.items():
        assert scheme.name == name
        if not scheme.format:
            assert scheme.dtype == scheme.products == name and scheme.config(None, None) is None
            continue
        config = scheme.config(*scheme.draw(TINY))
        kind, _, both = name.partition(" ")
        assert both == f"w{schemes._CODE_BITS[scheme.format]}a{8 if scheme.products == 'int8' else 16}"
        assert kind == scheme.format and scheme.dtype == "bfloat16"
        assert (config.quant_dtype is not None) == (scheme.products == "int8")
        assert config.per_act_token_quant == (scheme.products == "int8")


def test_int8_products_have_a_ceiling_that_says_where_it_is_from(monkeypatch):
    asked = []
    monkeypatch.setattr(ceilings, "stream_read", lambda num_bytes, budget_s: (10.0, num_bytes))
    if coded_panels.multiplies_integers():
        limits = ceilings.measure("int8", 400 << 20)
        assert limits.peak_kernel == "avx512vnni" and limits.peak_gflops > 1.2 * ceilings.matmul_peak("float32")[0]
    monkeypatch.setattr(ceilings, "matmul_peak", lambda dtype, budget_s: asked.append(dtype) or (100.0, "tile"))
    monkeypatch.setattr(coded_panels, "multiplies_integers", lambda: False)
    limits = ceilings.measure("int8", 400 << 20)
    assert (limits.peak_gflops, limits.peak_kernel, asked) == (100.0, "tile of bfloat16", ["bfloat16"])
    limits = ceilings.measure("float32", 400 << 20)
    assert (limits.peak_gflops, limits.peak_kernel, asked[1:]) == (100.0, "tile", ["float32"])


def test_limits_around_a_case_are_the_mean_rate_and_the_higher_peak():
    first = ceilings.Ceilings(10.0, 1 << 20, 100.0, "tile", 2)
    second = ceilings.Ceilings(30.0, 1 << 20, 80.0, "tile", 2)
    assert first.around(second) == second.around(first) == ceilings.Ceilings(20.0, 1 << 20, 100.0, "tile", 2)
