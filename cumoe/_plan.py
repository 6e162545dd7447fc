"""What a call will do and cost, from sizes and names alone: no array is touched, none is needed."""

import importlib
from dataclasses import dataclass

from cumoe import _check
from cumoe._act import is_gated

_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


def tokens_per_piece(
    workspace_limit: int | None,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    dtype: str,
) -> int:
    """The most tokens whose scratch fits `workspace_limit` bytes."""
    if workspace_limit is None:
        return max(1, num_tokens)
    fixed = _fixed_bytes(num_experts)
    per_token = _bytes_per_token(top_k, hidden_size, intermediate_size, dtype)
    limit = _check.integer("workspace_limit", workspace_limit, 0)
    if limit < fixed + per_token:
        raise ValueError(f"workspace_limit must be >= one token = {fixed + per_token}, got {limit}")
    return min(max(1, num_tokens), (limit - fixed) // max(1, per_token))


def _fixed_bytes(num_experts: int) -> int:
    return 8 * (num_experts + 1)


def _bytes_per_token(top_k: int, hidden_size: int, intermediate_size: int, dtype: str) -> int:
    return top_k * (8 + (hidden_size + intermediate_size) * _ITEMSIZE[dtype])


@dataclass(frozen=True)
class Plan:
    """
    What one call of `fused_experts` does; made by `plan`.

    Attributes
    ----------
    kernel : str
        Micro-kernel that is used.
    refused : tuple of str
        The faster kernels and why each of them is not used.
    flops : int
        Multiplications and additions of both products.
    bytes : int
        Least memory traffic: weights of the experts expected to be touched, tokens in, results out.
    workspace_bytes : int
        Scratch for the tokens, as `workspace_limit` counts it; a few MiB a CPU thread come on top.
    """

    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    dtype: str
    activation: str
    kernel: str
    refused: tuple[str, ...]
    tokens_per_piece: int
    workspace_bytes: int
    expected_experts: float
    flops: int
    bytes: int

    def floor(self, bytes_per_second: float, flops_per_second: float) -> float:
        """
        Least time in seconds on a machine with these ceilings.

        Parameters
        ----------
        bytes_per_second, flops_per_second : float
            Measured rates of streaming reads and of the micro-kernel.

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
            Kernel, refused kernels, pieces, scratch, arithmetic and traffic.
        """
        pieces = -(-self.num_tokens // self.tokens_per_piece) if self.num_tokens else 0
        lines = [
            f"T={self.num_tokens} k={self.top_k} E={self.num_experts} H={self.hidden_size} "
            f"I={self.intermediate_size} {self.dtype} {self.activation}",
            f"kernel     {self.kernel}",
            *(f"refused    {reason}" for reason in self.refused),
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
    workspace_limit: int | None = None,
) -> Plan:
    """
    Say what `fused_experts` would do for these sizes, without arrays.

    Parameters
    ----------
    num_tokens, hidden_size, intermediate_size, num_experts, top_k : int
        T, H, I, E and k.
    dtype : {"float32", "float16", "bfloat16"}, default "bfloat16"
        Of tokens and weights.
    activation : str, default "silu"
        Name of an activation.
    device : {"cpu"}, default "cpu"
        Side that would run.
    workspace_limit : int, optional
        Most bytes of scratch.

    Returns
    -------
    Plan
        Numbers, and `explain`.

    Raises
    ------
    ValueError
        A size or name outside the lists above.

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
    _check.choice("device", device, ("cpu",))
    matrices = 3 if is_gated(activation) else 2
    touched = num_experts * (1 - (1 - top_k / num_experts) ** num_tokens)
    itemsize = _ITEMSIZE[dtype]
    sizes = (top_k, num_experts, hidden_size, intermediate_size, dtype)
    tokens = tokens_per_piece(workspace_limit, num_tokens, *sizes)
    pack = importlib.import_module("cumoe.cpu.pack")
    return Plan(
        num_tokens,
        hidden_size,
        intermediate_size,
        num_experts,
        top_k,
        dtype,
        activation,
        pack.best_kernel(dtype),
        pack.refused_kernels(dtype),
        tokens,
        _fixed_bytes(num_experts)
        + min(tokens, num_tokens) * _bytes_per_token(top_k, hidden_size, intermediate_size, dtype),
        touched,
        2 * matrices * num_tokens * top_k * hidden_size * intermediate_size,
        round(touched * matrices * hidden_size * intermediate_size * itemsize)
        + 2 * num_tokens * hidden_size * itemsize,
    )
