"""
What a few tokens give in each of many layouts, by the float64 law.

The order of gate and up rows only permutes the columns of the first product, so that it is computed once for all
orders; the second product is computed for a sample of its columns. Layouts that do not fit the shapes are not here.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cumoe._act import parameters
from cumoe._experts import Experts, make_experts
from cumoe._law import rows_law, weight_law
from cumoe._weight_layout import Layout, converted, goes_by_half, stored_rows
from cumoe.reference import experts, quantised
from cumoe.reference.rounding import Bounded, gamma, rounded

_ALL = slice(None)


class Probe(NamedTuple):
    """Tokens and what is expected of them, and the weights of the experts that they use, all on the host."""

    x: Any  # (T, H)
    topk_weights: Any
    topk_ids: Any
    expert_map: Any  # to places in `arrays`
    expected: Any  # (T, H) float64
    arrays: dict[str, Any]  # of `weight_arrays`
    quant_config: Any
    activation: str
    on_input: bool | str

    def experts(self, layout: Layout) -> tuple[dict[str, Any], Experts]:
        """The weights, if they are in that layout; ValueError if they cannot be."""
        arrays, quant_config = converted(np, layout, self.arrays, self.quant_config)
        return arrays, make_experts(np, arrays, self.activation, quant_config, self.x)


class Misfit(NamedTuple):
    """Relative rms error of a layout, and the relative rms of its bound."""

    error: float
    bound: float


class _Laws(NamedTuple):
    """The operands of a layer in the words of the law."""

    w1: Any
    w2: Any
    w1_bias: Any
    w2_bias: Any
    a1: quantised.Rows | None
    a2: quantised.Rows | None


def misfits(probe: Probe, layouts: list[Layout], tokens: Any, columns: Any) -> list[Misfit]:
    """How far each layout is from what is expected at some tokens and columns."""
    found: dict[Layout, Misfit] = {}
    expected = probe.expected[tokens][:, columns]
    by_half = goes_by_half(probe.arrays, probe.quant_config)
    stages: dict[Layout, list[Layout]] = {}
    for layout in layouts:
        order = layout.gate_up_order
        kind = "interleaved" if by_half and order is not None and order.endswith("interleaved") else None
        stages.setdefault(dataclasses.replace(layout, gate_up_order=kind), []).append(layout)
    for members in stages.values():
        for layout, out in zip(members, _outputs(probe, members, tokens, columns), strict=True):
            found[layout] = _misfit(out, expected)
    return [found[layout] for layout in layouts]


def _outputs(probe: Probe, layouts: list[Layout], tokens: Any, columns: Any) -> Iterator[Bounded]:
    """The outputs of layouts that differ in the order of gate and up rows only."""
    arrays, made = probe.experts(layouts[0])
    laws = _laws(probe, arrays, made, tokens, columns)
    first = list(_first(probe, laws, tokens))
    for layout in layouts:
        place = _columns_of(layout, layouts[0], arrays["w1"].shape[1])
        moved = [(e, rows, choices, Bounded(h.value[:, place], h.error[:, place])) for e, rows, choices, h in first]
        yield _second(probe, laws, tokens, len(columns), moved)


def _columns_of(layout: Layout, computed: Layout, num_rows: int) -> Any:
    """Where the columns of the first product are, if `layout` is right, in that of another order of rows."""
    if layout.gate_up_order is None or computed.gate_up_order is None:
        return _ALL
    wanted = stored_rows(layout.gate_up_order, layout.activation, num_rows)
    return np.argsort(stored_rows(computed.gate_up_order, layout.activation, num_rows))[wanted]


def _laws(probe: Probe, arrays: dict[str, Any], made: Experts, tokens: Any, columns: Any) -> _Laws:
    scheme = made.scheme
    w1, w2 = (weight_law(arrays[name], scheme, name, _ALL) for name in ("w1", "w2"))
    if isinstance(w2, quantised.Weights):
        blocks = columns // w2.rows
        pick = {name: getattr(w2, name)[:, blocks] for name in ("scale", "zero_points") if _has(getattr(w2, name))}
        if w2.factor.size and w2.factor.shape[1] > 1:
            pick["factor"] = w2.factor[:, columns]
        w2 = dataclasses.replace(w2, codes=w2.codes[:, columns], rows=1, **pick)
    else:
        w2 = w2[:, columns]
    w1_bias, w2_bias = (arrays[name] for name in ("w1_bias", "w2_bias"))
    a1, a2 = (None, None) if scheme is None else (scheme.a1, scheme.a2)
    batch = probe.x if a1 is not None and a1.is_batch_wide and len(tokens) < len(probe.x) else None
    return _Laws(
        w1,
        w2,
        w1_bias,
        None if w2_bias is None else w2_bias[:, columns],
        rows_law(a1, _ALL, batch),
        rows_law(a2, _ALL),
    )


def _has(array: Any) -> bool:
    return array is not None and array.size > 0


def _first(probe: Probe, laws: _Laws, tokens: Any) -> Iterator[tuple[int, Any, Any, Bounded]]:
    """Expert, tokens, choices and first product of each used expert, as in `reference.experts`."""
    x, dtype, a1 = probe.x[tokens].astype(np.float64), probe.x.dtype, laws.a1
    weights = _weights(probe, tokens)
    on_tokens = probe.on_input in (True, "hidden_states")
    local = experts.local_experts(probe.topk_ids[tokens], len(probe.arrays["w1"]), probe.expert_map)
    batch = None
    if a1 is not None and a1.is_batch_wide:
        whole = x if a1.batch is None else np.asarray(a1.batch).astype(np.float64)
        every = Bounded(whole, np.zeros_like(whole))
        batch = quantised.batch_scale(experts.weighted(every, weights[:, :1], dtype) if on_tokens else every, a1)
    for e in np.unique(local[local >= 0]):
        rows, choices = np.nonzero(local == e)
        weight = weights[rows, choices][:, None]
        given = Bounded(x[rows], np.zeros_like(x[rows]))
        if on_tokens:
            given = experts.weighted(given, weight, dtype)
        h = experts.product(given, laws.w1, e, a1, batch, laws.w1_bias, 0.0, dtype)
        if probe.on_input == "accumulator":
            h = experts.scaled(h, weight)
        yield e, rows, choices, Bounded(h.value, rounded(h.value, h.error, dtype))


def _second(
    probe: Probe, laws: _Laws, tokens: Any, num_columns: int, first: list[tuple[int, Any, Any, Bounded]]
) -> Bounded:
    """The output from the first products, as in `reference.experts`."""
    dtype, a2, weights = probe.x.dtype, laws.a2, _weights(probe, tokens)
    given = parameters(probe.activation, probe.quant_config)
    between = []
    for *_, h in first:
        a = experts.activated(h, probe.activation, *given)
        between.append(Bounded(a.value, rounded(a.value, a.error, dtype)))
    batch = None
    if a2 is not None and a2.is_batch_wide:
        batch = quantised.batch_scale(experts.joined(between), a2)
    out, size, error = (np.zeros((len(tokens), num_columns)) for _ in range(3))
    for (e, rows, choices, _), a in zip(first, between, strict=True):
        y = experts.product(a, laws.w2, e, a2, batch, laws.w2_bias, 0.0, dtype)
        if not probe.on_input:
            y = experts.scaled(y, weights[rows, choices][:, None])
        np.add.at(out, rows, y.value)
        np.add.at(size, rows, np.abs(y.value))
        np.add.at(error, rows, rounded(y.value, y.error, dtype))
    error += gamma(probe.topk_ids.shape[1]) * (size + error)
    return Bounded(out, experts.unknown_is_infinite(rounded(out, error, dtype)))


def _weights(probe: Probe, tokens: Any) -> Any:
    return probe.topk_weights[tokens].astype(np.float32).astype(np.float64)


def _misfit(out: Bounded, expected: Any) -> Misfit:
    scale = np.sqrt(np.mean(expected**2))
    with np.errstate(all="ignore"):
        error, bound = (float(np.sqrt(np.mean(one**2)) / scale) for one in (out.value - expected, out.error))
    return Misfit(error if np.isfinite(error) else np.inf, bound)
