"""Finding the layout of weights by what a few tokens give."""

import itertools
import numbers
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from cumoe import _arrays, _check
from cumoe._arrays import Array
from cumoe._experts import make_experts
from cumoe._law import enter_compared, host, host_rows, needs_all_tokens, used_experts
from cumoe._layer_scheme import is_quantised, planned_rows
from cumoe._layout_probe import Misfit, Probe, misfits
from cumoe._weight_layout import Layout, answers, converted
from cumoe.reference.experts import local_experts

# two layouts explain a probe equally well if their errors are within this factor
_FACTOR = 2.0
# one token may rule out what is this far behind the best
_FIRST_FACTOR = 2 * _FACTOR
# errors of float64 arithmetic and of a float32 `expected` are all the same
_FLOOR = 2.0**-24
# what rounding the rows of both products to the coarsest format, e2m1, costs; a right layout differs in few codes
_MOST = 0.15
# nothing explains a probe of which the first token leaves more than this: 1 is what zeros leave
_HOPELESS = 0.5
_TOKENS, _COLUMNS = 16, 64
# what decides whether a layout fits the shapes
_SHAPING = ("weight_order", "scale_order", "gate_up_order")


@_arrays.on_callers_stream
def detect_layout(
    w1: Array,
    w2: Array,
    hidden_states: Array,
    topk_weights: Array,
    topk_ids: Array,
    expected: Array,
    *,
    activation: str = "silu",
    quant_config: Any = None,
    apply_router_weight_on_input: bool | str = False,
    expert_map: Array | None = None,
    tolerance: float | None = None,
) -> Layout:
    """
    Find out in which layout weights are, from what a trusted implementation computed with them.

    Parameters
    ----------
    w1, w2 : array
        Weights or codes of both products, in any layout that `Layout` describes.
    hidden_states, topk_weights, topk_ids
        A probe as for `fused_experts`: a few tokens of random numbers, k = 1 is enough.
    expected : (T, H) array, float32, float16, bfloat16 or float64
        What they give.
    activation : str, default "silu"
        As for `fused_experts`.
    quant_config : FusedMoEQuantConfig, optional
        As for `fused_experts`, with scales, zero points, alphas and biases as they come with the weights. Whether
        scales are in blocks of 128 x 4 is found, whatever it says.
    apply_router_weight_on_input, expert_map
        As for `fused_experts`.
    tolerance : float, optional
        Largest relative rms error of a layout that explains the probe. By default what the error bound of that
        layout allows, at most 0.15.

    Returns
    -------
    Layout
        Whose `convert` brings these weights into the layout that `fused_experts` takes.

    Raises
    ------
    TypeError
        Arrays of two libraries, or a dtype outside the lists.
    ValueError
        Arguments that fit each other in no layout, a probe that no layout explains, or one that two
        explain equally well.

    See Also
    --------
    verify : Judge a result at the bound of each element.

    Notes
    -----
    Every combination of the questions in `Layout` that arise and that the shapes leave open is computed in
    float64 by `cumoe.reference`. Both weights have one answer. Biases, scales, zero points and alphas of `w1` have
    the order of its rows.

    A wrong layout gives numbers that have little to do with `expected`, a relative rms error of 0.6 or more with
    random weights; the subtlest, zero points of bytes that are one off, a few hundredths. A right one is within its
    forward error bound, whose rms over that of `expected` is the default tolerance: 0.004 to 0.04 of plain
    float32 weights, 0.08 and more of bfloat16 ones. It is at most 0.15, what rounding the rows of both
    products to four bits costs: computations of one layout differ in few codes only, by 0.005 with bfloat16
    activations and up to 0.05 with quantised ones. Pass a `tolerance` if `expected` was computed in a format
    coarser than that of the tokens, or without quantising them.

    The least error decides. The next must be more than twice as large, unless both layouts come to the same
    arrays: then the one nearer to the documented layout is returned.

    One token and 64 columns rule out most combinations; up to 16 tokens and all columns decide between the
    others. Where one scale serves a batch of activations, all tokens are computed. The time is that of decoding the
    experts of one token once for each combination of answers, those on gate and up rows aside. Of arrays on a
    device, the experts that are used are copied to the host.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> rng = np.random.default_rng(0)
    >>> x, w1, w2 = (rng.standard_normal(s, np.float32) for s in ((4, 16), (3, 24, 16), (3, 16, 12)))
    >>> weights, ids = cumoe.fused_topk(rng.standard_normal((4, 3), np.float32), 2)
    >>> expected = cumoe.fused_experts(x, w1, w2, weights, ids)
    >>> stored = np.concatenate([w1[:, 12:], w1[:, :12]], axis=1)
    >>> layout = cumoe.detect_layout(stored, w2, x, weights, ids, expected)
    >>> layout.answers
    'gate_up_order up_gate (documented: gate_up), weight_order NK'
    >>> found, _, _ = layout.convert(stored, w2)
    >>> bool((found == w1).all())
    True
    """
    if tolerance is not None:
        _check_tolerance(tolerance)
    given = enter_compared(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        expert_map,
        quant_config,
        apply_router_weight_on_input,
        expected=expected,
    )
    side, own = given.side, given.own
    for name, array in (("w1", own["w1"]), ("w2", own["w2"])):
        _check.ndim(name, array, "(E, N, K) or (E, K, N)", 3)
    _check.dtype("hidden_states", given.x, ("float32", "float16", "bfloat16"))
    _check.shape("expected", given.result, "(T, H)", tuple(given.x.shape))
    _check.dtype("expected", given.result, ("float32", "float16", "bfloat16", "float64"))
    expected, x, weights, ids, expert_map = (host(array) for array in given[2:])
    num_experts = _num_experts(own)
    tokens = _tokens(ids, expert_map, expected, num_experts)
    if _needs_all_tokens(quant_config, apply_router_weight_on_input):
        tokens = np.arange(len(x))
    elif len(tokens) > _TOKENS:
        tokens = tokens[np.linspace(0, len(tokens) - 1, _TOKENS).astype(int)]
    used, expert_map = used_experts(ids[tokens], expert_map, num_experts)
    probe = Probe(
        x,
        weights,
        ids,
        expert_map,
        expected.astype(np.float64),
        {name: _of_experts(name, array, used, num_experts) for name, array in own.items()},
        quant_config,
        activation,
        apply_router_weight_on_input,
    )
    layouts = _fitting(probe)
    if not layouts:
        make_experts(side.xp, own, activation, quant_config, given.x)  # says what does not fit
    found = _search(probe, layouts, tokens, tolerance)
    closest = min(found, key=lambda layout: found[layout].error)
    limit = min(found[closest].bound, _MOST) if tolerance is None else tolerance
    if not found[closest].error <= limit:
        raise ValueError(
            f"expected must be what a layout gives, to a relative rms error of {limit:.3g}, got "
            f"{found[closest].error:.3g} from the closest of {len(layouts)}: {closest.answers}; "
            "is it of these weights, this activation and this quant_config?"
        )
    for layout in found:
        if found[layout].error > _FACTOR * max(found[closest].error, _FLOOR) or layout == closest:
            continue
        if not _come_to_the_same(side.xp, own, quant_config, closest, layout):
            raise ValueError(
                f"expected must tell layouts apart, got relative rms errors of {found[closest].error:.3g} and "
                f"{found[layout].error:.3g}, within a factor of {_FACTOR:g}, from {closest.answers} and from "
                f"{layout.answers}; give another probe, tokens of random numbers that reach all experts"
            )
        closest = min(closest, layout, key=lambda one: len(one.deviations))
    return replace(closest, error=found[closest].error)


