"""
Weights as the GPU kernels read them: (E, N, K) in one piece, each expert's rows as the caller has them.

The tensor maps of the Hopper kernels bring gate and up rows together, eight by eight, while they load, and
the other kernels pick rows one by one; so there is one layout for all kernels.
"""

from cumoe.rawkernels import _load

_EXACT = ("wgmma", "mma", "fma")  # fastest first; "tf32" rounds the factors and is never chosen unasked
_NARROW = ("float16", "bfloat16")


def kernel_names():
    """Names of all kernels of this side, fastest first."""
    return (*_EXACT, "tf32")


def refusal(kernel, dtype, hidden_size, intermediate_size, aligned, scaled):
    """
    Why `kernel` cannot multiply weights of `dtype`; None if it can.

    `aligned` says that the rows of tokens, weights and results ascend and begin at multiples of 16 bytes,
    `scaled` that the router weights go on the tokens before the first product.
    """
    if kernel in ("wgmma", "mma") and dtype not in _NARROW:
        return f"{kernel}: multiplies 16-bit numbers only, the weights are {dtype}"
    if kernel in ("fma", "tf32") and dtype != "float32":
        return f"{kernel}: multiplies float32 only, the weights are {dtype}"
    if kernel != "wgmma":
        return None
    if _load.capability() != 90:
        return f"wgmma: needs compute capability 9.0, the device has {_load.capability() / 10}"
    if hidden_size % 8 or intermediate_size % 8:
        return f"wgmma: the sizes of the matrices must be multiples of 8, got {hidden_size} and {intermediate_size}"
    if not aligned:
        return "wgmma: rows must ascend and begin at multiples of 16 bytes"
    if scaled:
        return "wgmma: reads the tokens as they are, router weights go on them first"
    return None


def best_kernel(dtype, hidden_size, intermediate_size, aligned, scaled, coded=False):
    """Name of the fastest kernel here that adds exact products, of codes too; raises where none runs."""
    _load.architecture()
    sizes = dtype, hidden_size, intermediate_size, aligned, scaled
    return next(kernel for kernel in _EXACT if refusal(kernel, *sizes) is None)


def refused_kernels(dtype, hidden_size, intermediate_size, aligned, scaled):
    """Why each faster kernel is not used."""
    sizes = dtype, hidden_size, intermediate_size, aligned, scaled
    best = _EXACT.index(best_kernel(*sizes))
    reasons = [refusal(kernel, *sizes) for kernel in _EXACT[:best]]
    if dtype == "float32":
        reasons.append("tf32: rounds the factors to 11 bits, for callers who ask for it by name")
    return tuple(reasons)


def same_layout(kernel, other):
    """Whether weights packed for one kernel serve the other too."""
    return kernel in kernel_names() and other in kernel_names()


def panel_shape(weights_shape, dtype, kernel, gated):
    """Shape of the packed form of weights (E, N, K): the same."""
    return tuple(weights_shape)


def pack_weights(weights, dtype, kernel, gated, interleaved, out):
    """Copy (E, N, K) of any strides into `out` of `panel_shape`; `dtype` names what the bits of `weights` mean."""
    out[...] = weights


def multiplies_codes(kernel):
    """Whether `kernel` reads what `pack_codes` makes."""
    return True


def pack_codes(codes, weight_format, k, gated, interleaved):
    """Codes and their format in memory of their own; every kernel reads them as they are."""
    arrays = {name: array.copy() for name, array in weight_format._asdict().items() if hasattr(array, "shape")}
    return codes.copy(), weight_format._replace(**arrays)
