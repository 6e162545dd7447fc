"""Routings drawn at random, to time and to test a layer without a router."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from cumoe import _check
from cumoe import _router_arguments as arguments
from cumoe._arrays import Array

Strategy = Callable[[np.random.Generator, int, int, int], tuple[Array, Array]]


def simulated_routing(
    strategy: str | Strategy,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    *,
    rng: int | np.random.Generator | None = None,
    indices_dtype: str = "int32",
    xp: ModuleType = np,
) -> tuple[Array, Array]:
    """
    Draw experts and weights for each token.

    Parameters
    ----------
    strategy : {"uniform_random", "normal_routing"} or callable
        The law of the draws, or a function ``strategy(rng, num_tokens, num_experts, top_k)`` that returns
        (T, k) weights and ids.
    num_tokens, num_experts : int
        T and E.
    top_k : int
        Experts of each token, k, from 1 to E.
    rng : int or numpy.random.Generator, optional
        Seed or source of the draws; by default they differ each time.
    indices_dtype : {"int32", "int64", "uint32"}, default "int32"
        Kind of the ids.
    xp : module, default numpy
        The library of the results: numpy or cupy.

    Returns
    -------
    topk_weights : (T, k) array, float32
        Weights of the chosen experts.
    topk_ids : (T, k) array, `indices_dtype`
        Chosen experts; under the named strategies the k ids of a token differ.

    Raises
    ------
    TypeError
        A number that is none.
    ValueError
        An unknown strategy, `top_k` outside 1..E, or results of a wrong shape.

    See Also
    --------
    select_experts : Takes a strategy in place of the router's logits.

    Notes
    -----
    ``"uniform_random"``: every set of k experts is equally likely, in any order; the weights are 1.

    ``"normal_routing"``: an id is ``floor(sigmoid(z) * E)`` for a standard normal z, and the further ids of
    a token are drawn among those left; the weights are the magnitudes of normal draws, divided by their
    sum. The middle experts get the most tokens.

    The draws are made in host memory, so that a seed means the same everywhere, and then copied to `xp`.

    Examples
    --------
    >>> import cumoe
    >>> topk_weights, topk_ids = cumoe.simulated_routing("uniform_random", 3, 8, 2, rng=0)
    >>> topk_weights.tolist(), topk_ids.shape
    ([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], (3, 2))
    """
    num_tokens = _check.integer("num_tokens", num_tokens, 0)
    num_experts = _check.integer("num_experts", num_experts, 1)
    top_k = _check.integer("top_k", top_k, 1, num_experts)
    _check.choice("indices_dtype", indices_dtype, arguments.INTEGERS)
    if not callable(strategy):
        _check.choice("strategy", strategy, tuple(_STRATEGIES))
        strategy = _STRATEGIES[strategy]
    weights, ids = strategy(np.random.default_rng(rng), num_tokens, num_experts, top_k)
    topk_weights, topk_ids = xp.asarray(weights), xp.asarray(ids)
    _check.shape("weights of the strategy", topk_weights, "(T, k)", (num_tokens, top_k))
    _check.shape("ids of the strategy", topk_ids, "(T, k)", (num_tokens, top_k))
    return topk_weights.astype("float32", copy=False), topk_ids.astype(indices_dtype, copy=False)


def _uniform_random(rng: np.random.Generator, num_tokens: int, num_experts: int, top_k: int) -> tuple[Any, Any]:
    keys = rng.random((num_tokens, num_experts))
    return np.ones((num_tokens, top_k), np.float32), np.argsort(keys, axis=1)[:, :top_k]


def _normal_routing(rng: np.random.Generator, num_tokens: int, num_experts: int, top_k: int) -> tuple[Any, Any]:
    # the greatest of log(chance) + Gumbel noise, one after the other, are draws without putting back
    keys = np.log(_chances(num_experts)) + rng.gumbel(size=(num_tokens, num_experts))
    weights = np.abs(rng.standard_normal((num_tokens, top_k)))
    return weights / weights.sum(axis=1, keepdims=True), np.argsort(-keys, axis=1)[:, :top_k]


def _chances(num_experts: int) -> np.ndarray[Any, Any]:
    """Chance of each id: normal mass between logit(e / E) and logit((e + 1) / E), small ones exactly too."""
    below = [0.0] + [
        0.5 * math.erfc(-math.log(e / (num_experts - e)) / math.sqrt(2)) for e in range(1, num_experts // 2 + 1)
    ]
    half = np.diff(below)  # symmetric: the other half mirrors it
    if num_experts % 2 == 0:
        return np.concatenate([half, half[::-1]])
    return np.concatenate([half, [1 - 2 * half.sum()], half[::-1]])


_STRATEGIES: dict[str, Strategy] = {"uniform_random": _uniform_random, "normal_routing": _normal_routing}