def _check_tolerance(tolerance: Any) -> None:
    if isinstance(tolerance, bool) or not isinstance(tolerance, numbers.Real):
        raise TypeError(f"tolerance must be a number, got {type(tolerance).__name__}")
    if not float(tolerance) > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance}")


def _num_experts(own: dict[str, Any]) -> int:
    """E, which both weights and all that goes with them begin with."""
    num_experts = len(own["w1"])
    for name, array in own.items():
        if array is not None and name[0] in "wg" and array.shape[:1] != (num_experts,):
            raise ValueError(f"{name} must begin with E = {num_experts} of w1, got shape {tuple(array.shape)}")
    return num_experts


def _tokens(ids: Any, expert_map: Any, expected: Any, num_experts: int) -> Any:
    """The tokens that choose an expert."""
    if not np.isfinite(expected.astype(np.float64)).all():
        raise ValueError("expected must be finite; leave out the tokens that are not")
    tokens = np.flatnonzero((local_experts(ids, num_experts, expert_map) >= 0).any(axis=1))
    if not len(tokens):
        raise ValueError("topk_ids must choose an expert of w1 for at least one token")
    if not expected[tokens].astype(bool).any():
        raise ValueError("expected must have numbers other than 0 for tokens that choose an expert")
    return tokens


