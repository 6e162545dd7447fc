"""
A quantisation config taken apart: the format of each weight, and how the rows before each product are quantised.

Scales that do not change along K become factors of the sums, so that codes are multiplied exactly; the others stay with
the codes. Everything is checked against the shapes of the weights here, once.
"""

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from cumoe import _arrays, _check, _packing
from cumoe._arrays import Array
from cumoe._quant_config import FusedMoEQuantConfig
from cumoe._quant_desc import DType, FusedMoEQuantDesc, GroupShape, dtype_name
from cumoe._schemes import DTYPES, SCHEMES
from cumoe._weight_format import WeightFormat

_SCHEME_OF = {
    "float8_e4m3fn": "fp8",
    "fp8": "fp8",
    "int8": "int8",
    "int4": "int4",
    "mxfp4": "mxfp4",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
}
_OF_ROWS = {name: scheme for name, scheme in _SCHEME_OF.items() if scheme != "int4"}
_FIXED_GROUP = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
_OF_WEIGHTS = ("w1_scale", "w2_scale", "w1_zp", "w2_zp", "g1_alphas", "g2_alphas")
_OF_ACTIVATIONS = ("a1_scale", "a2_scale", "a1_gscale", "a2_gscale")
_E8M0, _E4M3 = "float8_e8m0fnu", "float8_e4m3fn"
_PART = 64  # columns that a group of rows is a multiple of, if its scale meets the sum of the group


class Rows(NamedTuple):
    """How the rows before a product are quantised."""

    scheme: str
    cols: int  # of a group of a row, -1 for all
    per_tensor: bool
    scale: Array  # float32 (1,): static; or None
    global_scale: Array  # float32 (1,) or (E,), of nvfp4; or None
    in_parts: bool = False  # scales of groups meet the sums of their groups, and numbers are codes
    as_bytes: bool = False  # numbers are int8

    @property
    def is_batch_wide(self) -> bool:
        """Whether a token's bits depend on the other tokens."""
        return self.per_tensor and self.scale is None

    @property
    def are_integers(self) -> bool:
        """Whether numbers are integers of eight bits, and their scales factors of the sums."""
        return self.scheme == "int8" and self.cols == -1

    @property
    def is_by_expert(self) -> bool:
        """Whether each expert has its own global scale."""
        return self.global_scale is not None and len(self.global_scale) > 1


class Weight(NamedTuple):
    """A quantised weight beside its codes."""

    format: WeightFormat
    factor: Array  # float32 (E, N), (E, 1) or (0, 0)


class Scheme(NamedTuple):
    """The four operands of a layer; rows are None where they stay as they are."""

    w1: Weight
    w2: Weight
    a1: Rows | None
    a2: Rows | None

    @property
    def is_packed(self) -> bool:
        """Whether a weight lies in panels that only some kernels read."""
        return self.w1.format.panels is not None or self.w2.format.panels is not None

    @property
    def code_bits(self) -> int:
        """Bits of a code of the first weight."""
        return 4 if SCHEMES[self.w1.format.rule].is_packed else 8

    def for_kernel(self, room: ModuleType, kernel: str, hidden_size: int, intermediate_size: int) -> "Scheme":
        """The scheme as a kernel of `room` multiplies it: in parts, and rows as bytes, where it can do that."""
        w1, a1 = _for_kernel(room, kernel, self.w1, self.a1, hidden_size)
        w2, a2 = _for_kernel(room, kernel, self.w2, self.a2, intermediate_size)
        return Scheme(w1, w2, a1, a2)


def _for_kernel(room: ModuleType, kernel: str, weight: Weight, rows: Rows | None, k: int) -> tuple[Weight, Rows | None]:
    if rows is None:
        return weight, None
    if rows.are_integers:
        return weight, rows._replace(as_bytes=room.takes_bytes(weight.format, k, kernel))
    if not _has_parts(rows) or not room.scales_parts(weight.format, rows.cols, kernel):
        return weight, rows
    return weight._replace(format=weight.format._replace(row_cols=rows.cols)), rows._replace(in_parts=True)


def _has_parts(rows: Rows) -> bool:
    """Whether scales of groups are any float32, so that numbers that hold them are rounded, and of enough columns."""
    return rows.cols > 0 and rows.cols % _PART == 0 and rows.scheme not in _FIXED_GROUP


def is_quantised(quant_config: Any) -> bool:
    """Whether a config quantises anything; raise if it is no config."""
    if quant_config is None:
        return False
    if not isinstance(quant_config, FusedMoEQuantConfig):
        raise TypeError(f"quant_config must be a FusedMoEQuantConfig, got {type(quant_config).__name__}")
    descs = quant_config._a1, quant_config._a2, quant_config._w1, quant_config._w2
    return any(desc.dtype is not None for desc in descs)


