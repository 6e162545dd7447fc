"""
A Hugging Face checkpoint directory in, one runnable `MoELayer` out.

Shards are memory-mapped and only the tensors of the one layer are read, so that a layer of a model
larger than the memory loads. The safetensors library validates a shard's header, this file maps its data.
"""

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers "bfloat16" as a NumPy dtype name
import numpy as np

from cumoe import _arrays, _check
from cumoe._families import LayerSpec, layer_spec
from cumoe._prepare import prepare
from cumoe.layer import MoELayer, SharedExpert

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def load_layer(
    checkpoint_dir: str | os.PathLike[str], layer: int, *, device: str = "cpu", scheme: str | None = None
) -> MoELayer:
    """
    Load one MoE layer, with its router and shared expert, from a Hugging Face checkpoint directory.

    Parameters
    ----------
    checkpoint_dir : path
        Directory with config.json and model.safetensors, or model.safetensors.index.json and its shards.
        Model types: deepseek_v3, mixtral, qwen2_moe, qwen3_moe; one key an expert or fused 3-D keys.
    layer : int
        Number of the decoder layer, from 0.
    device : {"cpu", "cuda", "cuda:0", ...}
        Where the weights go; "cuda" is the current device.
    scheme : None
        None keeps the checkpoint's own dtype.

    Returns
    -------
    layer : MoELayer
        ``layer(hidden_states)`` runs it. It owns copies of the weights: the files may go away.

    Raises
    ------
    FileNotFoundError
        No such directory, config.json or shard.
    TypeError
        A field of config.json or a tensor has the wrong type.
    ValueError
        A dense layer, a layer number out of range, a missing field or tensor, a wrong shape, a broken file.
    NotImplementedError
        A model type, activation or quantisation without a loader.
    RuntimeError
        No CUDA device.

    Notes
    -----
    Only shards that hold tensors of this layer need to exist. While it loads, the layer's weights are in
    memory twice: as in the checkpoint and as `cumoe.prepare` lays them out.

    Examples
    --------
    >>> layer = cumoe.load_layer("Qwen3-30B-A3B", 0)  # doctest: +SKIP
    >>> out = layer(hidden_states)  # doctest: +SKIP
    """
    xp = _arrays.namespace(device)
    if scheme is not None:
        raise NotImplementedError(f"no loader for scheme {scheme!r}; available: None, the checkpoint's own dtype")
    directory = Path(checkpoint_dir)
    if not directory.is_dir():
        raise FileNotFoundError(f"checkpoint_dir must be a directory with config.json, got {str(directory)!r}")
    spec = layer_spec(_read_json(directory / "config.json"), layer)
    tensors = _Tensors(directory)
    module = _find_module(tensors, spec)

    H, E = spec.hidden_size, spec.num_experts
    router_weight = tensors.read(f"{module}.gate.weight", "(E, H)", (E, H))
    router_bias = None
    if spec.router_bias:
        router_bias = tensors.read(f"{module}.{spec.router_bias}", "(E,)", (E,)).astype(np.float32)
    router_weight = router_weight.astype(np.float32 if spec.float32_router else router_weight.dtype)
    w1, w2 = _routed_experts(tensors, spec, f"{module}.experts")
    with _arrays.device_scope(device):
        shared = _shared_expert(xp, tensors, spec, module, w1.dtype) if spec.shared_intermediate_size else None
        return MoELayer(
            name=f"{spec.model_type} layer {spec.layer} of {directory.name or directory}",
            hidden_size=H,
            intermediate_size=spec.intermediate_size,
            num_experts=E,
            dtype=w1.dtype.name,
            routing=spec.routing,
            router_weight=xp.asarray(router_weight),
            router_bias=None if router_bias is None else xp.asarray(router_bias),
            experts=prepare(xp.asarray(w1), xp.asarray(w2), activation=spec.activation),
            shared=shared,
        )


