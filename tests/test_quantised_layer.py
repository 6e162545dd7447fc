"""The layer on quantised operands: every builder, against the float64 law at its bound."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised import CASES, quantised
from sides import back, on
from strategies import make_problem, problems

import cumoe
from cumoe import FusedMoEQuantDesc, _info
from cumoe.cpu import coded_panels, microkernel

each_case = pytest.mark.parametrize("case", CASES, ids=str)
DTYPES = ("bfloat16", "float16", "float32")


def config_on(xp, config):
    """A config whose arrays are on the side of `xp`."""
    descs = {}
    for name in ("_a1", "_a2", "_w1", "_w2"):
        desc = getattr(config, name)
        moved = {part: on(xp, getattr(desc, part)) for part in ("scale", "alpha_or_gscale", "zp", "bias")}
        descs[name] = dataclasses.replace(desc, **moved)
        assert isinstance(descs[name], FusedMoEQuantDesc)
    return dataclasses.replace(config, **descs)


def arguments(xp, problem, layer):
    """What `fused_experts` takes, on the side of `xp`."""
    x, weights, ids = (on(xp, array) for array in (problem.hidden_states, problem.topk_weights, problem.topk_ids))
    named = {
        "activation": problem.activation,
        "quant_config": config_on(xp, layer.quant_config),
        "expert_map": on(xp, problem.expert_map),
    }
    return (x, on(xp, layer.w1), on(xp, layer.w2), weights, ids), named


def check(out, given, named, **more):
    """Every element within its bound."""
    verified = cumoe.verify(out, *given, **named, sample=None, **more)
    assert verified.ok, str(verified)


@st.composite
def layers(draw, case):
    problem = draw(problems(DTYPES, ("silu", "swigluoai", "relu2_no_mul"), 12, case.multiple))
    return problem, quantised(case, problem)


@each_case
@settings(max_examples=15)
@given(data=st.data())
def test_equals_the_law(xp, case, data):
    problem, layer = data.draw(layers(case))
    given, named = arguments(xp, problem, layer)
    out = cumoe.fused_experts(*given, **named)
    assert out.shape == problem.hidden_states.shape
    assert out.dtype == problem.hidden_states.dtype
    check(out, given, named)


@each_case
def test_a_wrong_scale_is_seen(xp, case):
    """The bound is tight enough to tell a layer from one whose second weights are twice as large."""
    problem = make_problem(9, 2, 3, 128, 128, "bfloat16", seed=5)
    layer = quantised(case, problem)
    given, named = arguments(xp, problem, layer)
    out = cumoe.fused_experts(*given, **named)
    check(out, given, named)
    wrong = on(xp, (back(out).astype(np.float32) * 2).astype(problem.hidden_states.dtype))
    assert not cumoe.verify(wrong, *given, **named, sample=None).ok


@each_case
def test_prepared_weights_give_the_same_bits(xp, case):
    problem = make_problem(7, 2, 4, 128, 256, "bfloat16", bias=True, skipped=0.2)
    given, named = arguments(xp, problem, quantised(case, problem))
    expected = back(cumoe.fused_experts(*given, **named)).tobytes()
    own = {name: named[name] for name in ("activation", "quant_config")}
    prepared = cumoe.prepare(*given[1:3], **own)
    x, _, _, *choices = given
    assert back(cumoe.fused_experts(x, prepared, None, *choices)).tobytes() == expected
    # other weights in the same memory
    other = make_problem(7, 2, 4, 128, 256, "bfloat16", bias=True, seed=9)
    given, named = arguments(xp, other, quantised(case, other))
    again = cumoe.prepare(*given[1:3], **{name: named[name] for name in own}, out=prepared)
    assert again is prepared
    x, _, _, *choices = given
    expected = back(cumoe.fused_experts(*given, **named)).tobytes()
    assert back(cumoe.fused_experts(x, prepared, None, *choices)).tobytes() == expected


@each_case
def test_pieces_and_a_workspace_change_no_bit(xp, case):
    problem = make_problem(20, 2, 4, 128, 128, "bfloat16", skipped=0.2)
    (x, w1, w2, *choices), named = arguments(xp, problem, quantised(case, problem))
    config = named["quant_config"]
    given = x, cumoe.prepare(w1, w2, quant_config=config), None, *choices  # else scales are converted in the workspace
    expected = back(cumoe.fused_experts(*given)).tobytes()
    sizes = {"dtype": "bfloat16", "device": "cpu" if xp is np else "cuda", "quant_config": config}
    plan = cumoe.plan(20, 128, 128, 4, 2, **sizes)
    workspace = xp.empty(plan.workspace_bytes, np.uint8)
    assert back(cumoe.fused_experts(*given, workspace=workspace)).tobytes() == expected
    with pytest.raises(ValueError, match=r"workspace must have at least"):
        cumoe.fused_experts(*given, workspace=workspace[: plan.workspace_bytes // 2])
    limit = cumoe.plan(6, 128, 128, 4, 2, **sizes).workspace_bytes
    if "dynamic" in case.name or case.name == "mxfp4 w4a8":  # one scale for all tokens
        with pytest.raises(ValueError, match=r"workspace_limit must hold all 20 tokens"):
            cumoe.fused_experts(*given, workspace_limit=limit)
    else:
        assert back(cumoe.fused_experts(*given, workspace_limit=limit)).tobytes() == expected


@each_case
@pytest.mark.parametrize("on_input", [True, "accumulator"])
def test_router_weight_on_input(xp, case, on_input):
    problem = make_problem(11, 1, 4, 128, 128, "bfloat16", bias=True)
    given, named = arguments(xp, problem, quantised(case, problem))
    named["apply_router_weight_on_input"] = on_input
    check(cumoe.fused_experts(*given, **named), given, named)


@pytest.mark.parametrize("name", ["int4 128", "fp8 channel, token", "nvfp4 w4a16"])
def test_many_tokens_and_few_give_the_same_bits(xp, name):
    """Where an expert has many rows, a GPU decodes its weights once, not for each tile."""
    (case,) = (case for case in CASES if case.name == name)
    problem = make_problem(900, 1, 2, 128, 128, "bfloat16")
    (x, w1, w2, weights, ids), named = arguments(xp, problem, quantised(case, problem))
    out = cumoe.fused_experts(x, w1, w2, weights, ids, **named)
    few = cumoe.fused_experts(x[:100], w1, w2, weights[:100], ids[:100], **named)
    assert back(out[:100]).tobytes() == back(few).tobytes()
    sizes = {"dtype": "bfloat16", "device": "cpu" if xp is np else "cuda", "quant_config": named["quant_config"]}
    host = "in registers" if "avx512" in microkernel.names("float32") else "panel by panel"
    where = host if xp is np else "once for all tiles"
    assert where in cumoe.plan(900, 128, 128, 2, 1, **sizes).explain()
    assert "once for all tiles" not in cumoe.plan(100, 128, 128, 2, 1, **sizes).explain()


@each_case
def test_no_tokens(xp, case):
    problem = make_problem(0, 2, 4, 128, 128, "bfloat16")
    given, named = arguments(xp, problem, quantised(case, problem))
    assert cumoe.fused_experts(*given, **named).shape == (0, 128)


def test_every_kernel_of_the_side(xp):
    problem = make_problem(33, 2, 3, 128, 128, "bfloat16")
    case = next(case for case in CASES if case.name == "int4 32, zero points")
    given, named = arguments(xp, problem, quantised(case, problem))
    ran = 0
    for backend in ("amx", "avx512bf16", "avx512", "avx2", "portable") if xp is np else ("wgmma", "mma"):
        try:
            out = cumoe.fused_experts(*given, **named, backend=backend)
        except NotImplementedError:
            continue
        check(out, given, named)
        ran += 1
    assert ran >= 1


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ((), "decoded panel by panel"),
        (("avx512f", "avx512bw"), "of 4 bits: numbers in registers"),
        (("avx512f", "avx512bw", "avx512vbmi"), "of 4 and 8 bits: numbers in registers"),
        (
            ("avx512f", "avx512bw", "avx512vnni"),
            "of 4 bits: numbers in registers; int8 rows meet int8 and int4 weights",
        ),
    ],
)
def test_info_says_what_becomes_of_codes(monkeypatch, features, said):
    monkeypatch.setattr(coded_panels, "cpu_features", lambda: frozenset(features))
    assert _info.kernels()["codes"].startswith(said)


def test_a_plan_says_which_codes_are_decoded():
    """With zero points only those of four bits, and groups of an odd number of columns, are not multiplied as codes."""
    one = np.ones((2, 64, 1), np.float32)
    zeros = np.full((2, 64, 1), 128, np.uint8)
    sizes = {"dtype": "bfloat16", "backend": None}

    def formats(**given):
        config = cumoe.int8_w8a16_moe_quant_config(one, one, **given)
        return cumoe.plan(8, 64, 64, 2, 1, **sizes, quant_config=config).explain()

    host = "in registers" if "avx512" in microkernel.names("float32") else "panel by panel"
    assert host in formats(w1_zp=None, w2_zp=None)
    assert "panel by panel" in formats(w1_zp=zeros, w2_zp=zeros)
