"""One grouped product of a layer, on every kernel of every side, and its law."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from sides import back

from cumoe import _arrays
from cumoe.cpu import microkernel
from cumoe.reference import act, experts
from cumoe.reference.rounding import SUM_UNIT, TF32_UNIT, rounded

CPU_KERNELS = [(dtype, name) for dtype in ("float32", "float16", "bfloat16") for name in microkernel.names(dtype)]
GPU_KERNELS = [
    ("bfloat16", "wgmma"),
    ("float16", "wgmma"),
    ("bfloat16", "mma"),
    ("float16", "mma"),
    ("float32", "fma"),
    ("float32", "tf32"),
]
ON_GPU_ANY_SIZE = [("cupy", *one) for one in GPU_KERNELS if one[1] != "wgmma"]
ON_GPU = [("cupy", *one) for one in GPU_KERNELS]
EVERY_KERNEL = [("numpy", *one) for one in CPU_KERNELS] + ON_GPU
# the fastest of each dtype on the CPU: each activation is compiled for each kernel there
FASTEST = [("numpy", dtype, microkernel.names(dtype)[0]) for dtype in ("float32", "float16", "bfloat16")]


def on_kernels(kernels):
    """Run a test body on these (side, dtype, kernel)."""
    return pytest.mark.parametrize(("xp", "dtype", "kernel"), kernels, indirect=["xp"])


class Product(NamedTuple):
    """Arguments of `grouped_gemm` as NumPy arrays of numbers; an empty array means: not there."""

    x: np.ndarray
    permuted_idx: np.ndarray
    top_k: int
    input_scale: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray
    bias: np.ndarray
    output_scale: np.ndarray
    row_factor: np.ndarray
    column_factor: np.ndarray
    activation: str
    interleaved: bool
    parameters: tuple
    num_rows: int  # of the output

    @property
    def outputs(self):
        n = self.weights.shape[1]
        return n // 2 if self.activation and act.is_gated(self.activation) else n


def make_product(seed, num_tokens, top_k, num_experts, outputs, k, dtype, activation="", skipped=0.2, **parts):
    """
    Draw a product; `parts` are in_place, input_scale, bias, output_scale, row_factor, column_factor: what there is.
    A `column_factor` of "one" is one for each matrix.

    Rows that no expert has are NaN and lie behind the others.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, num_experts, num_tokens * top_k)
    ids[rng.random(ids.size) < skipped] = num_experts
    offsets = np.searchsorted(np.sort(ids), np.arange(num_experts + 1)).astype(np.int64)
    order = np.argsort(ids, kind="stable").astype(np.int32)
    order[offsets[-1] :] = ids.size
    in_place = parts.get("in_place", False)
    rows = ids.size if in_place else num_tokens
    gated = bool(activation) and act.is_gated(activation)
    n = 2 * outputs if gated else outputs
    x = rng.standard_normal((rows, k), np.float32).astype(dtype)
    if in_place:
        x[offsets[-1] :] = np.nan
    nothing, scale = np.empty(0, np.float32), rng.random(ids.size, np.float32) + np.float32(0.5)
    rule = act.ACTIVATIONS[activation] if activation else None
    column_factor = rng.random((num_experts, 1 if parts.get("column_factor") == "one" else n), np.float32)
    row_factor = rng.random(rows, np.float32)
    given = {name: 2.5 for name in (rule.takes if rule else ()) if getattr(rule, name) is None}
    return Product(
        x,
        order,
        0 if in_place else top_k,
        scale if parts.get("input_scale") else nothing,
        (rng.standard_normal((num_experts, n, k), np.float32) / np.float32(k**0.5)).astype(dtype),
        offsets,
        rng.standard_normal((num_experts, n), np.float32) if parts.get("bias") else np.empty((0, 0), np.float32),
        scale[::-1].copy() if parts.get("output_scale") else nothing,
        row_factor + np.float32(0.5) if parts.get("row_factor") else nothing,
        column_factor + np.float32(0.5) if parts.get("column_factor") else np.empty((0, 0), np.float32),
        activation,
        rule.interleaved if rule else False,
        rule.parameters(**given) if rule else (1.0, 0.0, np.inf),
        ids.size,
    )


