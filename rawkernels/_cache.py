"""
Compiled kernels on disk: one file each, named by a hash of everything it depends on.

The folder is ``cumoe`` inside CuPy's own cache folder (``CUPY_CACHE_DIR``, else ``~/.cupy/kernel_cache``); like
CuPy's kernels, ours stay off the disk under ``CUPY_CACHE_IN_MEMORY=1``. A file is a SHA-256 of its content and
the content. It is written under a temporary name and renamed, so that a reader sees all of it or none; a damaged
one is built again and replaced. Nothing is ever locked: processes that build the same kernel at the same time
write the same file. Any file may be deleted at any time.
"""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

_CHECKSUM_BYTES = 32

# how an entry came about
READ, BUILT, REBUILT = "on disk", "compiled", "damaged, compiled again"


def folder(root: str | Path | None = None) -> Path | None:
    """Where compiled kernels are kept: below `root`, or where CuPy keeps its own; None if nowhere."""
    root = root or os.environ.get("CUPY_CACHE_DIR")
    if root:
        return Path(root) / "cumoe"
    if os.environ.get("CUPY_CACHE_IN_MEMORY", "0") not in ("", "0"):
        return None
    try:
        return Path.home() / ".cupy" / "kernel_cache" / "cumoe"
    except RuntimeError:  # a user without a home
        return None


def fetch(
    name: str, parts: tuple[str, ...], maker: str | None, build: Callable[[], bytes], root: str | Path | None = None
) -> tuple[bytes, str]:
    """
    Return the content that `build` makes, from the disk if it was built before, and how it came about.

    `parts` are all that the content depends on, beside `maker`, the version of the compiler; without a compiler
    (None) the work of any will do. `name` only makes the file findable by eye. `root` stands for CuPy's folder.
    """
    where = folder(root)
    if where is None:
        return build(), BUILT
    digest = hashlib.sha256("\0".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()
    stem, how = f"{name}.{digest[:32]}", BUILT
    paths = [where / f"{stem}.{maker}.cubin"] if maker else sorted(where.glob(f"{stem}.*.cubin"), reverse=True)
    for path in paths:
        content, damaged = _read(path)
        if content is not None:
            return content, READ
        how = REBUILT if damaged else how
    content = build()
    _write(where / f"{stem}.{maker}.cubin", content)
    return content, how


def _read(path):
    """Content of an entry, or None; and whether there is a damaged one."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None, False
    checksum, content = stored[:_CHECKSUM_BYTES], stored[_CHECKSUM_BYTES:]
    return (content, False) if hashlib.sha256(content).digest() == checksum else (None, True)


def _write(path, content):
    """Write all or nothing; a folder that cannot be written costs the cache, not the result."""
    temporary = path.with_name(f".writing-{os.getpid()}-{threading.get_ident()}-{time.time_ns()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