def parts(quant_config: FusedMoEQuantConfig) -> dict[str, Array]:
    """The arrays of a config beside its biases, by name."""
    return {name: getattr(quant_config, name) for name in _OF_WEIGHTS + _OF_ACTIVATIONS}


def logical_shape(name: str, codes: Array, desc: FusedMoEQuantDesc, letters: str) -> tuple[int, int, int]:
    """(E, N, K) of codes, which may share bytes; check their dtype."""
    _check.ndim(name, codes, letters, 3)
    scheme = weight_scheme(name, desc.dtype, codes)
    rule = SCHEMES[scheme]
    _check.dtype(name, codes, tuple(dict.fromkeys((rule.codes.name, "uint8"))))
    experts, n, k = codes.shape
    return experts, n, k * 2 if rule.is_packed else k


def weight_scheme(name: str, dtype: DType, codes: Array) -> str:
    """Scheme that a weight's number format stands for; bytes of int8 are unsigned in the files of some schemes."""
    if dtype is None:
        raise ValueError(f"quant_config must say how {name} is quantised; it quantises other operands only")
    scheme = _known(_SCHEME_OF, name, dtype)
    return "uint8" if scheme == "int8" and codes.dtype.name == "uint8" else scheme


def rows_of(which: int, desc: FusedMoEQuantDesc, arrays: dict[str, Array], num_experts: int) -> Rows | None:
    """How the rows before product `which` are quantised."""
    scale, gscale = arrays[f"a{which}_scale"], arrays[f"a{which}_gscale"]
    if desc.is_scale_swizzled:
        raise ValueError(f"a{which} must have is_scale_swizzled False: it is of weights, got True")
    if desc.dtype is None:
        for name, array in ((f"a{which}_scale", scale), (f"a{which}_gscale", gscale)):
            if array is not None:
                raise ValueError(f"{name} must be None for activations that are not quantised")
        return None
    scheme, cols, per_tensor = _kind_of_rows(which, desc)
    if scale is not None:
        name = f"a{which}_scale"
        if not per_tensor:
            raise ValueError(
                f"{name} must be None: only one scale a tensor can be static, this one is found for each row"
            )
        _check.dtype(name, scale, DTYPES)
        if scale.size != 1:
            raise ValueError(f"{name} must have one element, got shape {tuple(scale.shape)}; take the largest")
        scale = _arrays.bits(scale.reshape(1).astype(np.float32, copy=False))
    name = f"a{which}_gscale"
    if scheme == "nvfp4":
        _check.given(name, gscale)
        _check.dtype(name, gscale, ("float32",))
        if gscale.size != 1:
            _check.shape(name, gscale, "(1,) or (E,)", (num_experts,))
        gscale = _arrays.bits(gscale.reshape(-1))
    elif gscale is not None:
        raise ValueError(f"{name} must be None for {scheme!r}")
    return Rows(scheme, cols, per_tensor, scale, gscale)


def planned_rows(which: int, desc: FusedMoEQuantDesc) -> Rows | None:
    """`rows_of` for a plan: the arrays, if there are any, are not looked at; in parts wherever a kernel may do that."""
    if desc.dtype is None:
        return None
    gscale = desc.alpha_or_gscale
    rows = Rows(*_kind_of_rows(which, desc), desc.scale, None if gscale is None else gscale.reshape(-1))
    return rows._replace(in_parts=_has_parts(rows))


def _kind_of_rows(which: int, desc: FusedMoEQuantDesc) -> tuple[str, int, bool]:
    """Scheme, columns of a group, and whether one scale serves all rows."""
    scheme = _known(_OF_ROWS, f"activations of product {which}", desc.dtype)
    shape = GroupShape.PER_TENSOR if desc.shape is None else desc.shape
    per_tensor = shape.is_per_tensor() and scheme not in _FIXED_GROUP
    return scheme, _FIXED_GROUP.get(scheme, int(shape.col)), per_tensor


def code_bits(desc: FusedMoEQuantDesc) -> int:
    """Bits of a code of a weight."""
    return 4 if SCHEMES[_known(_SCHEME_OF, "a weight", desc.dtype)].is_packed else 8


