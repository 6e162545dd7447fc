"""Weights in the order in which the kernels read them, made once and used by every call."""

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, cast

from cumoe import _arrays, _dlpack
from cumoe._arrays import Array
from cumoe._experts import Experts, make_experts, weight_arrays
from cumoe._kernel_choice import choose_kernel
from cumoe._layer_scheme import Scheme


@dataclass(frozen=True, eq=False)
class PreparedExperts:
    """
    The weights of an MoE layer, packed for one kernel of one side; made by `prepare`.

    Accepted wherever `w1` and `w2` are: ``fused_experts(x, prepared, None, ...)``. The bits of the
    results are those of the unpacked weights.

    Attributes
    ----------
    num_experts, hidden_size, intermediate_size : int
        E, H and I.
    activation : str
        Activation that the layer applies.
    kernel : str
        Kernel that the layout is for. On the GPU all kernels share one layout: a call that this one
        cannot serve takes the next.
    dtype : str
        What the packed words mean.
    device : str
        Where they are: "cpu", "cuda:0" and so on.
    """

    experts: Experts
    _recorded: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)  # of `_recorded`

    @property
    def num_experts(self) -> int:
        """E, the experts held here."""
        return self.experts.num_experts

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.experts.hidden_size

    @property
    def intermediate_size(self) -> int:
        """I."""
        return self.experts.intermediate_size

    @property
    def activation(self) -> str:
        """Activation that the layer applies."""
        return self.experts.activation

    @property
    def kernel(self) -> str:
        """Kernel that the layout is for."""
        return self.experts.kernel

    @property
    def dtype(self) -> str:
        """Name of the weights' dtype."""
        return self.experts.dtype

    @property
    def device(self) -> str:
        """Where the packed weights are."""
        return _arrays.place(self.experts.w1)

    @property
    def nbytes(self) -> int:
        """Bytes of both packed weights."""
        return int(self.experts.w1.nbytes + self.experts.w2.nbytes)

    def __repr__(self) -> str:
        e = self.experts
        return (
            f"PreparedExperts(E={e.num_experts}, H={e.hidden_size}, I={e.intermediate_size}, {e.dtype}, "
            f"{e.activation!r}, kernel={e.kernel!r}, {self.nbytes / 1e6:.1f} MB)"
        )


_dlpack.WITHOUT_TENSORS.add(PreparedExperts)


@_arrays.on_callers_stream
def prepare(
    w1: Array,
    w2: Array,
    *,
    quant_config: Any = None,
    activation: str = "silu",
    device: str | None = None,
    out: PreparedExperts | None = None,
    backend: str | None = None,
) -> PreparedExperts:
    """
    Pack the weights of an MoE layer for the kernels, once.

    Parameters
    ----------
    w1 : (E, 2I, H) array, float32, float16 or bfloat16
        Gate rows 0..I-1, then up rows I..2I-1, for each expert; gate rows even and up rows odd for an
        interleaved activation; (E, I, H) for an activation without gate. Any strides.
    w2 : (E, H, I) array
        Of the dtype of `w1`.
    quant_config : FusedMoEQuantConfig, optional
        Number formats, scales, biases, and the parameters of the activation.
    activation : str, default "silu"
        Name of an activation; decides how the rows of `w1` pair up.
    device : {"cpu", "cuda", "cuda:0", ...}, optional
        Where the packed weights live; the arrays must be there already.
    out : PreparedExperts, optional
        Made by an earlier call for weights of the same shapes: its memory is filled again (new weights
        under captured graphs and live references) and `out` is returned.
    backend : str, optional
        Name of the kernel to pack for, as in `fused_experts`; default: that of `out`, else the fastest.

    Returns
    -------
    PreparedExperts
        Owns its memory; `w1` and `w2` may be freed.

    Raises
    ------
    TypeError, ValueError
        Arrays that do not fit each other.
    NotImplementedError
        A number format without a kernel, or a `backend` that cannot run here.

    Notes
    -----
    Reads and writes all weights once; the packed form has their size, rounded up to whole panels. On the GPU
    it is a copy in one piece: the kernels read rows as they are, and bring gates and ups together as they load.
    Quantised weights stay codes, and their scales become what the kernels read; on a CPU with AVX-512 both are packed
    into panels, for the kernels that multiply codes.

    Examples
    --------
    >>> import cumoe, numpy as np
    >>> w1, w2 = np.ones((4, 64, 32), "float32"), np.ones((4, 32, 32), "float32")
    >>> prepared = cumoe.prepare(w1, w2)
    >>> prepared.num_experts, prepared.hidden_size, prepared.intermediate_size
    (4, 32, 32)
    """
    if isinstance(w1, PreparedExperts):
        raise TypeError("w1 must be an array (E, 2I, H), got PreparedExperts; it is prepared already")
    given = weight_arrays(w1, w2, quant_config)
    side, inside = _arrays.enter(**given)
    xp, arrays = side.xp, dict(zip(given, inside, strict=True))
    experts = make_experts(xp, arrays, activation, quant_config)
    place = _arrays.place(arrays["w1"])
    if device not in (None, place, place.partition(":")[0]):
        raise ValueError(f"device must be that of the arrays = {place}, got {device!r}; copy them there")
    if out is not None and not isinstance(out, PreparedExperts):
        raise TypeError(f"out must be PreparedExperts, got {type(out).__name__}")
    if experts.scheme is not None:
        return _prepare_quantised(xp, experts, backend, out, place)
    sizes = experts.dtype, experts.hidden_size, experts.intermediate_size
    kernel = choose_kernel(xp, backend, *sizes, packed_for=None if out is None or backend else out.kernel)
    experts = experts._replace(kernel=kernel, aligned=True)
    if out is not None:
        _must_match(out, experts, place)
    room = _arrays.room(xp, "pack")
    gating = {"w1": experts.is_gated, "w2": False}
    packed: dict[str, Any] = {} if out is None else {"w1": out.experts.w1, "w2": out.experts.w2}
    for name, gated in gating.items():
        weights = getattr(experts, name)
        if out is None:
            shape = room.panel_shape(weights.shape, experts.dtype, kernel, gated)
            packed[name] = xp.empty(shape, weights.dtype)
        room.pack_weights(weights, experts.dtype, kernel, gated, experts.is_interleaved and gated, packed[name])
    biases = "w1_bias", "w2_bias"
    if out is None:
        return PreparedExperts(experts._replace(**packed, **{name: getattr(experts, name).copy() for name in biases}))
    for name in biases:
        getattr(out.experts, name)[...] = getattr(experts, name)
    return out


