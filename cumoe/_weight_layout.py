"""The layouts that the weights of a layer come in, and the way from each to the documented one."""

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

from cumoe import _arrays, _packing
from cumoe._act import is_gated, is_interleaved
from cumoe._arrays import Array
from cumoe._experts import weight_arrays
from cumoe._layer_scheme import is_quantised, weight_scheme
from cumoe._quant_config import FusedMoEQuantConfig
from cumoe._quant_desc import GroupShape
from cumoe._schemes import SCHEMES, Scheme
from cumoe.reference.act import ACTIVATIONS

_HALVES = ("gate_up", "up_gate")
_INTERLEAVED = ("gate_up_interleaved", "up_gate_interleaved")

# question -> what may be the answer, the documented one first; gate_up_order: `answers`
_ANSWERS = {
    "gate_up_order": (*_HALVES, *_INTERLEAVED),
    "weight_order": ("NK", "KN"),
    "scale_order": ("NK", "KN", "swizzled"),
    "nibble_order": ("low_first", "high_first"),
    "zero_point_nibble_order": ("low_first", "high_first"),
    "zero_points": ("plain", "minus_one"),
    "alphas": ("multiply", "divide"),
    "a_gscale": ("reciprocal", "input_scale"),
}


@dataclass(frozen=True)
class Layout:
    """
    In which layout weights are, as `detect_layout` found it.

    A question that does not arise, as that of scales where there are none, is None.

    Attributes
    ----------
    activation : str
        The activation; it says in which order gate and up rows are documented.
    gate_up_order : str or None
        Rows of `w1` and of all that goes with them: "gate_up" and "up_gate", two halves, or
        "gate_up_interleaved" and "up_gate_interleaved", row by row.
    weight_order : str
        Axes of both weights: "NK", (E, N, K) as documented, or "KN", (E, K, N).
    scale_order : str or None
        Axes of the weights' scales, and of their zero points: "NK" as documented, "KN", or "swizzled", scales
        in blocks of 128 x 4 (`swizzle_scales`).
    nibble_order : str or None
        Of two codes a byte, the one of the even place is "low_first", in the low bits, as documented, or
        "high_first".
    zero_point_nibble_order : str or None
        Of two zero points a byte: "low_first" as documented, or "high_first".
    zero_points : str or None
        "plain" as documented, or "minus_one": one less is stored, modulo 16 or 256.
    alphas : str or None
        Products are to "multiply" by `g1_alphas` and `g2_alphas`, as documented, or to "divide".
    a_gscale : str or None
        Global scales of the activations: "reciprocal" of the input scale as documented, or "input_scale".
    error : float
        Root mean square of what this layout gives less what was expected, over that of the latter.
    """

    activation: str
    gate_up_order: str | None = None
    weight_order: str = "NK"
    scale_order: str | None = None
    nibble_order: str | None = None
    zero_point_nibble_order: str | None = None
    zero_points: str | None = None
    alphas: str | None = None
    a_gscale: str | None = None
    error: float = 0.0

    @property
    def is_documented(self) -> bool:
        """Whether nothing is to be converted."""
        return not self.deviations

    @property
    def deviations(self) -> tuple[str, ...]:
        """The questions whose answer is not the documented one."""
        return tuple(name for name in _ANSWERS if getattr(self, name) not in (None, _documented(name, self.activation)))

    def __str__(self) -> str:
        return f"{self.answers}; relative rms error {self.error:.3g}"

    @property
    def answers(self) -> str:
        """The questions that arise and their answers, in one line."""
        listed = []
        for name in _ANSWERS:
            answer, documented = getattr(self, name), _documented(name, self.activation)
            if answer is not None:
                listed.append(f"{name} {answer}" + f" (documented: {documented})" * (answer != documented))
        return ", ".join(listed)

    @_arrays.on_callers_stream
    def convert(self, w1: Array, w2: Array, quant_config: Any = None) -> tuple[Array, Array, Any]:
        """
        Bring weights in this layout into the documented one.

        Parameters
        ----------
        w1, w2 : array
            Weights or codes, as `detect_layout` had them, or others in the same layout.
        quant_config : FusedMoEQuantConfig, optional
            Their config.

        Returns
        -------
        w1, w2 : array
            As `fused_experts` takes them. New arrays; those that are right already come back as they are.
        quant_config : FusedMoEQuantConfig or None
            With converted scales, zero points, alphas and biases, and no `is_scale_swizzled`. Scales of blocks
            whose gate and up rows were not in whole blocks come back one a row, with ``GroupShape(1, columns)``.

        Raises
        ------
        TypeError, ValueError
            Arrays that do not fit this layout.
        """
        own = weight_arrays(w1, w2, quant_config)
        side, inside = _arrays.enter(**own)
        arrays, quant_config = converted(side.xp, self, dict(zip(own, inside, strict=True)), quant_config)
        arrays = {name: None if array is None else side.leave(array) for name, array in arrays.items()}
        return arrays["w1"], arrays["w2"], _with_arrays(quant_config, arrays)


