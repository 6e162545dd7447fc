"""What a call will do and cost, from sizes and names alone: no array is touched, none is needed."""

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from cumoe import _arrays, _check, _layer_scheme, _quantised_rows
from cumoe._act import is_gated
from cumoe._kernel_choice import choose_kernel, codes_are_aligned, refusals
from cumoe._layer_scheme import Rows
from cumoe._quant_desc import dtype_name
from cumoe._workspace import ALIGNMENT, rounded

_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
ROW_SCALE_ARRAYS = 8  # of at most 8 bytes a row, on the way to the global scale of each row
_LEAST_BLOCK_ROWS = 8  # scratch for lists of blocks of any height from here on, so that fewer tokens never need more


class Sizes(NamedTuple):
    """What the scratch of a call depends on beside the number of tokens."""

    top_k: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: str
    a1: Rows | None = None  # of which the numbers are not looked at
    a2: Rows | None = None
    code_bits: int = 0  # of a quantised weight
    largest: int = 0  # elements of the larger of the quantised weights

    def layer(self, expanded: int) -> tuple[int, int, int, str, int, bool]:
        """What the rooms ask for: E, H, I, the dtype, bits of a code, 0 where it is decoded before; sums in parts."""
        bits = 0 if expanded else self.code_bits
        in_parts = any(rows is not None and rows.in_parts for rows in (self.a1, self.a2))
        return self.num_experts, self.hidden_size, self.intermediate_size, self.dtype, bits, in_parts


class Shares(NamedTuple):
    """How the scratch of a call is shared out."""

    tokens_per_piece: int
    block_rows: int  # of the list that tells the products which rows belong together; 0: there is none
    schedule_size: int  # int32 elements of that list and of what the sort needs
    expanded: int  # elements of decoded weights


def share_out(xp: ModuleType, kernel: str, num_tokens: int, sizes: Sizes, workspace_limit: int | None = None) -> Shares:
    """Share out the scratch for as many tokens at a time as fit `workspace_limit` bytes."""
    tokens = max(1, num_tokens)
    if workspace_limit is not None:
        limit = _check.integer("workspace_limit", workspace_limit, 0)
        least = scratch_bytes(sizes, _shares(xp, kernel, 1, sizes))
        if limit < least:
            raise ValueError(f"workspace_limit must be >= one token = {least}, got {limit}")
        low = 1
        while low < tokens:  # the most that fit: more tokens never need less
            middle = (low + tokens + 1) // 2
            fits = scratch_bytes(sizes, _shares(xp, kernel, middle, sizes)) <= limit
            low, tokens = (middle, tokens) if fits else (low, middle - 1)
    return _shares(xp, kernel, tokens, sizes)


def _shares(xp: ModuleType, kernel: str, num_tokens: int, sizes: Sizes) -> Shares:
    pairs = num_tokens * sizes.top_k
    room = _arrays.room(xp, "grouped_gemm")
    expanded = sizes.largest if sizes.largest and room.expands(pairs, sizes.num_experts) else 0
    block_rows = room.block_rows(pairs, *sizes.layer(expanded), kernel)
    least = min(block_rows, _LEAST_BLOCK_ROWS)
    schedule_size = _arrays.room(xp, "permute").schedule_size(pairs, sizes.num_experts, least)
    return Shares(num_tokens, block_rows, schedule_size, expanded)


def scratch_bytes(sizes: Sizes, shares: Shares) -> int:
    """Bytes of a block that holds the scratch, wherever it begins."""
    tokens, item = shares.tokens_per_piece, _ITEMSIZE[sizes.dtype]
    pairs = tokens * sizes.top_k
    pieces = [
        8 * (sizes.num_experts + 1),
        4 * pairs,
        4 * pairs,
        4 * shares.schedule_size,
        shares.expanded * item,
        pairs * sizes.intermediate_size * item,
        pairs * sizes.hidden_size * item,
    ]

    def count(shape: tuple[int, ...], dtype: Any) -> Any:
        pieces.append(math.prod(shape) * np.dtype(dtype).itemsize)

    bits = f"u{item}"
    if sizes.a1 is not None:
        _quantised_rows.space(sizes.a1, pairs if sizes.a1.is_by_expert else tokens, sizes.hidden_size, bits, count)
    if sizes.a2 is not None:
        _quantised_rows.space(sizes.a2, pairs, sizes.intermediate_size, bits, count, numbers=())
    if any(rows is not None and rows.is_by_expert for rows in (sizes.a1, sizes.a2)):
        pieces += [8 * pairs] * ROW_SCALE_ARRAYS
    return sum(map(rounded, pieces)) + ALIGNMENT


