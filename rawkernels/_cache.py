"""
Compiled kernels on disk: one file each, named by a hash of everything it depends on.

The folder is ``cumoe`` inside CuPy's own cache folder (``CUPY_CACHE_DIR``, else ``~/.cupy/kernel_cache``).
A file is a SHA-256 of its content and the content. It is written under a temporary name and renamed, so that
a reader sees all of it or none; a damaged one is built again and replaced.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

_CHECKSUM_BYTES = 32


def folder():
    """Where compiled kernels are kept."""
    given = os.environ.get("CUPY_CACHE_DIR")
    return (Path(given) if given else Path.home() / ".cupy" / "kernel_cache") / "cumoe"


def get_or_build(name: str, parts: tuple[str, ...], build: Callable[[], bytes], where: Path | None = None) -> bytes:
    """
    Return the content that `build` makes, from the disk if `parts` were built before.

    `parts` are all that the content depends on; `name` only makes the file findable by eye. `where` is
    another folder than `folder()`.
    """
    digest = hashlib.sha256("\0".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()
    path = (where or folder()) / f"{name}.{digest[:32]}.cubin"
    content = _read(path)
    if content is None:
        content = build()
        _write(path, content)
    return content


def _read(path):
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    checksum, content = stored[:_CHECKSUM_BYTES], stored[_CHECKSUM_BYTES:]
    return content if hashlib.sha256(content).digest() == checksum else None


def _write(path, content):
    """Write all or nothing; a folder that cannot be written costs the cache, not the result."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if not isinstance(error, OSError):
            raise