def answers(activation: str, arrays: dict[str, Array], quant_config: Any) -> dict[str, tuple[str, ...]]:
    """The questions that arise, and the answers to try, the documented one first."""
    found = {"weight_order": _ANSWERS["weight_order"]}
    if is_gated(activation):
        documented, rule = _documented("gate_up_order", activation), ACTIVATIONS[activation]
        orders = [documented, *(order for order in _ANSWERS["gate_up_order"] if order != documented)]
        if rule.gate == rule.up:  # it cannot matter which is which
            orders = [order for order in orders if order.startswith("gate_up")]
        found["gate_up_order"] = tuple(orders)
    if is_quantised(quant_config):
        rules = [_rule(which, arrays, quant_config) for which in (1, 2)]
        scales = [arrays["w1_scale"], arrays["w2_scale"]]
        if any(scale is not None and scale.ndim == 3 and scale.shape[1:] != (1, 1) for scale in scales):
            found["scale_order"] = _ANSWERS["scale_order"][: 3 if all(len(rule.groups) == 1 for rule in rules) else 2]
        has_zeros = any(arrays[name] is not None for name in ("w1_zp", "w2_zp"))
        arises = {
            "nibble_order": any(rule.is_packed for rule in rules),
            "zero_point_nibble_order": has_zeros and any(rule.is_packed for rule in rules),
            "zero_points": has_zeros,
            "alphas": any(arrays[name] is not None for name in ("g1_alphas", "g2_alphas")),
            "a_gscale": any(arrays[name] is not None for name in ("a1_gscale", "a2_gscale")),
        }
        found |= {name: _ANSWERS[name] for name, does in arises.items() if does}
    return found


def _documented(question: str, activation: str) -> str:
    if question == "gate_up_order" and is_gated(activation) and is_interleaved(activation):
        return _INTERLEAVED[0]
    return _ANSWERS[question][0]


def stored_rows(order: str, activation: str, num_rows: int) -> Any:
    """Where each documented row of w1 is stored."""
    rows = np.arange(num_rows)
    gate, up = np.split(rows, 2) if order in _HALVES else (rows[0::2], rows[1::2])
    if order.startswith("up_gate"):
        gate, up = up, gate
    return np.stack([gate, up], 1).reshape(-1) if is_interleaved(activation) else np.concatenate([gate, up])


def goes_by_half(arrays: dict[str, Array], quant_config: Any) -> bool:
    """Whether scales of w1 may name gate and up, so that what row they are of depends on the order of rows."""
    scale = arrays.get("w1_scale")
    if scale is None:
        return False
    group, (_, *sizes) = quant_config._w1.shape, arrays["w1"].shape  # either may be N
    if scale.ndim == 2:
        return scale.shape[1] == 2
    return _is_block(group, scale) and any(
        _begins_anew(down, group.row, num_rows) for down in scale.shape[1:] for num_rows in sizes
    )


