"""The routing report: every count against a plain loop, every figure against its formula."""

import math
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cumoe


@st.composite
def routings(draw):
    """Weights and ids, some ids out of range or repeated, and E."""
    E = draw(st.integers(1, 9))
    T, k = draw(st.integers(0, 12)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([np.int32, np.int64, np.uint32]))
    ids = st.integers(0 if dtype is np.uint32 else -3, E + 2)
    flat = draw(st.lists(ids, min_size=T * k, max_size=T * k))
    weights = np.random.default_rng(T).uniform(size=(T, k)).astype(np.float32)
    return weights, np.array(flat, dtype).reshape(T, k), E


@given(problem=routings(), block_size=st.integers(1, 7))
def test_counts_equal_a_plain_loop(xp, problem, block_size):
    weights, ids, E = problem
    report = cumoe.routing_report(xp.asarray(weights), xp.asarray(ids), E, block_size=block_size)
    load, weight_load, together = [0] * E, [0.0] * E, [[0] * E for _ in range(E)]
    low = high = repeated = 0
    for row, row_weights in zip(ids.tolist(), weights.tolist(), strict=True):
        for j, e in enumerate(row):
            low += e < 0
            high += e >= E
            if 0 <= e < E:
                load[e] += 1
                weight_load[e] += row_weights[j]
                repeated += e in row[:j]
        chosen = {e for e in row if 0 <= e < E}
        for a in chosen:
            for b in chosen:
                together[a][b] += 1
    assert report.load.tolist() == load
    np.testing.assert_allclose(report.weight_load, weight_load, rtol=1e-12)
    assert report.co_activation.tolist() == together
    assert (report.skipped_negative, report.skipped_too_large, report.duplicate_choices) == (low, high, repeated)
    assert report.num_choices == sum(load)
    assert report.experts_hit == sum(n > 0 for n in load)
    rows = sum(math.ceil(n / block_size) * block_size for n in load)
    assert report.padded_rows == rows
    assert report.padding_waste == pytest.approx(1 - sum(load) / rows if rows else 0)
    if sum(load):
        share = [n / sum(load) for n in load if n]
        assert report.entropy_bits == pytest.approx(-sum(p * math.log2(p) for p in share), abs=1e-12)
        assert report.jain_index == pytest.approx(sum(load) ** 2 / (E * sum(n * n for n in load)))
    else:
        assert math.isnan(report.entropy_bits) and math.isnan(report.jain_index)


def test_even_and_one_sided_loads_are_the_two_ends():
    weights = np.full((8, 1), 1, np.float32)
    even = cumoe.routing_report(weights, np.arange(8)[:, None], 8)
    assert (even.entropy_bits, even.jain_index) == (3.0, 1.0)
    one = cumoe.routing_report(weights, np.zeros((8, 1), int), 8)
    assert (one.entropy_bits, one.jain_index) == (0.0, 1 / 8)
    assert math.copysign(1, one.entropy_bits) == 1


def test_partners_are_listed_most_frequent_first_and_lower_pair_first():
    ids = np.array([[0, 3], [3, 0], [1, 2], [0, 1]])
    report = cumoe.routing_report(np.ones((4, 2), np.float32), ids, 4)
    assert report.partners() == [(0, 3, 2), (0, 1, 1), (1, 2, 1)]
    assert report.partners(1) == [(0, 3, 2)]
    assert report.partners(0) == []


def test_ties_are_counted_at_the_border_of_the_choice_only():
    logits = np.array([[3, 2, 2, 1], [3, 3, 2, 1], [1, 1, 1, 1], [np.nan, 1, 1, 1]], np.float32)
    report = cumoe.routing_report(np.ones((4, 2), np.float32), np.tile([0, 1], (4, 1)), 4, router_logits=logits)
    assert (report.tie_tokens, report.nan_tokens) == (2, 1)
    every = cumoe.routing_report(np.ones((1, 4), np.float32), np.arange(4)[None], 4, router_logits=logits[2:3])
    assert every.tie_tokens == 0  # all experts are chosen: nothing was decided


def test_nonfinite_weights_are_counted_and_left_out_of_the_sums():
    weights = np.array([[np.nan, 1], [np.inf, 2]], ml_dtypes.bfloat16)
    report = cumoe.routing_report(weights, np.array([[0, 1], [0, 1]]), 2)
    assert report.nonfinite_weights == 2
    assert report.weight_load.tolist() == [0.0, 3.0]


def test_counting_in_chunks_changes_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, 7, (50, 3))
    whole = cumoe.routing_report(np.ones(ids.shape, np.float32), ids, 6)
    monkeypatch.setattr("cumoe.inspection._CHUNK_PAIRS", 20)
    pieces = cumoe.routing_report(np.ones(ids.shape, np.float32), ids, 6)
    np.testing.assert_array_equal(whole.co_activation, pieces.co_activation)


def test_inputs_are_not_written():
    weights, ids = np.ones((3, 2), np.float32), np.array([[0, 9], [1, 1], [2, -1]])
    weights.setflags(write=False)
    ids.setflags(write=False)
    assert cumoe.routing_report(weights, ids, 3).load.tolist() == [1, 2, 1]


@pytest.mark.parametrize("E", [1, 8, 300])
def test_html_stands_alone_and_says_the_numbers(E):
    ids = np.random.default_rng(1).integers(0, E, (40, 2))
    report = cumoe.routing_report(np.ones((40, 2), np.float32), ids, E)
    text = report._repr_html_()
    assert "http" not in text and "<script" not in text and "url(" not in text
    assert f"{report.experts_hit} of {E}" in text
    bars = re.findall(r'height="([\d.]+)"><title>', text)
    assert 1 <= len(bars) <= 256
    assert max(map(float, bars)) == 120  # the highest bar fills the picture
    assert repr(report).startswith("RoutingReport(tokens, choices each: 40, 2; experts hit:")


def test_html_of_no_tokens_at_all():
    report = cumoe.routing_report(np.zeros((0, 2), np.float32), np.zeros((0, 2), np.int32), 4)
    assert "none" in report._repr_html_()


def test_plot_draws_the_arrays():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    ids = np.array([[0, 1], [0, 2]])
    figure = cumoe.routing_report(np.ones((2, 2), np.float32), ids, 3).plot()
    bars, image = figure.axes[:2]
    assert [bar.get_height() for bar in bars.patches] == [2, 1, 1]
    np.testing.assert_array_equal(image.images[0].get_array(), [[0, 1, 1], [1, 0, 0], [1, 0, 0]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_experts": 0}, ValueError, "num_experts must be >= 1, got 0"),
        ({"block_size": 0}, ValueError, "block_size must be >= 1, got 0"),
        ({"topk_ids": np.zeros(3, int)}, ValueError, r"topk_ids must have 2 axes \(T, k\), got shape \(3,\)"),
        (
            {"topk_weights": np.zeros((2, 3))},
            ValueError,
            r"topk_weights must have shape \(T, k\) = \(3, 2\), got \(2, 3\); the last two axes look swapped",
        ),
        ({"topk_ids": np.zeros((3, 2))}, TypeError, "topk_ids must be integers, got float64"),
        (
            {"router_logits": np.zeros((3, 5))},
            ValueError,
            r"router_logits must have shape \(T, E\) = \(3, 4\), got \(3, 5\)",
        ),
    ],
)
def test_wrong_calls_name_the_argument(change, error, message):
    arguments = {"topk_weights": np.ones((3, 2)), "topk_ids": np.zeros((3, 2), int), "num_experts": 4, **change}
    with pytest.raises(error, match=f"^{message}$"):
        cumoe.routing_report(**arguments)
