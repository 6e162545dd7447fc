"""The checks of the quantised grids: what the law is given is what the layer is, and wrong results are refused."""

import numpy as np
import pytest
from drawn_codes import KINDS
from grids import assert_stated
from quantised_grids import Layer, assert_within, judge, route
from sides import on

import cumoe
from cumoe.reference import experts

each_kind = pytest.mark.parametrize("kind", KINDS)
M, N, K, E, TOPK = 5, 128, 256, 8, 3
REFUSED = r"root mean square|of the bound"


def small(kind):
    return Layer(KINDS[kind], (M,), N, K)


@each_kind
def test_the_law_is_that_of_verify(xp, kind):
    """The law takes windows of the pools; `verify` reads the arrays and the config that the layer gets."""
    layer = small(kind)
    out, (exact, _) = judge(xp, layer, M, E, TOPK)
    routed = route(xp, layer, M, E, TOPK, 1, False, True)
    w1, w2, config = layer.put(xp, E)
    ids, place = np.full((M, TOPK), -1, np.int32), routed.rows
    ids[place] = routed.ids[place]
    whole = np.zeros((M, K), out.dtype)
    whole[place] = out
    given = (on(xp, one) for one in (whole, layer.batch(xp, M)))
    choices = on(xp, routed.weights), on(xp, ids)
    found = cumoe.verify(*given, w1, w2, *choices, quant_config=config, sample=None)
    ratio = experts.ratio(out, exact)
    assert found.max_ratio == pytest.approx(ratio.max(), rel=1e-6)
    token, column = found.worst
    at = list(routed.tokens).index(token), column
    np.testing.assert_allclose((found.exact, found.bound), (exact.value[at], exact.error[at]), rtol=1e-9)


@each_kind
def test_wrong_results_are_refused(xp, kind):
    """Each for its own reason: all of it an eighth too large, another token's, one element twice what it should be."""
    layer = small(kind)
    out, (exact, steps) = judge(xp, layer, M, E, TOPK)
    assert_within(out, exact, layer)
    wrong = [(out.astype(np.float32) * np.float32(1.125)).astype(out.dtype), out[::-1]]
    wrong.append(out.copy())
    at = np.unravel_index(np.abs(exact.value).argmax(), out.shape)
    wrong[-1][at] = out[at] + out[at]
    for result in wrong:
        with pytest.raises(AssertionError, match=REFUSED):
            assert_within(result, exact, layer)
    assert experts.ratio(wrong[0] * out.dtype.type(16), exact).max() > 1
    size = np.abs(steps).max()
    assert_stated(out, steps, 0.1 * size)
    with pytest.raises(AssertionError, match="beyond the tolerance"):
        assert_stated(wrong[-1], steps, 0.1 * size)


@pytest.mark.parametrize("change", ["expert", "weight", "bias"])
@pytest.mark.parametrize("kind", ["fp8 block", "4 bits, 64", "mxfp4"])
def test_a_wrong_choice_is_refused(xp, kind, change):
    """The law for another expert, another router weight, other biases than the layer had."""
    layer = Layer(KINDS[kind], (M,), N, K, bias=0.1)
    out, _ = judge(xp, layer, M, E, TOPK)
    routed = route(xp, layer, M, E, TOPK, 1, False, True)
    weights, which = routed.weights[routed.rows], routed.which.copy()
    assert_within(out, layer.law(routed.tokens, weights, which)[0], layer)
    if change == "expert":
        which[0] = np.roll(which[0], 1)
    elif change == "weight":
        weights = weights * np.float32(1.125)
    else:
        layer = Layer(KINDS[kind], (M,), N, K, bias=0.05)
    with pytest.raises(AssertionError, match=REFUSED):
        assert_within(out, layer.law(routed.tokens, weights, which)[0], layer)