def converted(
    xp: ModuleType, layout: Layout, arrays: dict[str, Array], quant_config: Any
) -> tuple[dict[str, Array], Any]:
    """The arrays of `weight_arrays` in the documented layout; their config with the group that w1 has then."""
    out = dict(arrays)
    if is_quantised(quant_config):  # the layout says how scales are stored, whatever the config says
        by_row = {f"_w{i}": replace(getattr(quant_config, f"_w{i}"), is_scale_swizzled=False) for i in (1, 2)}
        quant_config = replace(quant_config, **by_row)

    def change(names: tuple[str, ...], new: Any) -> None:
        out.update({name: new(out[name]) for name in names if out.get(name) is not None})

    if layout.weight_order == "KN":
        change(("w1", "w2"), _transposed)
    if layout.nibble_order == "high_first":
        packed = [f"w{i}" for i in (1, 2) if _rule(i, out, quant_config).is_packed]
        change(tuple(packed), _nibbles_swapped)
    if layout.scale_order == "KN":
        change(("w1_scale", "w2_scale", "w1_zp", "w2_zp"), lambda a: _transposed(a) if a.ndim == 3 else a)
    elif layout.scale_order == "swizzled":
        for i in (1, 2):
            rule, (_, num_rows, width) = _rule(i, out, quant_config), out[f"w{i}"].shape
            num_cols = -(-width * (1 + rule.is_packed) // rule.groups[0])
            out[f"w{i}_scale"] = _packing.unswizzle_scales(out[f"w{i}_scale"], num_rows, num_cols)
    zeros = ("w1_zp", "w2_zp")
    if layout.zero_point_nibble_order == "high_first":
        change(zeros, _nibbles_swapped)
    if layout.zero_points == "minus_one":
        is_packed = layout.zero_point_nibble_order is not None
        change(zeros, lambda a: (a + 1) & 15 | ((a >> 4) + 1) << 4 if is_packed else a + np.uint8(1))
    with np.errstate(divide="ignore"):
        if layout.alphas == "divide":
            change(("g1_alphas", "g2_alphas"), lambda a: 1 / a)
        if layout.a_gscale == "input_scale":
            change(("a1_gscale", "a2_gscale"), lambda a: 1 / a)
    if "gate_up_order" in layout.deviations:
        quant_config = _order_rows(xp, layout, out, quant_config)
    return out, quant_config


def _order_rows(xp: ModuleType, layout: Layout, out: dict[str, Array], quant_config: Any) -> Any:
    """Put the rows of w1 and of all that goes with them into the documented order, in `out`; their config."""
    num_rows = out["w1"].shape[1]
    if num_rows % 2:
        raise ValueError(f"w1 must have an even number of gate and up rows, got shape {tuple(out['w1'].shape)}")
    index = xp.asarray(stored_rows(str(layout.gate_up_order), layout.activation, num_rows))
    scale, zeros = out.get("w1_scale"), out.get("w1_zp")
    if scale is not None:
        group = quant_config._w1.shape
        out["w1_scale"], new = _scales_ordered(xp, layout, scale, group, num_rows, index)
        if new != group:
            quant_config = replace(quant_config, _w1=replace(quant_config._w1, shape=new))
    if zeros is not None:
        is_packed = layout.zero_point_nibble_order is not None
        by_row = _packing.unpacked(xp, zeros, -2) if is_packed else zeros
        if by_row.shape[1] != num_rows:
            raise ValueError(f"w1_zp must be of N = {num_rows} rows, got shape {tuple(zeros.shape)}")
        by_row = _taken(by_row, index)
        out["w1_zp"] = _packing.packed(xp, by_row, -2) if is_packed else by_row
    for name in ("w1", "w1_bias", "g1_alphas"):
        array = out.get(name)
        if array is not None and array.ndim > 1 and array.shape[1] == num_rows:
            out[name] = _taken(array, index)
    return quant_config


def _scales_ordered(
    xp: ModuleType, layout: Layout, scale: Array, group: GroupShape | None, num_rows: int, index: Array
) -> tuple[Array, GroupShape | None]:
    """Scales in the documented order of rows, and their group."""
    from_halves, to_halves = layout.gate_up_order in _HALVES, not is_interleaved(layout.activation)
    half = num_rows // 2
    if group is not None and _is_block(group, scale):
        anew = from_halves and _begins_anew(scale.shape[1], group.row, num_rows)
        if from_halves and to_halves and (anew or half % group.row == 0):  # whole blocks change places
            return _taken(scale, xp.roll(xp.arange(scale.shape[1]), scale.shape[1] // 2)), group
        if not anew and scale.shape[1] != -(-num_rows // group.row):
            raise ValueError(f"w1_scale must have ceil(N / {group.row}) rows, got shape {tuple(scale.shape)}")
        row = np.arange(num_rows)
        block = row % half // group.row + (row >= half) * (scale.shape[1] // 2) if anew else row // group.row
        return _taken(scale, xp.asarray(block)[index]), GroupShape(1, group.col)
    if scale.ndim == 2 and scale.shape[1] == 2 != num_rows:  # one a shard
        place = np.arange(num_rows) // half if from_halves else np.arange(num_rows) % 2
        by_row = _taken(scale, xp.asarray(place)[index])
        return (_taken(by_row, xp.asarray([0, half])) if to_halves else by_row), group
    return (_taken(scale, index) if scale.ndim > 1 and scale.shape[1] == num_rows else scale), group


def _is_block(group: GroupShape | None, scale: Array) -> bool:
    return group is not None and group.row > 1 and group.col >= 1 and scale.ndim == 3


def _begins_anew(down: int, block: int, num_rows: int) -> bool:
    """Whether `down` blocks are those of two halves of the rows, so that none is of both, and not those of all."""
    return down == 2 * -(-num_rows // 2 // block) != -(-num_rows // block)


def _rule(which: int, arrays: dict[str, Array], quant_config: FusedMoEQuantConfig) -> Scheme:
    name = f"w{which}"
    return SCHEMES[weight_scheme(name, getattr(quant_config, f"_w{which}").dtype, arrays[name])]


def _transposed(array: Array) -> Array:
    if array.ndim != 3:
        raise ValueError(f"weights and scales must have 3 axes to be transposed, got shape {tuple(array.shape)}")
    return _arrays.bits(array).swapaxes(1, 2).copy().view(array.dtype)


def _nibbles_swapped(array: Array) -> Array:
    return array << 4 | array >> 4


def _taken(array: Array, index: Array) -> Array:
    """Entries along axis 1, of a dtype that CuPy may not know."""
    return _arrays.bits(array).take(index, axis=1).view(array.dtype)


def _with_arrays(quant_config: Any, arrays: dict[str, Array]) -> Any:
    """The config with these arrays."""
    if quant_config is None:
        return None
    part = {
        **{f"_w{i}": {"scale": f"w{i}_scale", "alpha_or_gscale": f"g{i}_alphas", "zp": f"w{i}_zp"} for i in (1, 2)},
        **{f"_a{i}": {"scale": f"a{i}_scale", "alpha_or_gscale": f"a{i}_gscale"} for i in (1, 2)},
    }
    for i in (1, 2):
        part[f"_w{i}"]["bias"] = f"w{i}_bias"
    descs = {
        desc: replace(getattr(quant_config, desc), **{to: arrays[name] for to, name in names.items() if name in arrays})
        for desc, names in part.items()
    }
    return replace(quant_config, **descs)