def _needs_all_tokens(quant_config: Any, on_input: bool | str) -> bool:
    """Whether a scale of the second product, or one after the router weights, depends on all tokens."""
    if not is_quantised(quant_config):
        return False
    a1, a2 = planned_rows(1, quant_config._a1), planned_rows(2, quant_config._a2)
    return needs_all_tokens(a1, a2, on_input)


def _of_experts(name: str, array: Any, used: Any, num_experts: int) -> Any:
    """The part of some experts, on the host; what is not by expert is whole."""
    is_by_expert = name[0] in "wg" or (name.endswith("gscale") and array is not None and array.size == num_experts > 1)
    return host_rows(array, used) if is_by_expert else host(array)


def _fitting(probe: Probe) -> list[Layout]:
    """The layouts that fit the shapes, those nearest to the documented one first."""
    questions = answers(probe.activation, probe.arrays, probe.quant_config)
    num_experts, one = len(probe.arrays["w1"]), np.arange(1)
    part = {name: _of_experts(name, array, one, num_experts) for name, array in probe.arrays.items()}
    first: dict[str, Any] = {name: options[0] for name, options in questions.items()}
    shaping = {name: questions.pop(name) for name in _SHAPING if name in questions}
    found = []
    for chosen in _combinations(shaping):
        layout = Layout(probe.activation, **(first | chosen))
        try:
            probe._replace(arrays=part).experts(layout)
        except ValueError:
            continue
        found += [replace(layout, **others) for others in _combinations(questions)]
    return sorted(found, key=lambda layout: len(layout.deviations))


def _combinations(questions: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    return [dict(zip(questions, chosen, strict=True)) for chosen in itertools.product(*questions.values())]


def _search(probe: Probe, layouts: list[Layout], tokens: Any, tolerance: float | None) -> dict[Layout, Misfit]:
    """How far off the layouts are that one token does not rule out; of many that are all wrong, the closest only."""
    choices = (local_experts(probe.topk_ids, len(probe.arrays["w1"]), probe.expert_map) >= 0).sum(axis=1)
    first = tokens
    if not _needs_all_tokens(probe.quant_config, probe.on_input):
        telling = tokens[probe.expected[tokens].any(axis=1)]
        first = telling[np.argmin(choices[telling])][None]
    columns = np.flatnonzero(probe.expected[first].any(axis=0))
    columns = columns[np.unique(np.linspace(0, len(columns) - 1, _COLUMNS).astype(int))]
    found = dict(zip(layouts, misfits(probe, layouts, first, columns), strict=True))
    least = min(one.error for one in found.values())
    left = [layout for layout in layouts if found[layout].error <= _FIRST_FACTOR * max(least, _FLOOR)]
    if not least <= max(_HOPELESS, tolerance or 0):
        left = [next(layout for layout in layouts if found[layout].error == least)]
    every = np.arange(probe.expected.shape[1])
    return dict(zip(left, misfits(probe, left, tokens, every), strict=True))


def _come_to_the_same(xp: ModuleType, own: dict[str, Any], quant_config: Any, one: Layout, other: Layout) -> bool:
    """Whether two layouts give the same arrays, those of experts outside the probe too."""
    num_experts = len(own["w1"])
    for e in range(num_experts):
        part = {name: _expert(name, array, e, num_experts) for name, array in own.items()}
        arrays, others = (converted(xp, layout, part, quant_config)[0] for layout in (one, other))
        for name, array in arrays.items():
            if array is not others[name] and not _are_equal(xp, array, others[name]):
                return False
    return True


def _expert(name: str, array: Any, e: int, num_experts: int) -> Any:
    """The part of an expert, where it lies."""
    if array is None or (name[0] == "a" and array.size != num_experts):
        return array
    return array[e : e + 1]


def _are_equal(xp: ModuleType, one: Any, other: Any) -> bool:
    if one.shape != other.shape:
        return False
    one, other = (_arrays.bits(array).view(f"u{array.itemsize}") for array in (one, other))
    return bool((one == other).all())
