"""Which rank owns which expert: expert maps, and the tables that a round-robin placement needs."""

import numpy as np
import numpy.typing as npt

from cumoe import _check

_STRATEGIES = ("linear", "round_robin")


def determine_expert_map(
    ep_size: int, ep_rank: int, global_num_experts: int, strategy: str = "linear"
) -> tuple[int, npt.NDArray[np.int32] | None]:
    """
    Say which experts a rank owns and where they lie in its weights.

    Parameters
    ----------
    ep_size, ep_rank : int
        Number of ranks that share the experts, and the rank that asks.
    global_num_experts : int
        Experts of the whole layer, E. They need not divide evenly: the first ``E % ep_size`` ranks own
        one more than the others.
    strategy : {"linear", "round_robin"}, default "linear"
        Neighbouring experts together, or experts ``ep_rank, ep_rank + ep_size, ...``.

    Returns
    -------
    num_local_experts : int
        Experts of this rank.
    expert_map : (E,) array, int32, or None
        Place of each expert in this rank's weights, -1 for the experts of other ranks. None if there is
        only one rank.

    Raises
    ------
    ValueError
        A rank outside its group or an unknown strategy.

    See Also
    --------
    round_robin_routing_tables : From expert ids to places in the weights of all ranks.

    Examples
    --------
    >>> from cumoe import determine_expert_map
    >>> num_local_experts, expert_map = determine_expert_map(2, 1, 5)
    >>> num_local_experts, expert_map.tolist()
    (2, [-1, -1, -1, 0, 1])
    >>> determine_expert_map(2, 1, 5, "round_robin")[1].tolist()
    [-1, 0, -1, 1, -1]
    """
    _check_ranks(ep_size, ep_rank, global_num_experts)
    _check.choice("strategy", strategy, _STRATEGIES)
    if ep_size == 1:
        return global_num_experts, None
    owned = _owned(ep_size, ep_rank, global_num_experts, strategy)
    expert_map = np.full(global_num_experts, -1, np.int32)
    expert_map[owned] = np.arange(len(owned), dtype=np.int32)
    return len(owned), expert_map


def round_robin_routing_tables(
    ep_size: int, ep_rank: int, global_num_experts: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """
    Translate between expert ids and places when experts are dealt out to the ranks in turn.

    Kernels that move tokens between ranks expect the experts of a rank side by side. The physical place
    of an expert is its place when the weights of all ranks are laid end to end.

    Parameters
    ----------
    ep_size, ep_rank : int
        Number of ranks that share the experts, and the rank that asks.
    global_num_experts : int
        Experts of the whole layer, E.

    Returns
    -------
    global_to_physical : (E,) array, int32
        Place of each expert.
    physical_to_global : (E,) array, int32
        Expert at each place; the inverse of the first table.
    local_to_global : (num_local_experts,) array, int32
        Experts of this rank, in the order of its weights.

    Raises
    ------
    ValueError
        A rank outside its group.

    Examples
    --------
    >>> from cumoe import round_robin_routing_tables
    >>> [table.tolist() for table in round_robin_routing_tables(2, 1, 5)]
    [[0, 3, 1, 4, 2], [0, 2, 4, 1, 3], [1, 3]]
    """
    _check_ranks(ep_size, ep_rank, global_num_experts)
    dealt = [_owned(ep_size, rank, global_num_experts, "round_robin") for rank in range(ep_size)]
    physical_to_global = np.concatenate(dealt)
    global_to_physical = np.empty_like(physical_to_global)
    global_to_physical[physical_to_global] = np.arange(global_num_experts, dtype=np.int32)
    return global_to_physical, physical_to_global, dealt[ep_rank]


def _owned(ep_size: int, rank: int, global_num_experts: int, strategy: str) -> npt.NDArray[np.int32]:
    """Ids of the experts of `rank`, in the order of its weights."""
    if strategy == "round_robin":
        return np.arange(rank, global_num_experts, ep_size, dtype=np.int32)
    base, rest = divmod(global_num_experts, ep_size)
    start = rank * base + min(rank, rest)
    return np.arange(start, start + base + (rank < rest), dtype=np.int32)


def _check_ranks(ep_size: int, ep_rank: int, global_num_experts: int) -> None:
    _check.integer("ep_size", ep_size, 1)
    _check.integer("ep_rank", ep_rank, 0, ep_size - 1)
    _check.integer("global_num_experts", global_num_experts, 1)
