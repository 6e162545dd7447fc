"""Weights of layers in every layout but the documented one."""

import dataclasses
import functools
import itertools

import numpy as np
from quantised import Layer
from sides import on

import cumoe
from cumoe._weight_layout import stored_rows

GATED = ("up_gate", "gate_up_interleaved", "up_gate_interleaved")
PARTS = ("scale", "alpha_or_gscale", "zp", "bias")


def inverse(x):
    """Numbers whose reciprocals are `x`, to the bit."""
    guess = np.float32(1) / x
    for other in (guess, np.nextafter(guess, np.float32(0)), np.nextafter(guess, np.float32(np.inf))):
        guess = np.where(np.float32(1) / guess == x, guess, other)
    return guess


def nibbles(a):
    return cumoe.pack_int4(cumoe.unpack_int4(a)[..., [i ^ 1 for i in range(2 * a.shape[-1])]])


def one_less(config, zp):
    if zp is None:
        return None
    if config._w1.dtype == "int4":
        return cumoe.pack_int4((cumoe.unpack_int4(zp, -2) - np.uint8(1)) & 15, -2)
    return zp - np.uint8(1)


def swapped(a):
    return a.swapaxes(1, 2).copy() if a is not None and a.ndim == 3 else a


def ordered(array, order, activation, num_rows):
    """Rows in a stored order; zero points of two rows a byte are unpacked for it."""
    if array is None or array.ndim < 2 or array.shape[1] not in (num_rows, num_rows // 2):
        return array
    place = np.argsort(stored_rows(order, activation, num_rows))
    if array.dtype == np.uint8 and array.shape[1] == num_rows // 2:
        return cumoe.pack_int4(cumoe.unpack_int4(array, -2)[:, place], -2)
    return array[:, place] if array.shape[1] == num_rows else array


def edit(config, **parts):
    """A config with functions applied: ``w_scale=f`` to the scales of both weights, and so on."""
    descs = {}
    for name in ("_a1", "_a2", "_w1", "_w2"):
        wanted = {part: change for which, change in parts.items() for part in PARTS if which == f"{name[1]}_{part}"}
        desc = getattr(config, name)
        new = {part: change(getattr(desc, part)) for part, change in wanted.items() if getattr(desc, part) is not None}
        descs[name] = dataclasses.replace(desc, **new)
    return dataclasses.replace(config, **descs)


def stored(layer, activation, answers):
    """A layer in another layout."""
    w1, w2, config = layer
    num_rows = w1.shape[1]
    order = answers.get("gate_up_order")
    if order is not None:

        def move(a):
            return ordered(a, order, activation, num_rows)

        w1 = move(w1)
        if config is not None:
            desc = config._w1
            new = {part: move(getattr(desc, part)) for part in PARTS}
            if desc.shape is not None and desc.shape.row > 1 and desc.scale.ndim == 3:
                assert order == "up_gate"
                new["scale"] = np.concatenate(np.split(desc.scale, 2, axis=1)[::-1], axis=1)
            config = dataclasses.replace(config, _w1=dataclasses.replace(desc, **new))
    if answers.get("a_gscale") == "input_scale":
        config = edit(config, a_alpha_or_gscale=inverse)
    if answers.get("alphas") == "divide":
        config = edit(config, w_alpha_or_gscale=inverse)
    if answers.get("zero_points") == "minus_one":
        config = edit(config, w_zp=lambda zp: one_less(config, zp))
    if answers.get("zero_point_nibble_order") == "high_first":
        config = edit(config, w_zp=nibbles)
    if answers.get("scale_order") == "KN":
        config = edit(config, w_scale=swapped, w_zp=swapped)
    if answers.get("scale_order") == "swizzled":
        config = edit(config, w_scale=cumoe.swizzle_scales)
    if answers.get("nibble_order") == "high_first":
        w1, w2 = nibbles(w1), nibbles(w2)
    if answers.get("weight_order") == "KN":
        w1, w2 = swapped(w1), swapped(w2)
    return Layer(w1, w2, config)


def questions(layer, activation):
    """The wrong answers that a layer may have, by question."""
    w1, w2, config = layer
    found = {"weight_order": ["KN"]}
    if not activation.endswith("_no_mul"):
        found["gate_up_order"] = list(GATED)
        if activation == "swigluoai":
            found["gate_up_order"] = ["gate_up", "up_gate", "up_gate_interleaved"]
    if config is None or config._w1.dtype is None:
        return found
    desc = config._w1
    block = desc.shape is not None and desc.shape.row > 1
    if block and "gate_up_order" in found:
        found["gate_up_order"] = ["up_gate"]  # the others cut blocks: a test of its own
    packed = w1.shape[2] < w2.shape[1]
    if desc.scale.ndim == 3:
        found["scale_order"] = ["KN"] + ["swizzled"] * (desc.dtype in ("mxfp4", "nvfp4"))
    if packed:
        found["nibble_order"] = ["high_first"]
    if desc.zp is not None:
        found["zero_points"] = ["minus_one"]
        if packed:
            found["zero_point_nibble_order"] = ["high_first"]
    if desc.alpha_or_gscale is not None:
        found["alphas"] = ["divide"]
    if config._a1.alpha_or_gscale is not None:
        found["a_gscale"] = ["input_scale"]
    return found


def wrongs(layer, activation):
    """Every wrong answer, every two of them, and none."""
    singles = [(name, answer) for name, answers in questions(layer, activation).items() for answer in answers]
    yield {}
    yield from (dict([single]) for single in singles)
    yield from (dict(pair) for pair in itertools.combinations(singles, 2) if pair[0][0] != pair[1][0])


def arguments(xp, problem, layer):
    """Weights, and what else `detect_layout` takes."""
    config = layer.quant_config
    if config is not None:
        config = edit(config, **{f"{which}_{part}": functools.partial(on, xp) for which in "aw" for part in PARTS})
    probe = [on(xp, a) for a in (problem.hidden_states, problem.topk_weights, problem.topk_ids)]
    return on(xp, layer.w1), on(xp, layer.w2), probe, config
