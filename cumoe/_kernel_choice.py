"""Which kernel multiplies: the best one for the arrays of a call, or the one that the caller names."""

from types import ModuleType

from cumoe import _arrays, _check


def choose_kernel(
    xp: ModuleType,
    backend: str | None,
    dtype: str,
    hidden_size: int,
    intermediate_size: int,
    aligned: bool = True,
    scaled: bool = False,
    packed_for: str | None = None,
    coded: bool = False,
) -> str:
    """
    Return the name of the kernel, or raise with the names of those that could run and why this one cannot.

    `aligned` says that rows ascend and begin at multiples of 16 bytes, `scaled` that router weights go on the tokens
    first, `packed_for` for which kernel the weights are packed already, `coded` that they are codes.
    """
    pack = _arrays.room(xp, "pack")
    needs = dtype, hidden_size, intermediate_size, aligned, scaled
    if backend is None:
        if packed_for is None or pack.refusal(packed_for, *needs) is not None:
            return str(pack.best_kernel(*needs, coded))
        return packed_for
    _check.choice("backend", backend, pack.kernel_names())
    reason = pack.refusal(backend, *needs)
    if reason is not None:
        able = [name for name in pack.kernel_names() if pack.refusal(name, *needs) is None]
        raise NotImplementedError(f"no kernel for backend={backend!r} ({reason}); available: {', '.join(able)}")
    if packed_for is not None and not pack.same_layout(packed_for, backend):
        raise ValueError(f"backend must be that of w1 = {packed_for!r}, got {backend!r}; prepare w1 for it")
    return backend


def refusals(
    xp: ModuleType,
    kernel: str,
    backend: str | None,
    dtype: str,
    hidden_size: int,
    intermediate_size: int,
    aligned: bool = True,
) -> tuple[str, ...]:
    """Say of each other kernel that could be expected why `kernel` is taken instead."""
    pack = _arrays.room(xp, "pack")
    needs = dtype, hidden_size, intermediate_size, aligned, False
    reasons = [reason for reason in pack.refused_kernels(*needs) if not reason.startswith(f"{kernel}:")]
    if backend is not None:
        names = pack.kernel_names()
        before = (name for name in names[: names.index(kernel)] if pack.refusal(name, *needs) is None)
        reasons += [f"{name}: can run, {backend} was asked for" for name in before]
    return tuple(reasons)


def codes_are_aligned(code_bits: int, *sizes: int) -> bool:
    """Whether rows of so many codes begin at multiples of 16 bytes in an array that does."""
    return all(size * code_bits % 128 == 0 for size in sizes)


def rows_are_aligned(*arrays: _arrays.Array) -> bool:
    """Whether all rows of CuPy arrays, whose elements are neighbours, ascend and begin at multiples of 16 bytes."""
    for array in arrays:
        steps = [step for step, extent in zip(array.strides[:-1], array.shape[:-1], strict=True) if extent > 1]
        if any(number % 16 or number < 0 for number in (array.data.ptr, *steps)):
            return False
    return True