@dataclass(frozen=True)
class Plan:
    """
    What one call of `fused_experts` does; made by `plan`.

    Attributes
    ----------
    kernel : str
        Kernel that multiplies.
    refused : tuple of str
        The kernels that could be expected instead, and why each of them is not used.
    tiles : tuple of str
        On the GPU, how the products are cut into tiles and why; in words.
    formats : str
        How quantised operands are multiplied, in words; "" if nothing is quantised.
    flops : int
        Multiplications and additions of both products.
    bytes : int
        Least memory traffic: weights of the experts expected to be touched, tokens in, results out.
    workspace_bytes : int
        What a `workspace` must hold: the scratch that grows with the tokens, which `workspace_limit`
        limits, and on the GPU the choices that `fused_moe` makes. A few MiB a CPU thread come on top.
    """

    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    dtype: str
    activation: str
    device: str
    kernel: str
    refused: tuple[str, ...]
    tiles: tuple[str, ...]
    tokens_per_piece: int
    workspace_bytes: int
    formats: str
    expected_experts: float
    flops: int
    bytes: int

    def floor(self, bytes_per_second: float, flops_per_second: float) -> float:
        """
        Least time in seconds on a machine with these ceilings.

        Parameters
        ----------
        bytes_per_second, flops_per_second : float
            Measured rates of streaming reads and of the kernel.

        Returns
        -------
        float
            The larger of the memory time and the arithmetic time.
        """
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)

    def explain(self) -> str:
        """
        Say in a few lines what the call does and why.

        Returns
        -------
        str
            Kernel, refused kernels, tiles, pieces, scratch, arithmetic and traffic.
        """
        pieces = -(-self.num_tokens // self.tokens_per_piece) if self.num_tokens else 0
        lines = [
            f"T={self.num_tokens} k={self.top_k} E={self.num_experts} H={self.hidden_size} "
            f"I={self.intermediate_size} {self.dtype} {self.activation}",
            f"kernel     {self.kernel}",
            *(f"refused    {reason}" for reason in self.refused),
            *(f"tiles      {line}" for line in self.tiles),
            *([f"formats    {self.formats}"] if self.formats else []),
            f"experts    about {self.expected_experts:.1f} of {self.num_experts} touched under uniform routing",
            f"rows       about {self.num_tokens * self.top_k / max(self.expected_experts, 1):.1f} per touched expert",
            f"pieces     {pieces} of at most {self.tokens_per_piece} tokens",
            f"workspace  {self.workspace_bytes} bytes",
            f"work       {self.flops / 1e9:.3f} GFLOP, {self.bytes / 1e6:.3f} MB, "
            f"{self.flops / max(self.bytes, 1):.1f} FLOP per byte",
        ]
        return "\n".join(lines)


def plan(
    num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    *,
    dtype: str = "bfloat16",
    activation: str = "silu",
    device: str = "cpu",
    quant_config: Any = None,
    workspace_limit: int | None = None,
    backend: str | None = None,
) -> Plan:
    """
    Say what `fused_experts` would do for these sizes, without arrays.

    Parameters
    ----------
    num_tokens, hidden_size, intermediate_size, num_experts, top_k : int
        T, H, I, E and k.
    dtype : {"float32", "float16", "bfloat16"}, default "bfloat16"
        Of tokens, and of weights that are not quantised.
    activation : str, default "silu"
        Name of an activation.
    device : {"cpu", "cuda", "cuda:0", ...}, default "cpu"
        Side that would run; a GPU must be here, "cuda" is the current one.
    quant_config : FusedMoEQuantConfig, optional
        Number formats, as in `fused_experts`; its arrays are not looked at.
    workspace_limit : int, optional
        Most bytes of scratch, as in `fused_experts`.
    backend : str, optional
        Name of a kernel, as in `fused_experts`.

    Returns
    -------
    Plan
        Numbers, and `explain`.

    Raises
    ------
    ValueError
        A size or name outside the lists above.
    NotImplementedError
        A `backend` that cannot run here.
    ImportError, RuntimeError
        No CuPy, or no CUDA device.

    Notes
    -----
    Under uniform routing, ``E * (1 - (1 - k / E) ** T)`` experts are touched.

    Examples
    --------
    >>> import cumoe
    >>> p = cumoe.plan(16, 2048, 768, 128, 8)
    >>> p.flops
    1207959552
    """
    _check.integer("num_tokens", num_tokens, 0)
    for name, size in (
        ("hidden_size", hidden_size),
        ("intermediate_size", intermediate_size),
        ("num_experts", num_experts),
    ):
        _check.integer(name, size, 1)
    _check.integer("top_k", top_k, 0, num_experts)
    _check.choice("dtype", dtype, tuple(_ITEMSIZE))
    xp = _arrays.namespace(device)
    matrices = 3 if is_gated(activation) else 2
    touched = num_experts * (1 - (1 - top_k / num_experts) ** num_tokens)
    itemsize = _ITEMSIZE[dtype]
    sizes = Sizes(top_k, num_experts, hidden_size, intermediate_size, dtype)
    weight_bits, formats = 8.0 * itemsize, ""
    if _layer_scheme.is_quantised(quant_config):
        a1, a2 = (_layer_scheme.planned_rows(i, getattr(quant_config, f"_a{i}")) for i in (1, 2))
        if device == "cpu" and a2 is not None and a2.are_integers:
            a2 = a2._replace(as_bytes=True)  # those take memory of their own, if there is a kernel for them
        largest = num_experts * (matrices - 1) * intermediate_size * hidden_size
        bits_of_code = _layer_scheme.code_bits(quant_config._w1)
        sizes = sizes._replace(a1=a1, a2=a2, code_bits=bits_of_code, largest=largest)
        bits = [_layer_scheme.bits_of_weight(desc) for desc in (quant_config._w1, quant_config._w2)]
        weight_bits = ((matrices - 1) * bits[0] + bits[1]) / matrices
    with _arrays.device_scope(device):
        aligned = codes_are_aligned(sizes.code_bits, hidden_size, intermediate_size)
        coded = sizes.code_bits > 0
        kernel = choose_kernel(xp, backend, dtype, hidden_size, intermediate_size, aligned, coded=coded)
        refused = refusals(xp, kernel, backend, dtype, hidden_size, intermediate_size, aligned)
        shares = share_out(xp, kernel, num_tokens, sizes, workspace_limit)
        tiles = _arrays.room(xp, "grouped_gemm").explain(
            shares.tokens_per_piece * top_k, *sizes.layer(shares.expanded), kernel, matrices == 3
        )
    if sizes.code_bits:
        in_registers = device == "cpu" and _arrays.room(xp, "pack").multiplies_codes(kernel)
        in_registers = in_registers and _become_pairs(quant_config._w1, sizes.code_bits)
        formats = _formats_of(quant_config, sizes, device, shares.expanded, in_registers)
    choices = 0 if device == "cpu" else 2 * rounded(4 * num_tokens * top_k)
    return Plan(
        num_tokens,
        hidden_size,
        intermediate_size,
        num_experts,
        top_k,
        dtype,
        activation,
        device,
        kernel,
        refused,
        tiles,
        shares.tokens_per_piece,
        scratch_bytes(sizes, shares) + choices if num_tokens else 0,
        formats,
        touched,
        2 * matrices * num_tokens * top_k * hidden_size * intermediate_size,
        round(touched * matrices * hidden_size * intermediate_size * weight_bits / 8)
        + 2 * num_tokens * hidden_size * itemsize,
    )


def _become_pairs(desc: Any, code_bits: int) -> bool:
    """Whether a kernel that multiplies codes multiplies these: with other zero points and groups they are decoded."""
    cols = desc.shape.col if desc.shape is not None else -1
    return (cols <= 0 or cols % 2 == 0) and (code_bits == 4 or desc.zp is None)


def _formats_of(quant_config: Any, sizes: Sizes, device: str, expanded: int, in_registers: bool) -> str:
    """How quantised operands are multiplied."""
    weights = dtype_name(quant_config._w1.dtype)
    where = "panel by panel, in the cache" if device == "cpu" else "tile by tile, in shared memory"
    if in_registers:
        where = "in registers, their scales meet the sums"
    if expanded:
        where = "once for all tiles, in scratch"
    if sizes.a1 is None:
        rows = "activations as they are"
    else:
        group = "one scale for all rows" if sizes.a1.per_tensor else "one scale a row"
        if sizes.a1.cols != -1:
            group = f"one scale for {sizes.a1.cols} elements of a row"
            if sizes.a1.in_parts and (device != "cpu" or in_registers):
                group += ", which meets the sum of these"
        rows = f"activations rounded to {sizes.a1.scheme}, {group}"
    return f"{weights} weights become {sizes.dtype} {where}; {rows}"
