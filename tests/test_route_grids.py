"""
The public grids of routing kernels, all cells: at their tolerance against PyTorch, and at the law's bound.

PyTorch's top-k does not order equal numbers; where logits may be equal, results are compared sorted by id,
and the order is left to the law.
"""

import itertools

import numpy as np
import pytest
from routing import DTYPES, assert_valid_ids, check_fused, check_grouped, make_bias, make_logits
from sides import back, on

import cumoe
from cumoe.reference import special_experts

torch = pytest.importorskip("torch")

BOTH = (True, False)


def cells(*axes):
    return itertools.product(*axes)


def torch_scores(logits, scoring_func):
    x = torch.tensor(logits.astype(np.float32))
    if scoring_func == "softmax":
        return torch.softmax(x, dim=-1)
    return torch.sigmoid(x) if scoring_func == "sigmoid" else torch.nn.functional.softplus(x).sqrt()


def torch_weights(score, ids, renormalize, scale):
    weights = score.gather(1, torch.tensor(ids.astype(np.int64)))
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return (weights * scale).numpy()


def near(actual, expected, tolerance, relative=0.0):
    assert (np.abs(actual - expected) <= tolerance + relative * np.abs(expected)).all()


def compare(results, score, choice, renormalize, scale, tolerance, relative=0.0):
    """Compare with PyTorch: the numbers chosen by, and the weights of the same experts."""
    topk_weights, topk_ids = map(back, results)
    assert_valid_ids(topk_ids, score.shape[1])
    best = torch.topk(choice, topk_ids.shape[1], dim=-1).values.numpy()
    taken = choice.gather(1, torch.tensor(topk_ids.astype(np.int64))).numpy()
    np.testing.assert_allclose(taken, best, rtol=1e-6, atol=1e-6)
    near(topk_weights, torch_weights(score, topk_ids, renormalize, scale), tolerance, relative)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_fused_topk(xp, scoring_func, dtype):
    rng = np.random.default_rng(0)
    for num_tokens, num_experts, top_k, renormalize in cells([1, 33, 56], [6, 16, 352], [3, 4], BOTH):
        logits, bias = make_logits(rng, num_tokens, num_experts, dtype), make_bias(rng, num_experts)
        score = torch_scores(logits, scoring_func)
        options = {"renormalize": renormalize, "scoring_func": scoring_func}
        results = cumoe.fused_topk(on(xp, logits), top_k, **options)
        compare(results, score, score, renormalize, 1.0, 1e-2, 1e-2)
        check_fused(xp, results, logits, **options)
        results = cumoe.fused_topk(on(xp, logits), top_k, e_score_correction_bias=on(xp, bias), **options)
        compare(results, score, score + torch.tensor(bias), renormalize, 1.0, 1e-2, 1e-2)
        check_fused(xp, results, logits, bias=bias, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_fused_topk_of_rows_that_are_not_finite(xp, bad, scoring_func, dtype):
    rng = np.random.default_rng(0)
    for num_experts, top_k, biased in cells([6, 8, 16], [3, 4], BOTH):
        logits, bias = make_logits(rng, 4, num_experts, dtype), make_bias(rng, num_experts) if biased else None
        logits[1:] = bad
        options = {"renormalize": False, "scoring_func": scoring_func}
        results = cumoe.fused_topk(on(xp, logits), top_k, e_score_correction_bias=on(xp, bias), **options)
        check_fused(xp, results, logits, bias=bias, **options)
        if not biased:
            assert (back(results[1])[1:] == np.arange(top_k)).all()


@pytest.mark.parametrize("scale", [1.0, 1.1])
@pytest.mark.parametrize("renormalize", BOTH)
def test_select_experts(xp, renormalize, scale):
    rng = np.random.default_rng(0)
    for (num_tokens, hidden_size), top_k, num_experts in cells([(32, 256), (64, 512)], [2, 4, 6], [8, 16, 64]):
        x, logits = make_logits(rng, num_tokens, hidden_size) / 10, make_logits(rng, num_tokens, num_experts)
        bias, options = np.full(num_experts, 0.9, np.float32), {"renormalize": renormalize}
        hidden_states, router_logits = on(xp, x), on(xp, logits)
        for scoring_func, correction in cells(["softmax", "sigmoid"], [None, bias]):
            score = torch_scores(logits, scoring_func)
            choice = score if correction is None else score + torch.tensor(correction)
            given = {**options, "scoring_func": scoring_func, "routed_scaling_factor": scale}
            results = cumoe.select_experts(
                hidden_states, router_logits, top_k, e_score_correction_bias=on(xp, correction), **given
            )
            compare(results, score, choice, renormalize, scale, 1e-3, 1e-3)
            check_fused(xp, results, logits, bias=correction, **given)
            groups = {"num_expert_group": 4, "topk_group": 2 if top_k <= num_experts // 2 else 4}
            results = cumoe.select_experts(
                hidden_states,
                router_logits,
                top_k,
                use_grouped_topk=True,
                e_score_correction_bias=on(xp, correction),
                **groups,
                **given,
            )
            choice = torch_groups(choice, correction is not None, **groups)
            compare(results, score, choice, renormalize, scale, 1e-3, 1e-3)
            check_grouped(xp, results, logits, bias=correction, **groups, **given)
        results = cumoe.select_experts(
            hidden_states, router_logits, top_k, custom_routing_function=cumoe.llama4_routing, **options
        )
        score = torch_scores(logits, "sigmoid")
        compare(results, score, torch.tensor(logits), False, 1.0, 1e-3, 1e-3)


def torch_groups(choice, biased, num_expert_group, topk_group):
    """Return the choice with -inf outside the best groups."""
    num_tokens, num_experts = choice.shape
    groups = choice.view(num_tokens, num_expert_group, -1)
    group = groups.topk(2, dim=-1).values.sum(dim=-1) if biased else groups.max(dim=-1).values
    mask = torch.zeros_like(group).scatter(1, group.topk(topk_group, dim=-1).indices, 1).bool()
    return choice.masked_fill(~mask.repeat_interleave(num_experts // num_expert_group, dim=1), -torch.inf)


GROUPED = [(16, 2, 8, 2), (128, 2, 8, 2), (256, 8, 8, 4), (384, 8, 1, 1), (512, 22, 1, 1)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("num_experts", "top_k", "num_expert_group", "topk_group"), GROUPED)
def test_grouped_topk(xp, num_experts, top_k, num_expert_group, topk_group, dtype):
    rng = np.random.default_rng(0)
    groups = {"num_expert_group": num_expert_group, "topk_group": topk_group}
    for num_tokens, renormalize, scoring_func, scale in cells([1, 33, 64], BOTH, ["softmax", "sigmoid"], [1.0, 2.5]):
        logits, bias = make_logits(rng, num_tokens, num_experts, dtype), make_bias(rng, num_experts)
        options = {"renormalize": renormalize, "scoring_func": scoring_func, "routed_scaling_factor": scale}
        score = torch_scores(logits, scoring_func)
        results = cumoe.grouped_topk(on(xp, logits), top_k, e_score_correction_bias=on(xp, bias), **groups, **options)
        choice = torch_groups(score + torch.tensor(bias), True, **groups)
        compare(results, score, choice, renormalize, scale, 2e-5 if num_expert_group == 1 else 2e-2)
        decided = check_grouped(xp, results, logits, bias=bias, **groups, **options)
        assert decided.all()
        results = cumoe.grouped_topk(on(xp, logits), top_k, **groups, **options)
        check_grouped(xp, results, logits, **groups, **options)
        if dtype == "float32":  # in bfloat16 two groups may have the same maximum
            compare(results, score, torch_groups(score, False, **groups), renormalize, scale, 2e-2)


@pytest.mark.parametrize("num_experts", [512, 896, 1024])
def test_one_group_of_many_experts(xp, num_experts):
    rng = np.random.default_rng(0)
    logits, bias = make_logits(rng, 17, num_experts), make_bias(rng, num_experts)
    options = {"num_expert_group": 1, "topk_group": 1, "scoring_func": "sigmoid"}
    score = torch_scores(logits, "sigmoid")
    for top_k in (8, 22, 32):
        results = cumoe.grouped_topk(on(xp, logits), top_k, e_score_correction_bias=on(xp, bias), **options)
        compare(results, score, score + torch.tensor(bias), True, 1.0, 2e-5)
        check_grouped(xp, results, logits, bias=bias, **options)


@pytest.mark.parametrize("num_experts", [512, 896, 1024])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_equal_experts_come_by_their_ids(xp, scoring_func, num_experts):
    logits = np.zeros((3, num_experts), np.float32)
    logits[1] = np.arange(num_experts) % 3  # the greatest: 2, 5, 8, ...
    logits[2] = -(np.arange(num_experts) // 5)  # blocks of five
    bias = np.zeros(num_experts, np.float32)
    expected = [np.arange(22), np.arange(2, 68, 3), np.arange(22)]
    one_group = {"num_expert_group": 1, "topk_group": 1}
    for given in ({}, {"e_score_correction_bias": on(xp, bias)}):
        for route, groups in ((cumoe.fused_topk, {}), (cumoe.grouped_topk, one_group)):
            ids = route(on(xp, logits), 22, scoring_func=scoring_func, **groups, **given)[1]
            np.testing.assert_array_equal(back(ids), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_experts", [128, 256, 384, 512])
def test_sqrtsoftplus(xp, num_experts, dtype):
    rng = np.random.default_rng(0)
    table = np.argsort(rng.random((1024, num_experts)), axis=1)
    for num_tokens, top_k, renormalize in cells([1, 33, 128], [6, 8, 16], BOTH):
        logits, bias = make_logits(rng, num_tokens, num_experts, dtype), make_bias(rng, num_experts)
        score = torch_scores(logits, "sqrtsoftplus")
        for scale in (1.0, 1.5):
            options = {"renormalize": renormalize, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": scale}
            results = cumoe.fused_topk(on(xp, logits), top_k, e_score_correction_bias=on(xp, bias), **options)
            compare(results, score, score + torch.tensor(bias), renormalize, scale, 2e-5, 2e-5)
            check_fused(xp, results, logits, bias=bias, **options)
        input_ids = rng.integers(0, 1024, num_tokens)
        for scale in (1.0, 2.5):
            weights, ids = cumoe.hash_topk(
                on(xp, logits),
                on(xp, input_ids),
                on(xp, table[:, :top_k]),
                renormalize=renormalize,
                routed_scaling_factor=scale,
            )
            np.testing.assert_array_equal(back(ids), table[input_ids, :top_k])
            near(back(weights), torch_weights(score, back(ids), renormalize, scale), 2e-5, 2e-5)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "indices_dtype"), [(0, 256, "uint32"), (17, 256, "uint32"), (17, 384, "int64")]
)
def test_sqrtsoftplus_with_other_ids_and_padding(xp, num_tokens, num_experts, indices_dtype):
    rng = np.random.default_rng(0)
    logits, bias = make_logits(rng, num_tokens, num_experts), make_bias(rng, num_experts)
    is_padding = np.arange(num_tokens) % 2 == 1
    logits[is_padding] = np.nan
    options = {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5}
    weights, ids = map(
        back,
        cumoe.fused_topk(
            on(xp, logits),
            6,
            e_score_correction_bias=on(xp, bias),
            is_padding=on(xp, is_padding),
            indices_dtype=indices_dtype,
            **options,
        ),
    )
    assert ids.dtype == indices_dtype
    assert (ids[is_padding] == np.array(-1).astype(indices_dtype)).all() and (weights[is_padding] == 0).all()
    real = weights[~is_padding], ids[~is_padding]
    check_fused(xp, real, logits[~is_padding], bias=bias, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 2047, 2048, 250_000])
def test_gemma4_router(xp, num_tokens, dtype):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((num_tokens, 128), np.float32).astype(dtype)
    scale = rng.random(128, np.float32)
    results = cumoe.fused_topk(on(xp, logits), 8, per_expert_scale=on(xp, scale))
    weights, ids = map(back, results)
    assert weights.shape == ids.shape == (num_tokens, 8)
    # of 250 000 rows the law looks at every 50th, PyTorch at all
    few = slice(None, None, 50 if num_tokens > 10_000 else 1)
    check_fused(xp, (weights[few], ids[few]), logits[few], per_expert_scale=scale)
    x = torch.tensor(logits.astype(np.float32))
    chosen = x.gather(1, torch.tensor(ids.astype(np.int64)))
    assert torch.equal(chosen, torch.topk(x, 8, dim=-1).values)
    near(weights, (torch.softmax(chosen, dim=-1) * torch.tensor(scale)[ids]).numpy(), 1e-4, 1e-4)


@pytest.mark.parametrize("hidden_size", [200, 257, 300, 768, 1000, 4096, 7168])
def test_zero_experts(xp, hidden_size):
    rng = np.random.default_rng(0)
    for num_tokens, top_k in cells([1, 7, 128], [2, 8]):
        x = make_logits(rng, num_tokens, hidden_size, "float16")
        ids, weights = rng.integers(0, 10, (num_tokens, top_k)), rng.random((num_tokens, top_k), np.float32)
        left_weights, left_ids, out = map(back, cumoe.zero_experts(on(xp, x), on(xp, weights), on(xp, ids), 8))
        np.testing.assert_array_equal(left_ids, np.where(ids >= 8, 0, ids))
        np.testing.assert_array_equal(left_weights, np.where(ids >= 8, 0, weights))
        law = special_experts.zero_experts(x, weights, ids, 8)[2]
        assert (np.abs(out - law.value) <= law.error).all()
        share = np.where(ids >= 8, weights, 0).sum(axis=1, keepdims=True)
        near(out.astype(np.float32), (x.astype(np.float32) * share).astype(np.float16).astype(np.float32), 1e-3, 1e-3)