def bits_of_weight(desc: FusedMoEQuantDesc) -> float:
    """Bits that an element of a weight takes, with its share of the scales; those of one scale a row or more not."""
    scheme = _known(_SCHEME_OF, "a weight", desc.dtype)
    cols = _FIXED_GROUP.get(scheme, desc.shape.col if desc.shape is not None and desc.shape.col > 0 else 0)
    rows = desc.shape.row if desc.shape is not None and desc.shape.row > 1 else 1
    shared = (8 if scheme in _FIXED_GROUP else 16 if scheme == "int4" else 32) / (cols * rows) if cols else 0
    return code_bits(desc) + shared


def weight_of(
    xp: ModuleType,
    which: int,
    codes: Array,
    desc: FusedMoEQuantDesc,
    arrays: dict[str, Array],
    shape: tuple[int, int, int],
    has_halves: bool,
    rows_before: Rows | None,
) -> Weight:
    """Format and factor of weight `which`, whose gate and up rows may be two halves; it meets `rows_before`."""
    scheme = weight_scheme(f"w{which}", desc.dtype, codes)
    scale, zeros, alphas = (arrays[name] for name in (f"w{which}_scale", f"w{which}_zp", f"g{which}_alphas"))
    name = f"w{which}_scale"
    _check.given(name, scale)
    ones = xp.ones(shape[0], np.float32)
    if scheme in _FIXED_GROUP:
        if zeros is not None:
            raise ValueError(f"w{which}_zp must be None for {scheme!r}")
        cols = _FIXED_GROUP[scheme]
        _check.dtype(name, scale, tuple(dict.fromkeys((*SCHEMES[scheme].scales, "uint8"))))
        scale = _by_row(xp, name, scale, desc.is_scale_swizzled, shape, cols)
        if scheme == "nvfp4":
            _check.given(f"g{which}_alphas", alphas)
        stored = WeightFormat(scheme, _arrays.bits(scale), "uint8", None, ones, 1, cols)
        return Weight(stored, _with_alphas(xp, which, xp.empty((0, 0), np.float32), alphas, shape))
    if desc.is_scale_swizzled:
        raise ValueError(f"{name} must not be swizzled for {scheme!r}; available: {', '.join(_FIXED_GROUP)}")
    scale = _floats(xp, name, scale, scheme)
    factor, scale, rows, cols = _placed(xp, name, scale, desc.shape, shape, has_halves)
    zero_points = None
    if zeros is not None:
        zero_points = _zero_points(xp, which, scheme, zeros, shape, cols)
        if scale is None:  # numbers are codes above their zero points
            scale, rows, cols = xp.ones(zero_points.shape, np.float32), 1, -(-shape[2] // zero_points.shape[2])
        elif rows != 1:
            raise ValueError(f"w{which}_zp must be None for scales of {rows} rows")
    if scale is None:
        scale, rows, cols = xp.ones((shape[0], 1, 1), np.float32), shape[1], shape[2]
    integers = rows_before is not None and rows_before.are_integers
    stored = WeightFormat(scheme, _arrays.bits(scale), "float32", zero_points, ones, int(rows), int(cols), integers)
    return Weight(stored, _with_alphas(xp, which, factor, alphas, shape))


def _known(names: dict[str, str], what: str, dtype: DType) -> str:
    found = names.get(dtype_name(dtype) or "")
    if found is None:
        raise NotImplementedError(f"no kernel for {what} in {dtype_name(dtype)!r}; available: {', '.join(names)}")
    return found


def _by_row(
    xp: ModuleType, name: str, scale: Array, is_swizzled: bool, shape: tuple[int, int, int], cols: int
) -> Array:
    """Scales of groups of `cols`, (E, N, Kb), which may come in blocks of 128 x 4."""
    expected, letters = (*shape[:2], -(-shape[2] // cols)), f"(E, N, ceil(K / {cols}))"
    padded = shape[0], *_packing.swizzled_sizes(*expected[1:])
    if is_swizzled:
        _check.shape(name, scale, f"(E, 128 ceil(N / 128), 4 ceil(K / {4 * cols}))", padded)
        return _packing.unswizzled(xp, scale, *expected[1:])
    if tuple(scale.shape) == padded != expected:
        raise ValueError(
            f"{name} must have shape {letters} = {expected}, got {padded}; "
            "these look swizzled, which is_weight_scale_swizzled=True says"
        )
    _check.shape(name, scale, letters, expected)
    return scale


def _floats(xp: ModuleType, name: str, scale: Array, scheme: str) -> Array:
    """Scales as float32, which holds all of their formats."""
    allowed = {"fp8": ("float32", _E8M0, "uint8"), "int4": (*DTYPES, _E4M3)}.get(scheme, DTYPES)
    _check.dtype(name, scale, allowed)
    if scale.dtype.name in (_E8M0, "uint8"):
        exponent = _arrays.bits(scale).astype(np.int32)
        return xp.where(exponent == 255, np.float32(np.nan), xp.ldexp(xp.float32(1), exponent - 127))
    if scale.dtype.name == _E4M3:
        codes = _arrays.bits(scale).reshape(1, 1, -1)
        out, one = xp.empty(codes.shape, np.float32), xp.ones((1, 1, 1), np.float32)
        decode = _arrays.room(xp, "formats").decode
        decode(codes, one, "float32", None, one.reshape(1), 1, codes.size, "fp8", "float32", out)
        return out.reshape(scale.shape)
    return _arrays.bits(scale.astype(np.float32, copy=False))


def _placed(
    xp: ModuleType, name: str, scale: Array, group: GroupShape | None, shape: tuple[int, int, int], has_halves: bool
) -> tuple[Array, Array, int, int]:
    """Where scales apply: the factor of the sums, or empty; scales of groups, or None; rows and columns of a group."""
    experts, n, k = shape
    got, none = tuple(scale.shape), xp.empty((0, 0), np.float32)
    if group is not None and group.row > 1 and group.col >= 1:
        rows, cols = group
        across = -(-k // cols)
        expected = (experts, -(-n // rows), across)
        halves = (experts, 2 * -(-n // 2 // rows), across)
        if got == halves != expected and has_halves:  # the blocks of the up rows begin anew
            scale = xp.concatenate([_repeated(xp, half, rows, n // 2) for half in xp.split(scale, 2, axis=1)], axis=1)
            rows = 1
        elif got != expected:
            _check.shape(name, scale, f"(E, ceil(N / {rows}), ceil(K / {cols}))", expected)
        if across == 1:
            return _repeated(xp, scale, rows, n)[:, :, 0], None, 0, 0
        return none, scale, rows, cols
    if got in ((experts,), (experts, 1), (experts, 1, 1)) and got != (experts, n):
        return scale.reshape(experts, 1), None, 0, 0
    if got in ((experts, n), (experts, n, 1)):
        return scale.reshape(experts, n), None, 0, 0
    if got == (experts, 2) and has_halves:
        return xp.repeat(scale, n // 2, axis=1), None, 0, 0
    if group is not None and group.col >= 1:
        _check.shape(name, scale, f"(E, N, ceil(K / {group.col}))", (experts, n, -(-k // group.col)))
        return none, scale, 1, group.col
    if len(got) == 3 and got[:2] == (experts, n) and got[2] >= 1 and k % got[2] == 0:
        return none, scale, 1, k // got[2]
    raise ValueError(
        f"{name} must be (E,), (E, N), (E, N, 1) or (E, N, K / group) with E={experts}, N={n}, K={k}, got {got}"
    )


def _repeated(xp: ModuleType, scale: Array, rows: int, n: int) -> Array:
    """The scale of each of `n` rows."""
    return scale if rows == 1 else xp.repeat(scale, rows, axis=1)[:, :n]


def _zero_points(
    xp: ModuleType, which: int, scheme: str, zeros: Array, shape: tuple[int, int, int], cols: int
) -> Array:
    """Zero points one a byte, (E, N, Kb)."""
    name, (experts, n, k) = f"w{which}_zp", shape
    if scheme not in ("int4", "uint8"):
        raise ValueError(f"{name} must be None for {scheme!r} codes; zero points go with unsigned ones")
    _check.dtype(name, zeros, ("uint8",))
    across = -(-k // cols) if cols else 1
    if scheme == "uint8":
        _check.shape(name, zeros, "(E, N, K / group)", (experts, n, across))
        return _arrays.bits(zeros)
    _check.shape(name, zeros, "(E, N / 2, K / group)", (experts, n // 2, across))
    return _packing.unpacked(xp, zeros, -2).reshape(experts, n, across)


def _with_alphas(xp: ModuleType, which: int, factor: Array, alphas: Array, shape: tuple[int, int, int]) -> Array:
    """The factor times the alphas of the product, one an expert or one a row of the weight."""
    if alphas is None:
        return _arrays.bits(factor)
    name, (experts, n, _) = f"g{which}_alphas", shape
    _check.dtype(name, alphas, ("float32",))
    if tuple(alphas.shape) not in ((experts,), (experts, 1), (experts, n), (experts, n, 1)):
        raise ValueError(f"{name} must be (E,) or (E, N) with E={experts}, N={n}, got shape {tuple(alphas.shape)}")
    alphas = alphas.reshape(experts, -1)
    return _arrays.bits(factor * alphas if factor.size else alphas)