class _Tensors:
    """The tensors of a checkpoint directory; a shard is opened when its first tensor is read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[str, tuple[np.ndarray, dict[str, Any]]] = {}
        if (directory / _INDEX).exists():
            self._shard_of = _read_index(directory / _INDEX)
        elif (directory / _SINGLE).exists():
            self._shard_of = dict.fromkeys(self._shard(_SINGLE)[1], _SINGLE)
        else:
            raise FileNotFoundError(f"{directory} must hold {_SINGLE} or {_INDEX}, got neither")

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def under(self, prefix: str) -> bool:
        """Whether any tensor's name starts with `prefix`."""
        return any(name.startswith(prefix) for name in self._shard_of)

    def require(self, names: list[str]) -> None:
        """Raise unless all of `names` exist."""
        missing = [name for name in names if name not in self._shard_of]
        if missing:
            more = f" and {len(missing) - 1} more of this layer" if len(missing) > 1 else ""
            raise ValueError(f"{self._directory} must hold tensor {missing[0]!r}{more}, got none of that name")

    def read(self, name: str, letters: str, *shapes: tuple[int, ...], dtype: Any = None) -> np.ndarray:
        """A read-only view of the file; raise unless shape and dtype are right."""
        self.require([name])
        shard = self._shard_of[name]
        data, header = self._shard(shard)
        if name not in header:
            raise ValueError(f"{shard} must hold tensor {name!r} as {_INDEX} says, got a shard without it")
        entry, label = header[name], f"tensor {name!r}"
        if entry["dtype"] not in _DTYPES:
            raise TypeError(f"{label} must be F32, F16 or BF16, got {entry['dtype']}")
        start, end = entry["data_offsets"]
        array = data[start:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if array.shape not in shapes:
            _check.shape(label, array, letters, shapes[0])
        if dtype is not None and array.dtype != dtype:
            raise TypeError(f"{label} must have the dtype of the first expert = {dtype.name}, got {array.dtype.name}")
        return array

    def _shard(self, shard: str) -> tuple[np.ndarray, dict[str, Any]]:
        """Data section and header of a shard."""
        if shard not in self._open:
            path = self._directory / shard
            if not path.exists():
                raise FileNotFoundError(f"{path} must exist, as {_INDEX} says, got no such file; download it again")
            self._open[shard] = _map_safetensors(path)
        return self._open[shard]


def _map_safetensors(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} must be a complete safetensors file, got {_damage(path, error)}") from None
    content = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    header.pop("__metadata__", None)
    return content[start:], header


def _damage(path: Path, error: Exception) -> str:
    """What is wrong with a file that the safetensors library refused, and what to do."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if head == b"version ":
            return "a Git LFS pointer; run git lfs pull"
        length = int.from_bytes(head, "little")
        try:
            header = json.loads(file.read(length)) if length < size else {}
            end = 8 + length + max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            end = 0
    if size < end:
        return f"{size} of {end} bytes; download it again"
    return f"{size} bytes ({error}); download it again"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} must exist, got no such file; checkpoint_dir is not a checkpoint")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _read_index(path: Path) -> dict[str, str]:
    shard_of = _read_json(path).get("weight_map")
    if not isinstance(shard_of, dict):
        raise ValueError(f"{path} must hold an object 'weight_map', got {type(shard_of).__name__}")
    for shard in shard_of.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{path} must map tensors to file names, got {shard!r}")
    return shard_of


def _find_module(tensors: _Tensors, spec: LayerSpec) -> str:
    """Name of the MoE module: models saved with their language-model head put "model." in front."""
    layers = [f"{prefix}layers.{spec.layer}" for prefix in ("model.", "")]
    modules = [f"{layer}.{block}" for layer in layers for block in spec.blocks]
    for module in modules:
        if tensors.under(f"{module}.experts."):
            return module
    dense = [name for layer in layers if (name := f"{layer}.mlp.gate_proj.weight") in tensors]
    if dense:
        raise ValueError(f"layer must be an MoE layer of this model, got {spec.layer}, which has {dense[0]!r}")
    raise ValueError(f"the checkpoint must hold tensors '{modules[0]}.experts.*', got none of these names")


def _routed_experts(tensors: _Tensors, spec: LayerSpec, experts: str) -> tuple[np.ndarray, np.ndarray]:
    """(w1, w2), stacked, gate rows first."""
    H, I, E = spec.hidden_size, spec.intermediate_size, spec.num_experts
    fused = f"{experts}.gate_up_proj", f"{experts}.down_proj"
    if any(name in tensors for name in fused):
        tensors.require(list(fused))
        straight, swapped = ((E, 2 * I, H), (E, H, I)), ((E, H, 2 * I), (E, I, H))
        w1 = tensors.read(fused[0], "(E, 2I, H)", straight[0], swapped[0])
        w2 = tensors.read(fused[1], "(E, H, I)", straight[1], swapped[1], dtype=w1.dtype)
        if (w1.shape, w2.shape) == swapped:
            w1, w2 = w1.transpose(0, 2, 1), w2.transpose(0, 2, 1)
        for name, array, letters, shape in zip(fused, (w1, w2), ("(E, 2I, H)", "(E, H, I)"), straight, strict=True):
            _check.shape(f"tensor {name!r}", array, letters, shape)
        return np.require(w1, requirements="A"), np.require(w2, requirements="A")
    names = [[f"{experts}.{e}.{projection}.weight" for projection in spec.projections] for e in range(E)]
    tensors.require([name for expert in names for name in expert])
    dtype = tensors.read(names[0][0], "(I, H)", (I, H)).dtype
    w1, w2 = np.empty((E, 2 * I, H), dtype), np.empty((E, H, I), dtype)
    for e in range(E):
        _read_expert(tensors, names[e], w1[e], w2[e])
    return w1, w2


def _read_expert(tensors: _Tensors, names: list[str], w1: np.ndarray, w2: np.ndarray) -> None:
    """Copy one expert into w1 (2I, H) and w2 (H, I)."""
    H, I = w2.shape
    gate, up, down = names
    w1[:I] = tensors.read(gate, "(I, H)", (I, H), dtype=w1.dtype)
    w1[I:] = tensors.read(up, "(I, H)", (I, H), dtype=w1.dtype)
    w2[:] = tensors.read(down, "(H, I)", (H, I), dtype=w1.dtype)


def _shared_expert(xp: Any, tensors: _Tensors, spec: LayerSpec, module: str, dtype: Any) -> SharedExpert:
    H, I = spec.hidden_size, spec.shared_intermediate_size
    w1, w2 = np.empty((1, 2 * I, H), dtype), np.empty((1, H, I), dtype)
    names = [f"{module}.{spec.shared_expert}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    tensors.require(names)
    _read_expert(tensors, names, w1[0], w2[0])
    gate_weight = None
    if spec.shared_gate:
        gate_weight = xp.asarray(tensors.read(f"{module}.{spec.shared_gate}.weight", "(1, H)", (1, H)).copy())
    experts = prepare(xp.asarray(w1), xp.asarray(w2), activation=spec.activation)
    return SharedExpert(experts, I, gate_weight)
