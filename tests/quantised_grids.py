"""
Layers of public grids in quantised schemes, and the law for the tokens that are judged.

The judged tokens choose among the known experts (`drawn_codes`). What an expert gives for a token is computed once for
all the cells of a shape.

The GPU computes every token, with all of its choices. The host computes the judged tokens only, and of their choices
only as many as hold `COMPUTED` weights, one at least; the other ids are -1. Where there are many tokens, it is given
the judged ones without the others, whose bits do not depend on them, in all cells of a shape but the last.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np
import pytest
from drawn_codes import KINDS, KNOWN, MOST, PERIOD, Matrix, period
from grids import ComputedOn, assert_stated, draw_logits, exactly, stored
from sides import back, bits, on

import cumoe
from cumoe import _arrays
from cumoe._weight_format import WeightFormat
from cumoe.cpu import coded_panels, pack
from cumoe.reference import experts, quantised
from cumoe.reference.experts import Bounded
from cumoe.reference.rounding import gamma, rounded, unit

COMPUTED = 1 << 23
FEW, MANY = 1 << 19, 1 << 24  # numbers in all tokens that the host takes in every cell, and in the last one of a shape
CHUNK = 512  # rows of a matrix whose numbers stay in the cache
COLUMNS = 64

# largest distance of two codes of an activation, over its size or, of int8, over the size of its row
STEPS = {"fp8": 2**-3, "mxfp8": 2**-3, "int8": 2**-4, "mxfp4": 0.5, "nvfp4": 0.5}


class Layer:
    """A shape (n, k) in a scheme, for the numbers of tokens `ms`, and what the known experts give for judged tokens."""

    def __init__(
        self,
        kind,
        ms,
        n,
        k,
        activation="silu",
        *,
        dtype="bfloat16",
        size=0.1,
        x_size=0.1,
        bias=0.0,
        input_weights=None,
        **more,
    ):
        self.kind, self.n, self.k, self.activation = kind, n, k, activation
        self.dtype, self.more = np.dtype(dtype), more
        gated = not activation.endswith("_no_mul")
        self.w1 = Matrix(kind, (1 + gated) * n, k, size, 0)
        self.w2 = Matrix(kind, k, n, size, 1)
        self.num_computed = max(1, COMPUTED // ((2 + gated) * n * k))  # known experts, on the host
        self.pool = (period("normal") * np.float32(x_size)).astype(dtype)
        self.tokens = sorted({t for m in ms for t in self.judged(m)})
        self.x = np.stack([self.token(t) for t in self.tokens])
        self.input_weights = None if input_weights is None else np.array(input_weights, np.float32)
        self.bias = [None, None]
        if bias:
            shapes = [(KNOWN + MOST, rows) for rows in (self.w1.n, k)]
            self.bias = [np.resize(period("normal"), shape) * np.float32(bias) for shape in shapes]
        self.has_bias, self.placed = bias > 0, {}
        self.rows = self.rows_of_both(size, x_size)
        self.between, self.outputs = functools.cache(self.expert_between), functools.cache(self.expert_outputs)
        self.rounds = True, True

    def go_to(self, xp):
        """
        Let the rounded law be that of a side: where codes are multiplied as they are, no weight, or no row, is rounded.

        The host does so by kernel; the GPU where the scales of rows are those of groups, whose sums they meet.
        """
        rule, (rows, cols), zeros = self.kind.rule, self.kind.group, self.kind.zeros or None
        form = WeightFormat(rule, np.zeros((1, 2, 2), np.float32), "float32", zeros, None, rows, cols)
        kernel = pack.best_kernel(self.dtype.name, self.k, self.n, True, False, coded=True)
        made = coded_panels.layout(form, self.k, kernel)
        in_parts = self.kind.rows is not None and self.kind.rows[0] in ("fp8", "int8") and self.kind.rows[1] % 64 == 0
        if xp is np:
            in_parts = in_parts and made is not None and made.group == self.kind.rows[1]
        weights = made is None if xp is np else not in_parts
        if (weights, not in_parts) != self.rounds:
            self.rounds = weights, not in_parts
            self.between.cache_clear()
            self.outputs.cache_clear()

    def judged(self, m):
        """The first and the last token; where one scale serves all, all tokens."""
        return list(range(m)) if self.kind.per_tensor == "dynamic" else sorted({0, m - 1})

    def token(self, t):
        """Row t of the tokens."""
        return self.pool[(t * self.k + np.arange(self.k)) % PERIOD]

    def rows_of_both(self, size, x_size):
        """How the rows of both products are quantised."""
        if self.kind.rows is None:
            return None, None
        scheme, cols = self.kind.rows
        one = np.ones(1, np.float32) if scheme == "nvfp4" else None
        if not self.kind.per_tensor:
            return (quantised.Rows(scheme, cols, global_scale=one),) * 2
        first = np.abs(self.pool.astype(np.float32)).max().reshape(1) / np.float32(448)
        second = np.array([10 * self.k * (size * x_size) ** 2 / 448], np.float32)  # of the largest h * h or so
        second = np.array([self.more["a2_scale"]], np.float32) if "a2_scale" in self.more else second
        if self.kind.per_tensor == "dynamic":
            return quantised.Rows(scheme, cols, True, first), quantised.Rows(scheme, cols, True)
        return quantised.Rows(scheme, cols, True, first), quantised.Rows(scheme, cols, True, second)

    def slots(self, num_experts):
        """Where the known experts are: the first of them is the last one of the layer."""
        return np.linspace(num_experts - 1, 0, min(KNOWN, num_experts)).round().astype(int)

    def put(self, xp, num_experts):
        """w1, w2 and config on a side; kept for the next cell."""
        if (xp, num_experts) not in self.placed:
            slots = self.slots(num_experts)
            slots = slots[: self.num_computed] if xp is np else slots
            first, second = (w.put(xp, slots, num_experts) for w in (self.w1, self.w2))
            more = {name: value for name, value in self.more.items() if name != "a2_scale"}
            if self.has_bias:
                order = KNOWN + np.arange(num_experts)
                order[slots] = range(len(slots))
                more |= {f"w{i}_bias": on(xp, bias[order]) for i, bias in enumerate(self.bias, 1)}
            scales = {} if self.rows[0] is None else {f"a{i}_scale": rows.scale for i, rows in enumerate(self.rows, 1)}
            more |= {name: on(xp, scale) for name, scale in scales.items() if scale is not None}
            if self.kind.rows is not None and self.kind.rows[0] == "nvfp4":
                more |= {f"a{i}_gscale": xp.ones(num_experts, np.float32) for i in (1, 2)}
            self.placed = {(xp, num_experts): (first.codes, second.codes, self.kind.build(first, second, **more))}
        return self.placed[xp, num_experts]

    def batch(self, xp, m):
        """All tokens on a side."""
        pool, count = bits(self.pool), -(-m * self.k // PERIOD)
        whole = xp.empty((count, PERIOD), pool.dtype)
        whole[:] = on(xp, pool)
        return whole.reshape(-1)[: m * self.k].reshape(m, self.k).view(self.dtype)

    def product(self, x, which, i, batch=None):
        """The law of one product of one known expert."""
        rows, parts = self.rows[which], []
        for weights, bias in self.pieces(which, i):
            parts.append(experts.product(x, weights, 0, rows, batch, bias, 0.0, self.dtype))
        return Bounded(*(np.concatenate(one, axis=1) for one in zip(*parts, strict=True)))

    def step(self, x, which, i, batch=None):
        """The same without a bound, of operands that are rounded to the tokens' dtype, as the layer's notes say."""
        factor, parts = 1.0, []
        if self.rows[which] is not None:
            numbers, row_factor = quantised.quantise(exactly(x), self.rows[which], self.dtype, 0, batch)
            x = stored(numbers.value, self.dtype) if self.rounds[1] else numbers.value
            factor = row_factor.value
        for weights, bias in self.pieces(which, i):
            numbers = weights.numbers(0)
            numbers = stored(numbers, self.dtype) if weights.scale.size and self.rounds[0] else numbers
            y = experts.times(x, numbers) * (factor * weights.factors(0))
            parts.append(y if bias is None else y + bias)
        return np.concatenate(parts, axis=1)

    def pieces(self, which, i):
        """Some rows after the others of a weight of a known expert, and their biases."""
        matrix, bias = (self.w1, self.w2)[which], self.bias[which][i] if self.has_bias else None
        for first in range(0, matrix.n, CHUNK):
            last = min(first + CHUNK, matrix.n)
            yield matrix.weights(i, first, last), None if bias is None else bias[None, first:last]

    def expert_between(self, i):
        """Rows of a known expert between the products, of every judged token: the law's, and rounded on the way."""
        x = exactly(self.x.astype(np.float64))
        if self.input_weights is not None:
            weights = self.input_weights[self.tokens].astype(np.float64)[:, None]
            x = experts.weighted(x, weights, self.dtype)
        h = self.product(x, 0, i)
        h = Bounded(h.value, rounded(h.value, h.error, self.dtype))
        step = exactly(stored(self.step(stored(x.value, self.dtype), 0, i), self.dtype))
        parameters = [self.more.get(f"gemm1_{name}") for name in ("alpha", "beta", "clamp_limit")]
        a, step = (experts.activated(one, self.activation, *parameters) for one in (h, step))
        return Bounded(a.value, rounded(a.value, a.error, self.dtype)), stored(step.value, self.dtype)

    def expert_outputs(self, i):
        """What a known expert gives for every judged token, without router weights behind it; as before."""
        a, step = self.between(i)
        return self.product(a, 1, i), self.step(step, 1, i)

    def batch_outputs(self, which):
        """The same for each of the used experts, if one scale serves all rows between the products."""
        used = [(int(i), np.nonzero(which == i)[0]) for i in np.unique(which[which >= 0])]
        a = joined([Bounded(*(part[at] for part in self.between(i)[0])) for i, at in used])
        step = exactly(np.concatenate([self.between(i)[1][at] for i, at in used]))
        scales = [quantised.batch_scale(rows, self.rows[1]) for rows in (a, step)]
        outputs = {}
        for i, _ in used:
            a, step = self.between(i)
            outputs[i] = self.product(a, 1, i, scales[0]), self.step(step, 1, i, scales[1])
        return outputs.__getitem__

    def law(self, tokens, weights, which):
        """
        Sums of the known experts `which` (J, k), -1 for none, of the judged tokens.

        The law, and float64 that is rounded where the layer says that it rounds.
        """
        places = np.searchsorted(self.tokens, tokens)
        value, size, error, steps = (np.zeros((len(tokens), self.k)) for _ in range(4))
        with np.errstate(invalid="ignore", over="ignore"):
            outputs = self.batch_outputs(which) if self.kind.per_tensor == "dynamic" else self.outputs
            for i in np.unique(which[which >= 0]):
                rows, choices = np.nonzero(which == i)
                y, step = outputs(int(i))
                y, step = Bounded(*(part[places[rows]] for part in y)), step[places[rows]]
                if self.input_weights is None:
                    weight = weights[rows, choices].astype(np.float64)[:, None]
                    y, step = experts.scaled(y, weight), step * weight
                np.add.at(value, rows, y.value)
                np.add.at(size, rows, np.abs(y.value))
                np.add.at(error, rows, rounded(y.value, y.error, self.dtype))
                np.add.at(steps, rows, stored(step, self.dtype))
            error += gamma(which.shape[1]) * (size + error)
            exact = Bounded(value, experts.unknown_is_infinite(rounded(value, error, self.dtype)))
        return exact, stored(steps, self.dtype)


