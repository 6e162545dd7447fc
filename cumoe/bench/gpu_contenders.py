"""One case of the GPU suite, and everybody who computes it: cumoe in its forms, and the peers that are installed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cumoe.bench import gpu_arrays, gpu_check, gpu_peers, gpu_recorded, gpu_tiles, shapes
from cumoe.bench.gpu_timing import Replay, Stopwatch

_DRAWS = 500  # the rarest of the recorded routings comes once in ten

OWN, PLAIN = "cumoe", "cumoe, plain weights"


class WrongResultError(Exception):
    """A result is too far from the exact one."""


@dataclass(frozen=True)
class Case:
    """One shape, dtype, routing and T; tokens and routing on the device, the routing on the host too."""

    shape: shapes.Shape
    dtype: str
    routing: str
    x: Any
    topk_weights: Any
    topk_ids: Any
    host_routing: tuple[Any, Any]

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.x)

    @property
    def experts_hit(self) -> int:
        """Experts that any token chose."""
        return len(np.unique(self.host_routing[1]))

    @property
    def num_bytes(self) -> int:
        """Bytes that any method must move."""
        return self.shape.moved_bytes(self.num_tokens, self.experts_hit, self.dtype)

    @property
    def flops(self) -> int:
        """Operations of both products."""
        return self.shape.flops(self.num_tokens)

    def __str__(self) -> str:
        return f"{self.shape.name} T={self.num_tokens}"


def draw(shape: shapes.Shape, dtype: str, routing: str, num_tokens: int, seed: int = 0) -> Case:
    """Draw the inputs of a case."""
    import cupy as cp

    routed = draw_routing(shape, num_tokens, routing, seed)
    x = gpu_arrays.tokens(shape, num_tokens, dtype, seed)
    return Case(shape, dtype, routing, x, cp.asarray(routed[0]), cp.asarray(routed[1]), routed)


def draw_routing(shape: shapes.Shape, num_tokens: int, routing: str, seed: int) -> tuple[Any, Any]:
    """Draw a routing; a uniform one hits as many experts as the recorded one, so that milliseconds compare."""
    drawn = shapes.routing(shape, num_tokens, routing, seed)
    wanted = gpu_recorded.experts_hit(shape.name, num_tokens) if routing == "uniform" else None
    for other in range(_DRAWS):
        if wanted is None or len(np.unique(drawn[1])) == wanted:
            break
        drawn = shapes.routing(shape, num_tokens, routing, seed + 1000 + other)
    return drawn


@dataclass(frozen=True)
class Contender:
    """A captured layer: each replay writes `out`."""

    replay: Replay
    out: Any


@dataclass(frozen=True)
class Weights:
    """The weights of a shape as drawn, and as cumoe packs them."""

    w1: Any
    w2: Any
    prepared: Any


def makers(
    stopwatch: Stopwatch, case: Case, weights: Weights, backend: str | None, tiles: Sequence[str], peers: bool
) -> dict[str, Callable[[], Contender]]:
    """By name, the functions that capture each contender; cumoe with packed weights comes first."""
    w1, w2, prepared = weights.w1, weights.w2, weights.prepared

    def own(first: Any, second: Any) -> Callable[[], Contender]:
        return lambda: _own(stopwatch, case, first, second, backend)

    def with_tiles(text: str) -> Callable[[], Contender]:
        def make() -> Contender:
            with gpu_tiles.forced(text):
                return _own(stopwatch, case, prepared, None, backend)

        return make

    def by_peer(peer: gpu_peers.Peer) -> Callable[[], Contender]:
        def make() -> Contender:
            stopwatch.also_for_torch()
            return Contender(*peer.make(case.x, w1, w2, case.topk_weights, case.topk_ids))

        return make

    return {
        OWN: own(prepared, None),
        PLAIN: own(w1, w2),
        **{f"{OWN} {text}": with_tiles(text) for text in tiles},
        **{peer.name: by_peer(peer) for peer in gpu_peers.PEERS if peers and not peer.missing()},
    }


def _own(stopwatch: Stopwatch, case: Case, first: Any, second: Any, backend: str | None) -> Contender:
    """The layer by cumoe, in memory of the caller's only, as a captured call needs it."""
    import cupy as cp

    import cumoe

    out = cp.empty(case.x.shape, case.x.dtype)
    needed = plan(case.shape, case.dtype, case.num_tokens, backend).workspace_bytes
    workspace = cp.empty(needed, cp.uint8)
    arguments = (case.x, first, second, case.topk_weights, case.topk_ids)
    named = {"out": out, "workspace": workspace, **chosen(backend)}
    replay = stopwatch.capture(lambda: cumoe.fused_experts(*arguments, **named))
    out.view(cp.uint8).fill(0xFF)  # NaN: the replay must write all of it, and read no scratch that it did not write
    workspace.fill(0xFF)
    return Contender(replay, out)


def plan(shape: shapes.Shape, dtype: str, num_tokens: int, backend: str | None) -> Any:
    """What one call does and needs."""
    import cumoe

    sizes = (num_tokens, shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k)
    return cumoe.plan(*sizes, dtype=dtype, device="cuda", **chosen(backend))


def chosen(backend: str | None) -> dict[str, str]:
    """The keyword for a backend, if one was asked for."""
    return {} if backend is None else {"backend": backend}


def check(contender: Contender, is_own: bool, tokens: Any, exact: Any, other: Any, dtype: str) -> gpu_check.Judgement:
    """
    How far the result is from the exact one of some `tokens`; raises if that is too far.

    All tokens are compared with `other`, a result that was checked before.
    """
    import cupy as cp

    judged = gpu_check.judge(gpu_check.rows_on_host(contender.out, tokens), exact)
    if is_own and not judged.max_ratio <= 1:
        raise WrongResultError(f"{judged.max_ratio:.3g} of its error bound")
    if not judged.relative_error <= gpu_peers.TOLERANCE[dtype]:
        raise WrongResultError(f"relative error {judged.relative_error:.2g}")
    apart = gpu_check.distance(cp, contender.out, other)
    if not apart <= 2 * gpu_peers.TOLERANCE[dtype]:
        raise WrongResultError(f"{apart:.2g} away from {OWN} over all tokens")
    return judged
