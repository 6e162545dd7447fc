"""
The tensors of a checkpoint directory, read as views of its files.

The safetensors library validates a shard's header, this file maps its data.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers "bfloat16" and the small floats as NumPy dtype names
import numpy as np

from cumoe import _check

FLOATS = ("F32", "F16", "BF16")

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
}


class Tensors:
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

    def kind(self, name: str) -> str:
        """Dtype of a tensor as safetensors calls it, "" if there is no such tensor."""
        if name not in self._shard_of:
            return ""
        return str(self._entry(name)[1]["dtype"])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._entry(name)[1]["shape"])

    def read(
        self,
        name: str,
        letters: str,
        *shapes: tuple[int, ...],
        dtype: Any = None,
        kinds: tuple[str, ...] = FLOATS,
        fix: str = "",
    ) -> np.ndarray:
        """A read-only view of the file; raise unless shape and dtype are right. `fix` ends what is said of a shape."""
        data, entry = self._entry(name)
        label = f"tensor {name!r}"
        if entry["dtype"] not in kinds:
            raise TypeError(f"{label} must be {_either(kinds)}, got {entry['dtype']}")
        start, end = entry["data_offsets"]
        array = data[start:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if array.shape not in shapes:
            if fix:
                raise ValueError(f"{label} must have shape {letters} = {shapes[0]}, got {array.shape}; {fix}")
            _check.shape(label, array, letters, shapes[0])
        if dtype is not None and array.dtype != dtype:
            raise TypeError(f"{label} must have the dtype of the first expert = {dtype.name}, got {array.dtype.name}")
        return array

    def _entry(self, name: str) -> tuple[np.ndarray, dict[str, Any]]:
        """Data section of a tensor's shard, and what the header says of it."""
        self.require([name])
        shard = self._shard_of[name]
        data, header = self._shard(shard)
        if name not in header:
            raise ValueError(f"{shard} must hold tensor {name!r} as {_INDEX} says, got a shard without it")
        return data, header[name]

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


def read_json(path: Path) -> dict[str, Any]:
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
    shard_of = read_json(path).get("weight_map")
    if not isinstance(shard_of, dict):
        raise ValueError(f"{path} must hold an object 'weight_map', got {type(shard_of).__name__}")
    for shard in shard_of.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{path} must map tensors to file names, got {shard!r}")
    return shard_of


def _either(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