def joined(parts):
    """Rows below rows."""
    return Bounded(*(np.concatenate(one) for one in zip(*parts, strict=True)))


class Routed(NamedTuple):
    """The arguments of a cell, NumPy arrays, and what the law needs to know of them."""

    tokens: list  # judged, as numbered in the grid
    rows: np.ndarray  # where they are in what the side is given
    weights: np.ndarray
    ids: np.ndarray
    which: np.ndarray  # known experts of the judged tokens
    expert_map: np.ndarray | None


def route(xp, layer, m, e, topk, ep_size, renormalize, whole):
    """Random routing of all tokens; the judged ones choose among known experts, and some of other ranks."""
    rng, count, tokens = np.random.default_rng(e + topk), e // ep_size, np.array(layer.judged(m))
    expert_map, here = None, np.arange(e)
    if ep_size > 1:
        here = rng.permutation(e)[:count]
        expert_map = np.full(e, -1, np.int32)
        expert_map[here] = np.arange(count)
    known = here[layer.slots(count)]
    known = known if ep_size == 1 else known[: -(-topk // ep_size)]
    known = known[: layer.num_computed] if xp is np else known
    others = np.setdiff1d(np.arange(e), known if xp is np else here)
    wanted = np.concatenate([known, others[: max(topk - len(known), 0)]])
    logits = draw_logits((m, e), e)
    # the largest logits of a judged token go to these experts; the host must have the first one
    mine = logits[tokens]
    for row in mine:
        best, order = np.sort(row)[::-1], np.append(0, 1 + rng.permutation(len(wanted) - 1))
        row[wanted[order]] = best[: len(wanted)] + row.dtype.type(2**-5)  # more than a tie
        row[np.setdiff1d(np.arange(e), wanted)] = rng.permutation(best[len(wanted) :])
    logits[tokens] = mine
    rows = tokens if whole else np.arange(len(tokens))
    weights, ids = ComputedOn(xp).fused_topk(logits if whole else mine, topk, renormalize=renormalize)
    place = np.full(e, -1)
    place[known] = np.arange(len(known))
    which = place[ids[rows]]
    assert (which >= 0).any(axis=1).all()
    if xp is np:
        kept = np.full_like(ids, -1)
        kept[rows] = np.where(which >= 0, ids[rows], -1)
        ids = kept
    else:
        assert ((which >= 0) | ~np.isin(ids[rows], here)).all()
    return Routed(tokens, rows, weights, ids, which, expert_map)


def judge(xp, layer, m, e, topk, *, ep_size=1, renormalize=False, last=True, shelves=False):
    """Run a cell of a grid; the judged rows of the result, and the law for them."""
    layer.go_to(xp)
    whole = xp is not np or m * layer.k <= (MANY if last else FEW)
    routed = route(xp, layer, m, e, topk, ep_size, renormalize, whole)
    w1, w2, config = layer.put(xp, e // ep_size)
    x = layer.batch(xp, m) if whole else layer.x[np.searchsorted(layer.tokens, routed.tokens)]
    weights, expert_map = routed.weights, on(xp, routed.expert_map)
    named = {"activation": layer.activation, "quant_config": config, "expert_map": expert_map}
    if layer.input_weights is not None:
        weights = np.resize(layer.input_weights, (m, 1)) if whole else layer.input_weights[routed.tokens][:, None]
        named["apply_router_weight_on_input"] = True
    given = on(xp, x), w1, w2, on(xp, weights), on(xp, routed.ids)
    out = back((run_on_shelves if shelves else cumoe.fused_experts)(*given, **named))
    if xp is np:
        assert not out[(routed.ids < 0).all(axis=1)].any()
    return out[routed.rows], layer.law(routed.tokens, weights[routed.rows], routed.which)


def run_on_shelves(x, w1, w2, weights, ids, **named):
    """Tokens to the shelves of their experts, both products there, and back."""
    e, most, k = len(w1), len(x), x.shape[1]
    xp = np if isinstance(x, np.ndarray) else _arrays.namespace("cuda")
    batched, counts = cumoe.moe_batch(x, ids, e, most)
    used = xp.arange(most) < counts[:, None]
    shelf = xp.where(used, xp.arange(e)[:, None], -1).reshape(-1, 1)
    rows = cumoe.fused_experts(batched.reshape(-1, k), w1, w2, xp.ones(shelf.shape, np.float32), shelf, **named)
    return cumoe.moe_unbatch(rows.reshape(e, most, k), weights, ids)


def assert_within(out, exact, layer, cell=""):
    """
    Within the derived bound, and small on average.

    Activations that are quantised may have other codes in a computation that errs a little before. The bound lets all
    of them have them, so it is wider than the result if rows are long; on average few do. One that errs by d lies with
    probability 2 d / s so near the middle of two codes at distance s that the other one is taken, which is s away: the
    root mean square of that is sqrt(2 d s), and d is at most four roundings. It is held to that, and to the limits of
    `grids.assert_within`, for each token in each `COLUMNS` columns, where one wrong element shows.
    """
    ratio = experts.ratio(out, exact)
    assert ratio.max() <= 1, f"{cell}: {ratio.max()} of the bound at {np.argwhere(ratio > 1)[0]}"
    allowed = 4 * unit(out.dtype) + 64 * 2.0**-24
    if layer.rows[0] is not None:
        allowed += np.sqrt(2 * 4 * unit(out.dtype) * STEPS[layer.rows[0].scheme])
    parts = (one.reshape(len(out), -1, COLUMNS) for one in (out.astype(np.float64) - exact.value, exact.value))
    error, size = (np.sqrt(np.mean(one**2, axis=2)) for one in parts)
    assert size.min() > 0
    worst = (error / size).max()
    assert worst <= allowed, f"{cell}: root mean square {worst}, allowed {allowed}"


def check(xp, layer, m, e, topk, atol, rtol=0.0, cell="", **more):
    """Judge a cell in both ways."""
    out, (exact, steps) = judge(xp, layer, m, e, topk, **more)
    cell = f"m {m}, e {e}, topk {topk}, {cell}"
    assert_stated(out, steps, atol, rtol, cell)
    assert_within(out, exact, layer, cell)
    return out, steps


def check_all(xp, the_layer, m, experts, topks, atol, rtol=0.0, ep_sizes=(1,), **more):
    """All cells of a shape: numbers of experts, choices, ranks."""
    cells = [cell for cell in itertools.product(experts, ep_sizes, topks) if cell[2] <= cell[0] and cell[1] <= cell[0]]
    for e, ep_size, topk in cells:
        last = (e, ep_size, topk) == cells[-1]
        check(xp, the_layer, m, e, topk, atol, rtol, f"ep {ep_size}", ep_size=ep_size, last=last, **more)


@functools.lru_cache(maxsize=1)
def layer(kind, ms, n, k, activation="silu", **more):
    """The layer of a kind by name; kept, with its law, for the cells that follow."""
    return Layer(KINDS[kind], ms, n, k, activation, **more)


def shapes_of(shapes):
    """Shapes (m, n, k) in an order that keeps those with the same weights together, in one process as well."""
    params = [
        pytest.param(m, n, k, marks=pytest.mark.xdist_group(f"{n}-{k}"))
        for m, n, k in sorted(set(shapes), key=lambda shape: shape[1:] + shape[:1])
    ]
    return pytest.mark.parametrize(("m", "n", "k"), params)


def ms_of(shapes, n, k):
    """All m of the shapes with these weights."""
    return tuple(sorted({m for m, *weights in shapes if weights == [n, k]}))


def kinds(*names):
    """Kinds by name, before the shapes."""
    return pytest.mark.parametrize("kind", names)
