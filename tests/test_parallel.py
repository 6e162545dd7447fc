"""Which rank owns which expert."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cumoe import determine_expert_map, round_robin_routing_tables

STRATEGIES = ("linear", "round_robin")


@st.composite
def groups(draw):
    return draw(st.integers(1, 17)), draw(st.integers(1, 70))  # ranks, experts; more ranks than experts too


@given(group=groups(), strategy=st.sampled_from(STRATEGIES))
def test_every_expert_has_one_owner_and_one_place(group, strategy):
    ep_size, num_experts = group
    owners = np.zeros(num_experts, int)
    for rank in range(ep_size):
        num_local, expert_map = determine_expert_map(ep_size, rank, num_experts, strategy)
        if ep_size == 1:
            assert num_local == num_experts and expert_map is None
            return
        assert num_local == num_experts // ep_size + (rank < num_experts % ep_size)
        assert expert_map.dtype == np.int32 and expert_map.shape == (num_experts,)
        owned = np.flatnonzero(expert_map >= 0)
        np.testing.assert_array_equal(expert_map[owned], np.arange(num_local))  # places follow the ids, without gaps
        assert (expert_map[expert_map < 0] == -1).all()
        owners[owned] += 1
        if strategy == "linear":
            assert num_local == 0 or owned[-1] - owned[0] == num_local - 1
        else:
            assert (owned % ep_size == rank).all()
    assert (owners == 1).all()


@pytest.mark.parametrize(
    ("strategy", "maps"),
    [
        ("linear", [[0, 1, 2, -1, -1, -1, -1], [-1, -1, -1, 0, 1, -1, -1], [-1, -1, -1, -1, -1, 0, 1]]),
        ("round_robin", [[0, -1, -1, 1, -1, -1, 2], [-1, 0, -1, -1, 1, -1, -1], [-1, -1, 0, -1, -1, 1, -1]]),
    ],
)
def test_seven_experts_on_three_ranks(strategy, maps):
    for rank, expected in enumerate(maps):
        num_local, expert_map = determine_expert_map(3, rank, 7, strategy)
        assert expert_map.tolist() == expected
        assert num_local == 3 - (rank > 0)


@pytest.mark.parametrize("ep_size", [2, 4])
@pytest.mark.parametrize("num_experts", [8, 64, 9, 62, 63])
def test_round_robin_deals_experts_in_turn(ep_size, num_experts):
    for rank in range(ep_size):
        _, expert_map = determine_expert_map(ep_size, rank, num_experts, "round_robin")
        for place, expert in enumerate(range(rank, num_experts, ep_size)):
            assert expert_map[expert] == place


@given(group=groups())
def test_routing_tables_are_inverse_and_agree_with_the_maps(group):
    ep_size, num_experts = group
    start = 0
    for rank in range(ep_size):
        tables = round_robin_routing_tables(ep_size, rank, num_experts)
        global_to_physical, physical_to_global, local_to_global = tables
        assert all(table.dtype == np.int32 for table in tables)
        np.testing.assert_array_equal(global_to_physical[physical_to_global], np.arange(num_experts))
        np.testing.assert_array_equal(physical_to_global[global_to_physical], np.arange(num_experts))
        num_local, expert_map = determine_expert_map(ep_size, rank, num_experts, "round_robin")
        np.testing.assert_array_equal(physical_to_global[start : start + num_local], local_to_global)
        if expert_map is not None:
            np.testing.assert_array_equal(expert_map[local_to_global], np.arange(num_local))
            np.testing.assert_array_equal(global_to_physical[local_to_global] - start, expert_map[local_to_global])
        start += num_local
    assert start == num_experts


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((0, 0, 8), ValueError, "ep_size must be >= 1, got 0"),
        ((2, 2, 8), ValueError, "ep_rank must be in 0..1, got 2"),
        ((2, -1, 8), ValueError, "ep_rank must be in 0..1, got -1"),
        ((2, 0, 0), ValueError, "global_num_experts must be >= 1, got 0"),
        ((2, 0, 8.0), TypeError, "global_num_experts must be an int, got float"),
    ],
)
def test_wrong_ranks_are_named(arguments, kind, message):
    for function in (determine_expert_map, round_robin_routing_tables):
        with pytest.raises(kind, match=f"^{re.escape(message)}$"):
            function(*arguments)


def test_unknown_strategy_is_named():
    with pytest.raises(ValueError, match=r"^strategy must be linear or round_robin, got 'random'$"):
        determine_expert_map(2, 0, 8, "random")
