"""Who can run a layer: one function a candidate, which gives its reason not to, or None."""

from collections.abc import Callable

from cumoe import _arrays, _check
from cumoe._quant_desc import dtype_name
from cumoe.config import FusedMoEConfig

DTYPES = ("float32", "float16", "bfloat16")
_LEAST_CAPABILITY = 80


def _device_type(moe: FusedMoEConfig) -> str:
    return str(moe.device).partition(":")[0]


def _why_not_anywhere(moe: FusedMoEConfig) -> str | None:
    if dtype_name(moe.in_dtype) not in DTYPES:
        return f"in_dtype is {dtype_name(moe.in_dtype)}, its kernels take {', '.join(DTYPES)}"
    if moe.is_lora_enabled:
        return "is_lora_enabled is set, its kernels have no adapters"
    return None


def _why_not_rawkernels(moe: FusedMoEConfig) -> str | None:
    """Reason why the kernels of `cumoe.rawkernels` cannot run the layer, or None."""
    if _device_type(moe) != "cuda":
        return f"device is {str(moe.device)!r}, it runs on cuda"
    device = str(moe.device)
    try:
        cupy = _arrays.namespace(device)
    except (ImportError, RuntimeError, ValueError) as error:
        return str(error)
    with _arrays.device_scope(device):
        capability = int(cupy.cuda.Device().compute_capability)
    if capability < _LEAST_CAPABILITY:
        return f"the device has compute capability {capability / 10}, its kernels need {_LEAST_CAPABILITY / 10}"
    return _why_not_anywhere(moe)


def _why_not_cpu(moe: FusedMoEConfig) -> str | None:
    """Reason why the loops of `cumoe.cpu` cannot run the layer, or None."""
    if _device_type(moe) != "cpu":
        return f"device is {str(moe.device)!r}, it runs on cpu"
    return _why_not_anywhere(moe)


_CANDIDATES: tuple[tuple[str, Callable[[FusedMoEConfig], str | None]], ...] = (
    ("rawkernels", _why_not_rawkernels),
    ("cpu", _why_not_cpu),
)


def select_backend(moe: FusedMoEConfig) -> tuple[str, dict[str, str]]:
    """
    Choose who runs a layer, and say why the others do not.

    Parameters
    ----------
    moe : FusedMoEConfig
        The layer. Its `moe_backend` is obeyed; ``"auto"`` takes the first that can.

    Returns
    -------
    backend : {"rawkernels", "cpu"}
        The side that runs the layer.
    refused : dict of str
        Reason for each backend that cannot.

    Raises
    ------
    ValueError
        `moe_backend` is no backend.
    NotImplementedError
        No backend, or not the one asked for, can run the layer; the message has the reasons.

    Examples
    --------
    >>> from cumoe import FusedMoEConfig, FusedMoEParallelConfig
    >>> from cumoe.method import select_backend
    >>> moe = FusedMoEConfig(8, 2, 64, 8, FusedMoEParallelConfig.make(), "bfloat16")
    >>> select_backend(moe)
    ('cpu', {'rawkernels': "device is 'cpu', it runs on cuda"})
    """
    _check.choice("moe_backend", moe.moe_backend, ("auto", *(name for name, _ in _CANDIDATES)))
    reasons = {name: why_not(moe) for name, why_not in _CANDIDATES}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    if moe.moe_backend != "auto":
        if moe.moe_backend in refused:
            raise NotImplementedError(f"moe_backend {moe.moe_backend!r} cannot run: {refused[moe.moe_backend]}")
        return moe.moe_backend, refused
    able = [name for name in reasons if name not in refused]
    if not able:
        listed = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise NotImplementedError(f"no moe_backend can run: {listed}")
    return able[0], refused
