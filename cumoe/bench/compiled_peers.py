"""
The same layer by compiled C++ for this very purpose: vLLM's CPU operations and AMD's zentorch.

Neither package is imported: one needs a whole server around it, the other changes torch's compiler. Their operation
libraries register themselves with torch when they are loaded, and are called as vLLM's own Python calls them. Where
tokens are quantised, that is inside the operation and on the clock.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cumoe.bench import schemes
from cumoe.bench.peers import Array, Layer, Peer, as_torch, in_torch

_GPTQ = 1  # the order of four-bit codes that convert_weight_packed_scale_zp is told
_ZERO_POINT_8 = 0x77777777  # GPTQ stores zero points less one

# moe_comp_method of fused_experts_cpu
_UNQUANTISED, _INT8_W8A8, _FP8_W8A16, _INT4_W4A8, _MXFP4 = range(5)


def _load(package: str, name: str, namespace: str, operations: Sequence[str]) -> str:
    """Load the operation library of a package that is installed; why it cannot be used, or ""."""
    import torch

    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or ()
    found = [path for folder in folders if (path := Path(folder) / name).exists()]
    if not found:
        return f"{package} has no {name}"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as problem:  # of another version of torch, or for another device
        return f"{name} of {package} does not load: {problem}"
    for operation in operations:
        if not hasattr(getattr(torch.ops, namespace), operation):
            return f"{name} of {package} has no operation {operation}"
    return ""


def _load_vllm() -> str:
    # the very choice that vLLM makes
    import torch

    if torch.cpu._is_avx512_bf16_supported():
        name = "_C.abi3.so"
    else:
        name = "_C_AVX512.abi3.so" if torch.cpu._is_avx512_supported() else "_C_AVX2.abi3.so"
    packing = "convert_weight_packed", "convert_scale_packed", "convert_weight_packed_scale_zp"
    return _load("vllm", name, "_C", ("cpu_fused_moe", "prepack_moe_weight", "fused_experts_cpu", *packing))


def _load_zentorch() -> str:
    operations = "zentorch_fused_moe", "zentorch_flush_moe_weight_cache", "zentorch_woq_repack_weight"
    return _load("zentorch", "libzentorch.so", "zentorch", operations)


def _sizes_are_multiples(w2: Any, factor: int) -> None:
    """The operations trust their caller."""
    _, hidden, intermediate = schemes.numbers(w2).shape
    if hidden % factor or intermediate % factor:
        raise ValueError(f"H and I must be multiples of {factor}, got {hidden} and {intermediate}")


# -- vLLM -------------------------------------------------------------------------------------------


def _vllm_vec(w1: Array, w2: Array) -> Layer:
    """What vLLM takes on a CPU without AMX and without zentorch."""
    import torch

    _sizes_are_multiples(w2, 32)
    operations = torch.ops._C
    packed = []
    for weights in map(as_torch, (w1, w2)):
        packed.append(torch.empty_like(weights))
        operations.prepack_moe_weight(weights, packed[-1], "vec")

    def layer(x: Any, topk_weights: Any, topk_ids: Any) -> Any:
        out = torch.empty_like(x)
        operations.cpu_fused_moe(out, x, *packed, None, None, topk_weights, topk_ids, False, "silu", "vec")
        return out

    return in_torch(layer)


def _sgl_layer(
    method: int,
    weights: Sequence[Any],
    scales: Sequence[Any] = (None, None),
    zero_points: Sequence[Any] = (None, None),
    block_shape: list[int] | None = None,
) -> Layer:
    """The operation that came from SGLang, on weights that it has packed."""
    import torch

    operation = torch.ops._C.fused_experts_cpu
    nothing = None, None, None, None  # biases, alpha and limit of an activation

    def layer(x: Any, topk_weights: Any, topk_ids: Any) -> Any:
        out = torch.empty_like(x)
        given = x, *weights, topk_weights, topk_ids, method, *scales, *zero_points
        operation(out, *given, None, block_shape, *nothing, True)
        return out

    return in_torch(layer)


def _vllm_sgl(w1: Any, w2: Any) -> Layer:
    """Plain weights, or codes with a scale for each row, block or group."""
    import torch

    _sizes_are_multiples(w2, 32)
    pack, pack_scale = torch.ops._C.convert_weight_packed, torch.ops._C.convert_scale_packed
    if isinstance(w1, np.ndarray):
        return _sgl_layer(_UNQUANTISED, [pack(as_torch(w)) for w in (w1, w2)])
    both = w1, w2
    weights = [pack(as_torch(w.values)) for w in both]
    scales = [as_torch(w.scale) for w in both]
    if w1.scheme == "int8":
        return _sgl_layer(_INT8_W8A8, weights, scales)
    if w1.scheme == "fp8":
        return _sgl_layer(_FP8_W8A16, weights, scales, block_shape=list(w1.group_shape))
    return _sgl_layer(_MXFP4, weights, [pack_scale(scale) for scale in scales])


def _vllm_sgl_int4(w1: Any, w2: Any) -> Layer:
    """Four-bit weights in groups of 128, tokens in eight bits, whatever the checkpoint says."""
    import torch

    _sizes_are_multiples(w2, 128)  # of a group that ends early it reads on
    packed = []
    for w in (w1, w2):
        words = np.ascontiguousarray(w.values.view(np.int32).transpose(0, 2, 1))  # (E, K/8, N): the even k lower too
        scale = np.ascontiguousarray(w.scale.transpose(0, 2, 1))
        zero_points = np.full((*scale.shape[:2], words.shape[2] // 8), _ZERO_POINT_8, np.int32)
        given = torch.from_numpy(words), torch.from_numpy(zero_points), as_torch(scale)
        packed.append(torch.ops._C.convert_weight_packed_scale_zp(*given, _GPTQ))
    weights, zeros, scales = zip(*packed, strict=True)
    return _sgl_layer(_INT4_W4A8, weights, scales, zeros)


def _codes(w: Any) -> Array:
    """Four-bit codes (E, N, K), one a byte, from 0 to 15."""
    codes = np.empty((*w.values.shape[:2], 2 * w.values.shape[2]), np.uint8)
    codes[..., 0::2] = w.values & 15
    codes[..., 1::2] = w.values >> 4
    return codes


# -- zentorch ---------------------------------------------------------------------------------------


def _zentorch_layer(weights: Sequence[Any], scales: Sequence[Any] = ()) -> Layer:
    import torch

    operations = torch.ops.zentorch
    # it packs at the first call and remembers the result by an address, which other weights may have had
    operations.zentorch_flush_moe_weight_cache()

    def layer(x: Any, topk_weights: Any, topk_ids: Any) -> Any:
        out = torch.empty_like(x)
        operations.zentorch_fused_moe(out, x, *weights, None, None, topk_weights, topk_ids, False, "silu", *scales)
        return out

    return in_torch(layer)


def _zentorch(w1: Any, w2: Any) -> Layer:
    """Plain weights, or eight-bit ones with a scale a row."""
    if isinstance(w1, np.ndarray):
        return _zentorch_layer([as_torch(w) for w in (w1, w2)])
    scales = [as_torch(w.scale.reshape(len(w.scale), -1)) for w in (w1, w2)]
    return _zentorch_layer([as_torch(w.values) for w in (w1, w2)], scales)


def _zentorch_int4(w1: Any, w2: Any) -> Layer:
    """Four-bit weights in groups of 128, tokens in eight bits."""
    import torch

    repack: Callable[[Any], Any] = torch.ops.zentorch.zentorch_woq_repack_weight
    weights, scales = [], []
    for w in (w1, w2):
        signed = (torch.from_numpy(_codes(w._replace(values=w.values[e : e + 1]))[0]) for e in range(len(w.values)))
        weights.append(torch.stack([repack(codes.to(torch.int8) - 8) for codes in signed]))
        scales.append(as_torch(np.ascontiguousarray(w.scale.transpose(0, 2, 1))))
    return _zentorch_layer(weights, scales)


def _all_copied(scheme: str) -> float:
    return 1.1  # rows are padded, and rows of eight bits get their sum


_INT8, _INT4 = "int8 w8a8", ("int4 w4a8", "int4 w4a16")
_SGL_SCHEMES = "bfloat16", _INT8, "fp8 w8a16", "mxfp4 w4a16"  # float16 would end the process
_ZENTORCH_SCHEMES = "bfloat16", "float32", _INT8

PEERS: tuple[Peer, ...] = (
    Peer(
        "vLLM vec",
        "cpu_fused_moe of vLLM, isa vec",
        ("torch", "vllm"),
        ("bfloat16", "float16", "float32"),
        _vllm_vec,
        _all_copied,
        load=_load_vllm,
    ),
    Peer(
        "vLLM SGL",
        "fused_experts_cpu of vLLM, the kernels of SGLang",
        ("torch", "vllm"),
        _SGL_SCHEMES,
        _vllm_sgl,
        _all_copied,
        load=_load_vllm,
    ),
    Peer(
        "vLLM SGL w4a8",
        "fused_experts_cpu of vLLM, tokens in eight bits",
        ("torch", "vllm"),
        _INT4,
        _vllm_sgl_int4,
        _all_copied,
        load=_load_vllm,
        rounds_activations=True,
    ),
    Peer(
        "zentorch",
        "zentorch_fused_moe",
        ("torch", "zentorch"),
        _ZENTORCH_SCHEMES,
        _zentorch,
        _all_copied,
        load=_load_zentorch,
    ),
    Peer(
        "zentorch w4a8",
        "zentorch_fused_moe, tokens in eight bits",
        ("torch", "zentorch"),
        _INT4,
        _zentorch_int4,
        _all_copied,
        load=_load_zentorch,
        rounds_activations=True,
    ),
)