def _prepare_quantised(
    xp: ModuleType, experts: Experts, backend: str | None, out: PreparedExperts | None, place: str
) -> PreparedExperts:
    """Codes as they are, everything that belongs to them checked and converted, in memory of its own."""
    if backend is not None:
        raise ValueError("backend must be None for quantised weights: codes serve every kernel; name it in the call")
    experts = _packed(xp, experts)
    if out is None:
        return PreparedExperts(experts)
    _must_match(out, experts, place)
    old, new = _arrays_of(out.experts), _arrays_of(experts)
    same = [(array.shape, array.dtype) for array in old] == [(array.shape, array.dtype) for array in new]
    if not same or _names_of(out.experts) != _names_of(experts):
        raise ValueError(
            "out must have been prepared with scales and zero points of the same shapes, and activations that are"
            " quantised alike; prepare it anew"
        )
    for into, array in zip(old, new, strict=True):
        into[...] = array
    return out


def _packed(xp: ModuleType, e: Experts) -> Experts:
    """Quantised weights in memory of their own, codes in the order in which the kernels of the side read them."""
    pack, scheme, packed = _arrays.room(xp, "pack").pack_codes, cast(Scheme, e.scheme), {}
    for name, k, gated in (("w1", e.hidden_size, e.is_gated), ("w2", e.intermediate_size, False)):
        packed[name] = pack(getattr(e, name), getattr(scheme, name).format, k, gated, e.is_interleaved and gated)
    without = {name: getattr(scheme, name)._replace(format=None) for name in packed}
    rest = e._replace(w1=None, w2=None, scheme=scheme._replace(**without))
    own = _with_arrays(rest, [array.copy() for array in _arrays_of(rest)])
    with_formats = {name: getattr(own.scheme, name)._replace(format=form) for name, (_, form) in packed.items()}
    codes = {name: codes for name, (codes, _) in packed.items()}
    return own._replace(scheme=own.scheme._replace(**with_formats), **codes)


def _arrays_of(thing: Any) -> list[Any]:
    """Every array in named tuples within named tuples, in one order."""
    if hasattr(thing, "shape"):
        return [thing]
    return [array for part in thing for array in _arrays_of(part)] if hasattr(thing, "_fields") else []


def _names_of(e: Experts) -> list[tuple[Any, ...]]:
    """What says how each weight is read, and how the rows that it meets are quantised, beside the arrays."""
    scheme = cast(Scheme, e.scheme)
    formats = [weight.format for weight in (scheme.w1, scheme.w2)]
    rows = [() if a is None else (a.scheme, a.cols, a.per_tensor) for a in (scheme.a1, scheme.a2)]
    return [(f.rule, f.scale_dtype, f.group_rows, f.group_cols, f.integer_rows, f.panels) for f in formats] + rows


def _with_arrays(thing: Any, new: list[Any]) -> Any:
    """The same named tuples with the first of `new`, which are taken out, in place of their arrays."""
    if hasattr(thing, "shape"):
        return new.pop(0)
    return type(thing)(*(_with_arrays(part, new) for part in thing)) if hasattr(thing, "_fields") else thing


def _must_match(out: PreparedExperts, new: Experts, place: str) -> None:
    """Raise ValueError unless everything that is not written anew is the same."""
    old = out.experts
    if out.device != place:
        raise ValueError(f"out must be where w1 is = {place}, got {out.device}")
    sizes = ("num_experts", "hidden_size", "intermediate_size", "dtype", "kernel")
    for name in (*sizes, "activation", "alpha", "beta", "limit"):
        if getattr(old, name) != getattr(new, name):
            raise ValueError(f"out must have {name} = {getattr(new, name)!r}, got {getattr(old, name)!r}")
    for name in ("w1_bias", "w2_bias"):
        if getattr(old, name).shape != getattr(new, name).shape:
            given = "a" if getattr(new, name).size else "no"
            raise ValueError(f"out must have been prepared with {given} {name}, like quant_config; prepare it anew")
