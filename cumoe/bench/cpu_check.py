"""Whether a contender of the CPU suite computed the layer, before its time counts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape

from cumoe.bench.cpu_contenders import OWN, Contender, Held, first_line
from cumoe.bench.schemes import numbers, stored

Array = np.ndarray[Any, Any]

# Relative error of a token (Euclidean norm) that rounding alone explains: bfloat16 methods round the
# intermediate and often the sum too, float32 ones add thousands of products in an order of their own.
TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 2e-5}
# Tokens in eight bits: steps of 1/127 of the largest number of a row are off by 1 % of a normal one and 2 % of an
# intermediate, whose largest is farther out (0.024 to 0.03 in all).
ROUNDED_TOLERANCE = 6e-2

_SAMPLE = 4  # tokens


class WrongResultError(Exception):
    """cumoe's own result is beyond its error bound."""


class Exact(NamedTuple):
    """A few tokens of the layer in float64."""

    tokens: Array
    rows: Array

    def error(self, out: Array) -> float:
        """Largest relative error (Euclidean norm) of these tokens; infinite if one is no number."""
        got = out[self.tokens].astype(np.float64)
        errors = np.linalg.norm(got - self.rows, axis=1) / np.linalg.norm(self.rows, axis=1)
        return float(errors.max()) if np.isfinite(errors).all() else float("inf")


def exact(hidden_states: Array, w1: Any, w2: Any, topk_weights: Array, topk_ids: Array, sample: int = _SAMPLE) -> Exact:
    """Compute a few tokens from the numbers that the weights stand for."""
    w1, w2 = numbers(w1), numbers(w2)
    intermediate = w2.shape[2]
    count = len(hidden_states)
    tokens = np.unique(np.linspace(0, count - 1, min(sample, count)).astype(int))
    rows = np.zeros((len(tokens), hidden_states.shape[1]))
    for i, t in enumerate(tokens):
        x = hidden_states[t].astype(np.float64)
        for weight, e in zip(topk_weights[t].astype(np.float64), topk_ids[t], strict=True):
            h = w1[e].astype(np.float64) @ x
            gate, up = h[:intermediate], h[intermediate:]
            rows[i] += weight * (w2[e].astype(np.float64) @ (gate / (1.0 + np.exp(-gate)) * up))
    return Exact(tokens, rows)


def tolerance(contender: Contender, held: Held) -> float:
    """Relative error beyond which it has not computed the layer."""
    if contender.rounds_activations or held.scheme.products == "int8":
        return ROUNDED_TOLERANCE
    return TOLERANCE[held.scheme.dtype]


def check(
    console: Console, contenders: Mapping[str, Contender], x: Array, held: Held, routed: tuple[Array, Array]
) -> dict[str, float]:
    """Relative error of every contender that gives the right result; the others are named with the reason."""
    import cumoe

    right = exact(x, held.w1, held.w2, *routed)
    errors = {}
    for name, contender in contenders.items():
        if contender.most_tokens is not None and len(x) > contender.most_tokens:
            continue
        try:
            out = contender.layer(x, *routed)
        except Exception as problem:
            if name == OWN:
                raise
            console.print(f"without {name} at T = {len(x)}: {escape(first_line(problem))}")
            continue
        own = contender.numbers
        error = (right if own is None else exact(x, own[0], own[1], *routed)).error(out)
        if name == OWN:
            weights = stored(held.w1), stored(held.w2)
            found = cumoe.verify(out, x, *weights, *routed, quant_config=held.quant_config, sample=_SAMPLE)
            if not found.max_ratio <= 1:
                raise WrongResultError(f"cumoe is at {found.max_ratio:.3g} of its error bound for {len(x)} tokens")
        elif not error <= tolerance(contender, held):
            console.print(f"without {name} at T = {len(x)}: relative error {error:.2g}")
            continue
        errors[name] = error
    return errors
