"""Look at a routing: who gets how much, who goes with whom, and what a tile size would waste."""

import html
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cumoe import _arrays, _check

Array = Any

_CHUNK_PAIRS = 1 << 22  # pairs of choices counted at a time: bounds the scratch memory
_BARS = 256  # most bars of the picture; more experts share them


@dataclass(frozen=True, repr=False)
class RoutingReport:
    """
    What a routing does to the experts; arrays are plain NumPy arrays.

    A choice is one of the k experts of one token. Choices whose id is outside ``0..E-1`` are counted and
    otherwise left out, as `fused_experts` leaves them out. In a notebook the report shows itself as a
    table and a bar chart; `plot` draws with matplotlib.

    Attributes
    ----------
    num_tokens, top_k, num_experts : int
        T, k and E.
    load : (E,) int64
        Choices that go to each expert.
    weight_load : (E,) float64
        Sum of the router weights that go to each expert, without NaN and infinite ones.
    co_activation : (E, E) int64
        Tokens that chose both experts; on the diagonal, tokens that chose the expert at all.
    entropy_bits : float
        Entropy of the load; ``log2(E)`` when all experts get the same, NaN without any choice.
    jain_index : float
        ``(sum load)^2 / (E * sum load^2)``: 1 when all get the same, 1 / E when one gets all.
    skipped_negative, skipped_too_large : int
        Choices with an id below 0, and at or above E.
    duplicate_choices : int
        Choices that name an expert which the same token has named before.
    nonfinite_weights : int
        Router weights that are NaN or infinite.
    block_size : int
        The tile height that `padded_rows` and `padding_waste` are about.
    tie_tokens, nan_tokens : int or None
        With `router_logits`: tokens whose choice an equal score decided, and tokens with a NaN score.
    """

    num_tokens: int
    top_k: int
    num_experts: int
    load: Array = field(compare=False)
    weight_load: Array = field(compare=False)
    co_activation: Array = field(compare=False)
    skipped_negative: int
    skipped_too_large: int
    duplicate_choices: int
    nonfinite_weights: int
    block_size: int
    tie_tokens: int | None = None
    nan_tokens: int | None = None

    @property
    def num_choices(self) -> int:
        """Choices that reach an expert."""
        return int(self.load.sum())

    @property
    def experts_hit(self) -> int:
        """Experts with at least one choice."""
        return int(np.count_nonzero(self.load))

    @property
    def entropy_bits(self) -> float:
        """Entropy of the load."""
        if self.num_choices == 0:
            return math.nan
        share = self.load[self.load > 0] / self.num_choices
        return float(-(share * np.log2(share)).sum()) + 0.0

    @property
    def jain_index(self) -> float:
        """Jain's fairness index of the load."""
        if self.num_choices == 0:
            return math.nan
        load = self.load.astype(np.float64)
        return float(load.sum() ** 2 / (self.num_experts * (load * load).sum()))

    @property
    def padded_rows(self) -> int:
        """Rows when each expert's choices are padded to whole tiles of `block_size`."""
        return self.rows_padded_to(self.block_size)

    @property
    def padding_waste(self) -> float:
        """Part of `padded_rows` that is padding, 0 when there are none."""
        rows = self.padded_rows
        return 1.0 - self.num_choices / rows if rows else 0.0

    def rows_padded_to(self, block_size: int) -> int:
        """
        Count the rows when each expert's choices are padded to whole tiles.

        Parameters
        ----------
        block_size : int
            Rows of a tile, at least 1.

        Returns
        -------
        int
            ``sum(ceil(load / block_size)) * block_size``.
        """
        block_size = _check.integer("block_size", block_size, 1)
        return int((-(-self.load // block_size)).sum()) * block_size

    def partners(self, count: int = 5) -> list[tuple[int, int, int]]:
        """
        List the pairs of experts that are chosen together most often.

        Parameters
        ----------
        count : int
            How many pairs to list at most.

        Returns
        -------
        list of (int, int, int)
            Two experts, the lower first, and the tokens that chose both; most frequent first.
        """
        count = _check.integer("count", count, 0)
        first, second = np.triu_indices(self.num_experts, 1)
        together = self.co_activation[first, second]
        order = np.argsort(-together, kind="stable")[:count]
        return [(int(first[i]), int(second[i]), int(together[i])) for i in order if together[i]]

    def plot(self) -> Any:
        """
        Draw the load and the co-activation with matplotlib.

        Returns
        -------
        matplotlib.figure.Figure
            Two axes: bars of the load, an image of the co-activation without its diagonal.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 3.6), layout="constrained")
        bars, image = figure.subplots(1, 2, width_ratios=(2, 1))
        bars.bar(np.arange(self.num_experts), self.load, width=1.0)
        bars.axhline(self.num_choices / self.num_experts, color="black", linewidth=0.8, linestyle="--")
        bars.set(xlabel="expert", ylabel="choices", title=f"load, Jain index {self.jain_index:.3f}")
        others = self.co_activation.copy()
        np.fill_diagonal(others, 0)
        shown = image.imshow(others, interpolation="nearest")
        image.set(xlabel="expert", ylabel="expert", title="tokens that chose both")
        figure.colorbar(shown, ax=image)
        return figure

    def _facts(self) -> list[tuple[str, str]]:
        facts = [
            ("tokens, choices each", f"{self.num_tokens}, {self.top_k}"),
            ("experts hit", f"{self.experts_hit} of {self.num_experts}"),
            ("load min / mean / max", f"{self.load.min()} / {self.load.mean():.1f} / {self.load.max()}"),
            ("entropy", f"{self.entropy_bits:.3f} of {math.log2(self.num_experts):.3f} bits"),
            ("Jain index", f"{self.jain_index:.3f}"),
            (f"rows in tiles of {self.block_size}", f"{self.padded_rows}, {self.padding_waste:.1%} padding"),
            ("skipped, id < 0", f"{self.skipped_negative}"),
            ("skipped, id too large", f"{self.skipped_too_large}"),
            ("duplicate choices", f"{self.duplicate_choices}"),
            ("NaN or infinite weights", f"{self.nonfinite_weights}"),
        ]
        if self.tie_tokens is not None:
            facts.append(("tokens decided by a tie", f"{self.tie_tokens}"))
            facts.append(("tokens with a NaN score", f"{self.nan_tokens}"))
        return facts

    def __repr__(self) -> str:
        return f"RoutingReport({'; '.join(f'{name}: {value}' for name, value in self._facts())})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in self._facts()
        )
        pairs = ", ".join(f"{a} + {b} ({count})" for a, b, count in self.partners())
        rows += f"<tr><th style='text-align:left'>most often together</th><td>{pairs or 'none'}</td></tr>"
        return f"<div><table>{rows}</table>{self._svg()}</div>"

    def _svg(self) -> str:
        """The load as a bar chart that needs nothing from elsewhere."""
        per_bar = -(-self.num_experts // _BARS)
        starts = np.arange(0, self.num_experts, per_bar)
        heights = np.maximum.reduceat(self.load, starts)
        top = max(1, int(heights.max()))
        width, height = 640, 120
        step = width / len(starts)
        bars = "".join(
            f'<rect x="{i * step:.2f}" y="{height * (1 - value / top):.2f}" width="{max(0.5, 0.9 * step):.2f}" '
            f'height="{height * value / top:.2f}"><title>expert {first}: {value}</title></rect>'
            for i, (first, value) in enumerate(zip(starts.tolist(), heights.tolist(), strict=True))
        )
        mean = height * (1 - self.load.mean() / top)
        return (
            f'<svg viewBox="0 0 {width} {height + 16}" width="{width}" role="img" aria-label="choices per expert">'
            f'<g fill="#4878a8">{bars}</g>'
            f'<line x1="0" x2="{width}" y1="{mean:.2f}" y2="{mean:.2f}" stroke="currentColor" stroke-dasharray="4 3"/>'
            f'<text x="0" y="{height + 13}" font-size="11" fill="currentColor">choices per expert, 0 to '
            f"{self.num_experts - 1}; highest {top}, dashed: mean</text></svg>"
        )


@_arrays.on_callers_stream
def routing_report(
    topk_weights: Array,
    topk_ids: Array,
    num_experts: int,
    *,
    block_size: int = 16,
    router_logits: Array | None = None,
) -> RoutingReport:
    """
    Describe a routing: load, fairness, co-activation, skipped and repeated choices, padding.

    Parameters
    ----------
    topk_weights : (T, k) array
        Router weights, any float dtype.
    topk_ids : (T, k) array, integers
        Expert of each choice. An id outside 0..E-1 is counted as skipped.
    num_experts : int
        E.
    block_size : int
        Rows of a tile, for the padding figures.
    router_logits : (T, E) array, optional
        Scores before the selection; with them, ties at the k-th place and NaN scores are counted.

    Returns
    -------
    RoutingReport
        Its arrays are NumPy arrays on the host, whatever came in.

    Raises
    ------
    TypeError
        Arrays of two libraries, or ids that are not integers.
    ValueError
        A shape that does not fit.

    Notes
    -----
    This reads the values: with arrays on a device it copies them to the host and waits for them.

    Examples
    --------
    >>> import numpy as np, cumoe
    >>> ids = np.array([[0, 1], [0, 2], [0, 1]], np.int32)
    >>> report = cumoe.routing_report(np.full((3, 2), 0.5, np.float32), ids, 4, block_size=2)
    >>> report.load
    array([3, 2, 1, 0])
    >>> report.partners(1)
    [(0, 1, 2)]
    >>> report.padded_rows, report.padding_waste
    (8, 0.25)
    """
    E = _check.integer("num_experts", num_experts, 1)
    block_size = _check.integer("block_size", block_size, 1)
    side, arrays = _arrays.enter(topk_weights=topk_weights, topk_ids=topk_ids, router_logits=router_logits)
    weights, ids, logits = (array if array is None or side.xp is np else side.xp.asnumpy(array) for array in arrays)
    _check.ndim("topk_ids", ids, "(T, k)", 2)
    _check.shape("topk_weights", weights, "(T, k)", ids.shape)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"topk_ids must be integers, got {ids.dtype.name}")
    if logits is not None:
        _check.shape("router_logits", logits, "(T, E)", (ids.shape[0], E))

    negative, large = ids < 0, ids >= E
    ids = np.where(negative | large, E, ids).astype(np.int64)  # E collects what is skipped
    finite = np.isfinite(weights.astype(np.float64))
    load = np.bincount(ids.ravel(), minlength=E + 1)[:E]
    weight_load = np.bincount(ids.ravel(), np.where(finite, weights, 0).astype(np.float64).ravel(), E + 1)[:E]
    ordered = np.sort(ids, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < E)
    ties, nans = (None, None) if logits is None else _undecided(logits.astype(np.float64), ids.shape[1])
    return RoutingReport(
        num_tokens=ids.shape[0],
        top_k=ids.shape[1],
        num_experts=E,
        load=load,
        weight_load=weight_load,
        co_activation=_co_activation(ordered, E),
        skipped_negative=int(negative.sum()),
        skipped_too_large=int(large.sum()),
        duplicate_choices=int(repeated.sum()),
        nonfinite_weights=int((~finite).sum()),
        block_size=block_size,
        tie_tokens=ties,
        nan_tokens=nans,
    )


def _co_activation(ordered: Array, E: int) -> Array:
    """Tokens that hold both experts, from ids sorted within each token; each expert counts once a token."""
    unique = ordered.copy()
    unique[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = E
    counts = np.zeros(E * E, np.int64)
    T, k = unique.shape
    step = max(1, _CHUNK_PAIRS // max(1, k * k))
    for first in range(0, T, step):
        ids = unique[first : first + step]
        a, b = np.broadcast_arrays(ids[:, :, None], ids[:, None, :])
        there = (a < E) & (b < E)
        counts += np.bincount(a[there] * E + b[there], minlength=E * E)
    return counts.reshape(E, E)


def _undecided(logits: Array, k: int) -> tuple[int, int]:
    """Tokens whose k-th and (k + 1)-th scores are equal, and tokens with a NaN score."""
    nan = np.isnan(logits).any(axis=1)
    if not 0 < k < logits.shape[1]:
        return 0, int(nan.sum())
    ordered = -np.sort(-logits[~nan], axis=1)
    return int((ordered[:, k - 1] == ordered[:, k]).sum()), int(nan.sum())
