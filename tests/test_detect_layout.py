"""The layout that weights were stored in is found from a probe, and `convert` gives the documented arrays back."""

import dataclasses
import itertools

import numpy as np
import pytest
from layouts import GATED, PARTS, arguments, edit, stored, wrongs
from quantised import CASES, Layer, quantised
from sides import back, on
from strategies import make_problem

import cumoe
from cumoe._experts import make_experts, weight_arrays
from cumoe._law import rows_law, weight_law
from cumoe._layout_probe import Probe, _outputs
from cumoe._weight_layout import stored_rows
from cumoe.reference import experts

# cases whose questions differ, and sizes (H, I) at which shapes tell as little as they can
NAMES = (
    "fp8 tensor, dynamic",
    "fp8 channel, token",
    "fp8 block",
    "int8 w8a16",
    "int8 w8a16, zero points",
    "int4 32",
    "int4 64, zero points",
    "int4 w4afp8",
    "mxfp4 w4a16",
    "mxfp4 mxfp8",
    "nvfp4",
    "nvfp4, each expert's scale",
    "nvfp4 w4a16",
)
CASE = {case.name: case for case in CASES}


def problem_of(activation="silu", sizes=(256, 128), dtype="bfloat16", bias=False, seed=0, num_tokens=6, **more):
    """A problem whose weights differ in size from row to row and from column to column, so that scales do."""
    problem = make_problem(num_tokens, 2, 3, *sizes, dtype, activation, bias, seed, **more)
    rng = np.random.default_rng(seed)

    def uneven(w):
        rows, columns = (2.0 ** rng.integers(-2, 3, size) for size in (w.shape[1] // 32, w.shape[2] // 32))
        return (w.astype(np.float32) * np.repeat(rows, 32)[:, None] * np.repeat(columns, 32)).astype(dtype)

    return problem._replace(w1=uneven(problem.w1), w2=uneven(problem.w2))


def same_bits(one, other):
    assert (one is None) == (other is None)
    if one is not None:
        one, other = back(one), back(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


def assert_same_layer(found, wanted):
    same_bits(found[0], wanted.w1)
    same_bits(found[1], wanted.w2)
    if wanted.quant_config is not None:
        for name, part in itertools.product(("_a1", "_a2", "_w1", "_w2"), PARTS):
            same_bits(getattr(getattr(found[2], name), part), getattr(getattr(wanted.quant_config, name), part))


def check_all(xp, problem, layer, each):
    """Find every wrong layout of a layer from what the layer itself gives."""
    w1, w2, probe, config = arguments(xp, problem, layer)
    activation = problem.activation
    expected = cumoe.fused_experts(probe[0], w1, w2, *probe[1:], activation=activation, quant_config=config)
    for answers in each:
        w1, w2, probe, config = arguments(xp, problem, stored(layer, activation, answers))
        layout = cumoe.detect_layout(w1, w2, *probe, expected, activation=activation, quant_config=config)
        assert {name: getattr(layout, name) for name in layout.deviations} == answers
        assert layout.is_documented == (not answers)
        assert layout.error < 0.05
        assert_same_layer(layout.convert(w1, w2, config), layer)


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_and_every_two_deviations_are_found(xp, name):
    problem = problem_of()
    layer = quantised(CASE[name], problem)
    check_all(xp, problem, layer, wrongs(layer, "silu"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("activation", ["silu", "swigluoai", "gelu"])
def test_plain_weights(xp, dtype, activation):
    problem = problem_of(activation, dtype=dtype, bias=True)
    config = cumoe.biased_moe_quant_config(problem.w1_bias, problem.w2_bias)
    layer = Layer(problem.w1, problem.w2, config)
    check_all(xp, problem, layer, wrongs(layer, activation))


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in NAMES], ids=str)
def test_every_other_scheme_as_documented_and_up_first(xp, case):
    problem = problem_of(num_tokens=3)
    layer = quantised(case, problem)
    check_all(xp, problem, layer, [{}, {"gate_up_order": "up_gate"}])


@pytest.mark.parametrize("name", ["fp8 block", "int8 block", None])
def test_where_all_is_square_numbers_tell(xp, name):
    problem = problem_of("relu2_no_mul", (256, 256))
    layer = Layer(problem.w1, problem.w2, None) if name is None else quantised(CASE[name], problem)
    assert layer.w1.shape == layer.w2.shape
    check_all(xp, problem, layer, wrongs(layer, "relu2_no_mul"))


# ---- probes from the law, and the law itself ----


def law(problem, layer, on_input=False):
    """Value and bound of a layer, from the reference."""
    own = weight_arrays(layer.w1, layer.w2, layer.quant_config)
    made = make_experts(np, own, problem.activation, layer.quant_config, problem.hidden_states)
    scheme, every = made.scheme, slice(None)
    a1, a2 = (None, None) if scheme is None else (scheme.a1, scheme.a2)
    return experts.fused_experts(
        problem.hidden_states,
        *(weight_law(own[name], scheme, name, every) for name in ("w1", "w2")),
        problem.topk_weights,
        problem.topk_ids,
        activation=problem.activation,
        w1_bias=own["w1_bias"],
        w2_bias=own["w2_bias"],
        apply_router_weight_on_input=on_input,
        expert_map=problem.expert_map,
        a1=rows_law(a1, every),
        a2=rows_law(a2, every),
    )


@pytest.mark.parametrize("on_input", [False, True, "accumulator"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_computed_is_the_law(case, on_input):
    expert_map = np.array([2, -1, 0, 1], np.int32)
    problem = problem_of(bias=True, skipped=0.2, expert_map=expert_map)._replace(activation="silu")
    layer = quantised(case, problem)
    exact = law(problem, layer, on_input)
    config = layer.quant_config
    probe = Probe(*problem[:1], *problem[3:5], expert_map, exact.value, weight_arrays(*layer), config, "silu", on_input)
    documented = cumoe.Layout("silu", "gate_up")
    swapped = cumoe.Layout("silu", "up_gate")
    tokens, columns = np.arange(len(problem.hidden_states)), np.arange(3, 256, 5)
    out, other = _outputs(probe, [documented, swapped], tokens, columns)
    for got, wanted in zip(out, exact, strict=True):
        np.testing.assert_allclose(got, wanted[:, columns], rtol=1e-9, atol=1e-12)
    assert not np.allclose(other.value, out.value, rtol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_a_probe_from_the_law(xp, name):
    problem = problem_of(num_tokens=2)
    layer = quantised(CASE[name], problem)
    expected = on(xp, law(problem, layer).value)
    for answers in list(wrongs(layer, "silu"))[:8]:
        w1, w2, probe, config = arguments(xp, problem, stored(layer, "silu", answers))
        layout = cumoe.detect_layout(w1, w2, *probe, expected, quant_config=config)
        assert {name: getattr(layout, name) for name in layout.deviations} == answers
        assert layout.error < 1e-12


# ---- blocks and shards of gate and up rows ----


@pytest.mark.parametrize("order", GATED)
@pytest.mark.parametrize("sizes", [(256, 128), (256, 96)])
@pytest.mark.parametrize("name", ["fp8 block", "fp8 w8a16, block"])
def test_blocks_of_stored_rows(xp, name, sizes, order):
    """Blocks that hold gate and up rows come back as one scale a row."""
    problem = problem_of(sizes=sizes)
    num_rows = problem.w1.shape[1]
    back_to = stored_rows(order, "silu", num_rows)
    layer = quantised(CASE[name], problem._replace(w1=problem.w1[:, np.argsort(back_to)]))
    desc = layer.quant_config._w1
    by_row = np.repeat(desc.scale, 128, axis=1)[:, back_to]
    right = dataclasses.replace(desc, scale=by_row, shape=cumoe.GroupShape(1, 128))
    right = Layer(layer.w1[:, back_to], layer.w2, dataclasses.replace(layer.quant_config, _w1=right))
    w1, w2, probe, config = arguments(xp, problem, right)
    expected = cumoe.fused_experts(probe[0], w1, w2, *probe[1:], quant_config=config)
    w1, w2, probe, config = arguments(xp, problem, layer)
    layout = cumoe.detect_layout(w1, w2, *probe, expected, quant_config=config)
    assert layout.gate_up_order == order
    found = layout.convert(w1, w2, config)
    same_bits(found[0], right.w1)
    if order != "up_gate" or sizes[1] != 128:
        assert found[2]._w1.shape == (1, 128)
        same_bits(found[2].w1_scale, by_row)
    again = cumoe.fused_experts(probe[0], *found[:2], *probe[1:], quant_config=found[2])
    assert back(again).tobytes() == back(expected).tobytes()


@pytest.mark.parametrize(
    ("activation", "order"),
    [("silu", order) for order in ("gate_up", *GATED)]
    + [("swigluoai", order) for order in ("gate_up", "up_gate", "up_gate_interleaved")],
)
def test_a_scale_for_each_shard(xp, activation, order):
    """(E, 2) scales are those of the stored gate and up rows."""
    problem = problem_of(activation)
    q1, q2 = (cumoe.quantize(w, "fp8", (-1, -1)) for w in (problem.w1, problem.w2))
    shards = np.array([[1, 3], [0.5, 4], [2, 0.25]], np.float32) * q1.scale.reshape(-1, 1)
    num_rows = problem.w1.shape[1]
    place = stored_rows(order, activation, num_rows)
    by_stored_row = np.repeat(shards, num_rows // 2, 1) if "inter" not in order else np.tile(shards, num_rows // 2)
    right = cumoe.fp8_w8a16_moe_quant_config(by_stored_row[:, place], q2.scale.reshape(-1))
    w1, w2, probe, right = arguments(xp, problem, Layer(q1.values[:, place], q2.values, right))
    expected = cumoe.fused_experts(probe[0], w1, w2, *probe[1:], activation=activation, quant_config=right)
    given = Layer(q1.values, q2.values, cumoe.fp8_w8a16_moe_quant_config(shards, q2.scale.reshape(-1)))
    w1, w2, probe, config = arguments(xp, problem, given)
    layout = cumoe.detect_layout(w1, w2, *probe, expected, activation=activation, quant_config=config)
    assert layout.gate_up_order == order
    found = layout.convert(w1, w2, config)
    again = cumoe.fused_experts(probe[0], *found[:2], *probe[1:], activation=activation, quant_config=found[2])
    assert back(again).tobytes() == back(expected).tobytes()


def test_blocks_that_begin_anew_in_the_up_rows(xp):
    problem = problem_of(sizes=(256, 192))  # 192 rows: a block and a half
    halves = [cumoe.quantize(half, "fp8", (128, 128)) for half in np.split(problem.w1, 2, axis=1)]
    q2 = cumoe.quantize(problem.w2, "fp8", (128, 128))

    def layer(first, second):
        w1, scale = (np.concatenate([getattr(q, part) for q in (first, second)], 1) for part in ("values", "scale"))
        return Layer(w1, q2.values, cumoe.fp8_w8a8_moe_quant_config(scale, q2.scale, block_shape=[128, 128]))

    right = layer(*halves)
    assert right.quant_config.w1_scale.shape == (3, 4, 2)
    check_all(xp, problem, right, [{}])
    w1, w2, probe, config = arguments(xp, problem, right)
    expected = cumoe.fused_experts(probe[0], w1, w2, *probe[1:], quant_config=config)
    w1, w2, probe, config = arguments(xp, problem, layer(*halves[::-1]))
    layout = cumoe.detect_layout(w1, w2, *probe, expected, quant_config=config)
    assert layout.deviations == ("gate_up_order",)
    assert_same_layer(layout.convert(w1, w2, config), right)


# ---- what goes with a probe ----


@pytest.mark.parametrize("on_input", [False, True, "accumulator"])
def test_maps_skipped_choices_and_router_weights(xp, on_input):
    expert_map = np.array([2, -1, 0, 1, -1], np.int32)
    problem = make_problem(30, 1, 3, 64, 32, "bfloat16", bias=True, skipped=0.3, expert_map=expert_map)
    layer = quantised(CASE["int8 channel, token"], problem)
    named = {"apply_router_weight_on_input": on_input, "expert_map": on(xp, expert_map)}
    w1, w2, probe, config = arguments(xp, problem, layer)
    expected = cumoe.fused_experts(probe[0], w1, w2, *probe[1:], quant_config=config, **named)
    w1, w2, probe, config = arguments(xp, problem, stored(layer, "silu", {"gate_up_order": "up_gate"}))
    layout = cumoe.detect_layout(w1, w2, *probe, expected, quant_config=config, **named)
    assert layout.deviations == ("gate_up_order",)
    assert_same_layer(layout.convert(w1, w2, config), layer)


def test_inputs_are_not_written(xp):
    problem = problem_of(num_tokens=2)
    layer = quantised(CASE["int4 64, zero points"], problem)
    answers = {"gate_up_order": "up_gate", "nibble_order": "high_first", "zero_points": "minus_one"}
    given = stored(layer, "silu", answers)
    w1, w2, probe, config = arguments(xp, problem, given)
    kept = [back(array).copy() for array in (w1, w2, config.w1_scale, config.w1_zp)]
    if xp is np:
        for array in (w1, w2, *probe, config.w1_scale, config.w1_zp):
            array.flags.writeable = False
    expected = on(xp, law(problem, layer).value)
    layout = cumoe.detect_layout(w1, w2, *probe, expected, quant_config=config)
    found = layout.convert(w1, w2, config)
    assert_same_layer(found, layer)
    assert found[2].w2_scale is config.w2_scale  # right already
    for array, wanted in zip((w1, w2, config.w1_scale, config.w1_zp), kept, strict=True):
        same_bits(array, wanted)


def test_answers_that_come_to_the_same_are_the_documented_ones(xp):
    problem = problem_of(sizes=(64, 32), num_tokens=2)
    problem = problem._replace(w1=np.tile(problem.w1[:, :1], (1, 64, 1)))  # all rows are alike
    layer = Layer(problem.w1, problem.w2, None)
    w1, w2, probe, _ = arguments(xp, problem, layer)
    layout = cumoe.detect_layout(w1, w2, *probe, on(xp, law(problem, layer).value))
    assert layout.is_documented
    assert str(layout).startswith("gate_up_order gate_up, weight_order NK; relative rms error ")
    symmetric = problem_of("identity", (64, 32))
    w1, w2, probe, _ = arguments(xp, symmetric, Layer(symmetric.w1, symmetric.w2, None))
    expected = on(xp, law(symmetric, Layer(symmetric.w1, symmetric.w2, None)).value)
    assert cumoe.detect_layout(w1, w2, *probe, expected, activation="identity").is_documented


def test_torch_tensors_come_back_as_such():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    problem = problem_of(dtype="float32", sizes=(64, 32))
    expected = law(problem, Layer(problem.w1, problem.w2, None)).value
    given = stored(Layer(problem.w1, problem.w2, None), "silu", {"gate_up_order": "up_gate"})
    arrays = (*given[:2], problem.hidden_states, problem.topk_weights, problem.topk_ids, expected)
    w1, w2, *probe = map(torch.from_numpy, arrays)
    found = cumoe.detect_layout(w1, w2, *probe).convert(w1, w2)
    assert isinstance(found[0], torch.Tensor)
    assert found[1] is w2
    same_bits(found[0].numpy(), problem.w1)


# ---- errors ----


def refused(message, problem, layer, expected, kind=ValueError, **named):
    with pytest.raises(kind, match=message):
        cumoe.detect_layout(*layer[:2], *problem[:1], *problem[3:5], expected, quant_config=layer.quant_config, **named)


def test_a_probe_that_nothing_explains():
    problem = problem_of()
    layer = quantised(CASE["int4 64, zero points"], problem)
    out = law(problem, layer).value
    message = r"relative rms error of 0.15, got \S+ from the closest of 32: gate_up_order \w+"
    refused(message, problem, layer, np.random.default_rng(0).standard_normal(out.shape))
    refused("must be what a layout gives", problem, layer, 1.3 * out)
    refused("must be what a layout gives", problem, layer, 1.05 * out, tolerance=0.01)
    named = {"quant_config": layer.quant_config, "tolerance": 0.3}
    layout = cumoe.detect_layout(*layer[:2], *problem[:1], *problem[3:5], 1.3 * out, **named)
    assert layout.is_documented
    assert 0.2 < layout.error < 0.3


def test_a_probe_that_two_layouts_explain():
    problem = problem_of()
    only_one = problem._replace(topk_ids=np.zeros_like(problem.topk_ids))
    layer = quantised(CASE["nvfp4 w4a16"], only_one)
    alphas = {"w_alpha_or_gscale": lambda a: np.array([1, 2, 3], np.float32)}
    layer = Layer(layer.w1, layer.w2, edit(layer.quant_config, **alphas))
    out = law(only_one, layer).value
    message = r"expected must tell layouts apart, .*alphas multiply.*alphas divide \(documented: multiply\)"
    refused(message, only_one, layer, out)
    layer = Layer(layer.w1, layer.w2, edit(layer.quant_config, w_alpha_or_gscale=np.ones_like))
    named = {"quant_config": layer.quant_config}
    assert cumoe.detect_layout(*layer[:2], *only_one[:1], *only_one[3:5], out, **named).is_documented


def test_wrong_calls():
    problem = problem_of(num_tokens=2)
    layer = quantised(CASE["mxfp4 w4a16"], problem)
    out = law(problem, layer).value
    refused(r"expected must have shape \(T, H\) = \(2, 256\), got \(1, 256\)", problem, layer, out[:1])
    refused("tolerance must be > 0, got 0", problem, layer, out, tolerance=0)
    refused("tolerance must be a number, got str", problem, layer, out, TypeError, tolerance="0")
    refused("expected must be finite", problem, layer, out * np.nan)
    refused("expected must have numbers other than 0", problem, layer, out * 0)
    refused("expected must be .* got int64", problem, layer, out.astype(np.int64), TypeError)
    nowhere = problem._replace(topk_ids=np.full_like(problem.topk_ids, -1))
    refused("topk_ids must choose an expert of w1 for at least one token", nowhere, layer, out)
    short = edit(layer.quant_config, w_scale=lambda scale: scale[:2])
    refused(r"w1_scale must begin with E = 3 of w1, got shape \(2,", problem, layer._replace(quant_config=short), out)
    odd = edit(layer.quant_config, w_scale=lambda scale: scale[..., :3])
    message = r"w1_scale must have shape \(E, N, ceil\(K / 32\)\) = \(3, 256, 8\), got \(3, 256, 3\)"
    refused(message, problem, layer._replace(quant_config=odd), out)
    refused(r"w1 must have 3 axes", problem, layer._replace(w1=layer.w1[0]), out)
    prepared = cumoe.prepare(*layer[:2], quant_config=layer.quant_config)
    refused("got PreparedExperts", problem, layer._replace(w1=prepared), out, TypeError)
