"""What legal inputs look like: problems drawn as sizes, dtypes and a seed, filled by NumPy."""

from typing import NamedTuple

import ml_dtypes  # noqa: F401  names bfloat16
import numpy as np
from hypothesis import strategies as st

DTYPES = ("float32", "float16", "bfloat16")
GATED = ("silu", "gelu", "gelu_tanh", "swigluoai", "swigluoai_uninterleave", "swiglustep", "situ", "reglu", "identity")
UNGATED = ("silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul", "relu2_no_mul")


class Problem(NamedTuple):
    """Arguments of `fused_experts`, NumPy arrays."""

    hidden_states: np.ndarray
    w1: np.ndarray
    w2: np.ndarray
    topk_weights: np.ndarray
    topk_ids: np.ndarray
    w1_bias: np.ndarray | None
    w2_bias: np.ndarray | None
    activation: str
    expert_map: np.ndarray | None


def make_problem(
    num_tokens,
    top_k,
    num_experts,
    hidden_size,
    intermediate_size,
    dtype="float32",
    activation="silu",
    bias=False,
    seed=0,
    skipped=0.0,
    expert_map=None,
):
    """Fill a problem; `skipped` is the share of choices whose id is outside the experts."""
    rng = np.random.default_rng(seed)
    rows = intermediate_size * (1 if activation.endswith("_no_mul") else 2)

    def draw(*shape, scale=1.0):
        return (rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)

    num_global = num_experts if expert_map is None else len(expert_map)
    ids = np.argsort(rng.random((num_tokens, num_global)), axis=1)[:, :top_k].astype(np.int32)
    gone = rng.random(ids.shape) < skipped
    ids[gone] = rng.choice([-1, -7, num_global, num_global + 5], size=int(gone.sum()))
    weights = rng.random((num_tokens, top_k), np.float32) + np.float32(0.1)
    return Problem(
        draw(num_tokens, hidden_size),
        draw(num_experts, rows, hidden_size, scale=hidden_size**-0.5),
        draw(num_experts, hidden_size, intermediate_size, scale=intermediate_size**-0.5),
        weights / weights.sum(axis=1, keepdims=True, dtype=np.float32) if top_k else weights,
        ids,
        draw(num_experts, rows) if bias else None,
        draw(num_experts, hidden_size) if bias else None,
        activation,
        expert_map,
    )


@st.composite
def problems(draw, dtypes=DTYPES, activations=GATED + UNGATED, max_tokens=40, multiple=1):
    """Ragged problems: T = 0, empty experts, skipped choices, odd sizes, tile edges; sizes are times `multiple`."""
    num_experts = draw(st.integers(1, 6))
    num_global = num_experts + draw(st.sampled_from((0, 0, 3)))
    expert_map = None
    seed = draw(st.integers(0, 2**32 - 1))
    if num_global > num_experts:
        expert_map = np.full(num_global, -1, np.int32)
        expert_map[np.random.default_rng(seed).permutation(num_global)[:num_experts]] = np.arange(num_experts)
    if multiple == 1:
        size = st.one_of(st.integers(1, 70), st.sampled_from((31, 32, 33, 63, 64, 65, 127, 128, 129, 192)))
    else:
        most = min(40, max(2, 1280 // multiple))  # the law multiplies in float64
        size = st.integers(1, most).map(lambda count: count * multiple)
    return make_problem(
        draw(st.one_of(st.integers(0, max_tokens), st.sampled_from((0, 1, 2, max_tokens)))),
        draw(st.integers(1, num_global)),
        num_experts,
        draw(size),
        draw(size),
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from(activations)),
        draw(st.booleans()),
        seed,
        draw(st.sampled_from((0.0, 0.0, 0.3, 1.0))),
        expert_map,
    )


class Routing(NamedTuple):
    """Expert ids and where the experts are, NumPy arrays; `expert_map` None means E = E_l."""

    topk_ids: np.ndarray
    num_experts: int
    num_local_experts: int
    expert_map: np.ndarray | None


@st.composite
def routings(draw, max_tokens=40, maps=True):
    """Ids of every dtype that routers give: T = 0, k = 1, E = 1, crowded and empty experts, ids to be skipped."""
    num_experts = draw(st.one_of(st.integers(1, 12), st.sampled_from((1, 64, 257))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from((0, 1, 2, 3, max_tokens))), draw(st.integers(1, 6))
    dtype = draw(st.sampled_from(("int32", "int64", "uint32")))
    wanted = rng.integers(0, num_experts, max(1, num_experts // draw(st.sampled_from((1, 3)))))
    ids = rng.choice(wanted, shape).astype(dtype)
    junk = [num_experts, num_experts + 7, 123_456_789, *((-1, -9) if dtype != "uint32" else (4_294_967_295,))]
    gone = rng.random(shape) < draw(st.sampled_from((0.3, 0.0, 0.7, 1.0)))
    ids[gone] = rng.choice(junk, gone.sum()).astype(dtype)
    if not maps or draw(st.booleans()):
        return Routing(ids, num_experts, num_experts, None)
    num_local = draw(st.integers(1, num_experts))
    expert_map = rng.choice(np.array([-1, -7], np.int32), num_experts)
    expert_map[rng.permutation(num_experts)[:num_local]] = rng.permutation(num_local)
    return Routing(ids, num_experts, num_local, expert_map)