def law(p, kernel, x=None):
    """Value and bound of every row that an expert has; `x` is a `Bounded` of the rows, if they are not those of `p`."""
    rows_of_all = experts.Bounded(p.x.astype(np.float64), np.zeros(p.x.shape)) if x is None else x
    dtype, unit = p.x.dtype, TF32_UNIT if kernel == "tf32" else 0.0
    value, error = np.zeros((p.offsets[-1], p.outputs)), np.zeros((p.offsets[-1], p.outputs))
    for e in range(len(p.weights)):
        rows = slice(p.offsets[e], p.offsets[e + 1])
        pairs = p.permuted_idx[rows]
        source = pairs // p.top_k if p.top_k else np.arange(rows.start, rows.stop)
        first = experts.Bounded(*(part[source] for part in rows_of_all))
        if p.input_scale.size:
            x = first.value * p.input_scale[pairs, None].astype(np.float64)
            first = experts.Bounded(x, rounded(x, SUM_UNIT * np.abs(x), dtype))
        bias = p.bias[e] if p.bias.size else None
        if p.row_factor.size or p.column_factor.size:
            columns = p.column_factor[e].astype(np.float64) if p.column_factor.size else np.ones(1)
            columns = np.broadcast_to(columns, p.weights.shape[1])
            factor = p.row_factor[source, None].astype(np.float64) if p.row_factor.size else np.ones((len(source), 1))
            factor = experts.Bounded(factor, np.zeros_like(factor))
            h = experts.factored(experts.linear(first, p.weights[e], None, unit), factor, columns, bias)
        else:
            h = experts.linear(first, p.weights[e], bias, unit)
        if p.output_scale.size:
            h = experts.scaled(h, p.output_scale[pairs, None].astype(np.float64))
        h = experts.Bounded(h.value, rounded(h.value, h.error, dtype))
        if p.activation:
            h = experts.activated(h, p.activation, *p.parameters)
            h = experts.Bounded(h.value, rounded(h.value, h.error, dtype))
        value[rows], error[rows] = h
    return experts.Bounded(value, error)


class OnSide(NamedTuple):
    """The same arguments where they are used; small floats as bits. Nothing is allocated when it is called."""

    room: Any
    permute: Any
    x: Any
    permuted_idx: Any
    top_k: int
    input_scale: Any
    weights: Any
    weight_format: Any
    offsets: Any
    bias: Any
    output_scale: Any
    row_factor: Any
    column_factor: Any
    activation: str
    interleaved: bool
    parameters: tuple
    dtype: str
    kernel: str
    schedule: Any
    block_rows: int
    ahead: bool
    expanded: Any
    out: Any

    def __call__(self):
        """Run and return the output on the host."""
        self.run()
        return back(self.out).view(self.dtype)

    def run(self):
        """List the tiles and multiply."""
        self.permute.list_tiles(self.offsets, self.schedule, self.block_rows)
        if self.ahead:  # the list must be older by a kernel
            self.schedule[3:4] = 0
        self.multiply()

    def multiply(self):
        """Multiply with the tiles that are listed."""
        self.room.grouped_gemm(
            self.x, self.permuted_idx, self.top_k, self.input_scale, self.weights, self.weight_format, self.offsets,
            self.bias, self.output_scale, self.row_factor, self.column_factor, self.activation, self.interleaved,
            *self.parameters, self.dtype, self.kernel, self.schedule, self.block_rows, self.ahead, self.expanded,
            self.out,
        )  # fmt: skip


def on_side(xp, p, dtype, kernel, **other):
    """
    Put a product to `xp`, its output filled with 7; the test is skipped if `kernel` cannot do it.

    `other` replaces fields of `OnSide`.
    """
    room, permute, pack = (_arrays.room(xp, name) for name in ("grouped_gemm", "permute", "pack"))
    k, outputs = p.x.shape[1], p.outputs
    refusal = pack.refusal(kernel, dtype, k, outputs, True, p.input_scale.size > 0)
    if xp is not np and refusal:
        pytest.skip(refusal)
    sizes = p.num_rows, len(p.weights), k, outputs, dtype, 0, False
    block_rows = other.get("block_rows") or room.block_rows(*sizes, kernel)
    side = OnSide(
        room,
        permute,
        bits(xp, p.x),
        xp.asarray(p.permuted_idx),
        p.top_k,
        xp.asarray(p.input_scale),
        bits(xp, p.weights),
        None,
        xp.asarray(p.offsets),
        xp.asarray(p.bias),
        xp.asarray(p.output_scale),
        xp.asarray(p.row_factor),
        xp.asarray(p.column_factor),
        p.activation,
        p.interleaved,
        p.parameters,
        dtype,
        kernel,
        xp.empty(permute.schedule_size(p.num_rows, len(p.weights), block_rows), np.int32),
        block_rows,
        block_rows > 0 and p.top_k == 0,
        xp.empty((0, 0, 0), np.uint16),
        bits(xp, np.full((p.num_rows, outputs), 7, dtype)),
    )
    return side._replace(**other)


def bits(xp, array):
    """A copy on `xp`, as kernels see it."""
    return xp.array(array if array.dtype == np.float32 else array.view(f"u{array.itemsize}"))


def assert_within(out, bounded):
    """Every element within its bound; the rows behind untouched."""
    rows = len(bounded.value)
    ratio = experts.ratio(out[:rows], bounded)
    assert ratio.max(initial=0) <= 1, f"{ratio.max()} at {np.unravel_index(ratio.argmax(), ratio.shape)}"
    assert (out[rows:] == 7).all()
