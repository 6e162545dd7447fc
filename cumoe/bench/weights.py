"""Random expert weights, drawn fast: every expert from its own stream, several at once."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cumoe.bench.shapes import DTYPES, Shape

_ROWS = 256  # rows drawn at a time: the float32 chunk stays in a cache


def draw(
    shape: Shape, dtype: str, seed: int = 0, progress: Callable[[Iterable[int]], Iterable[int]] = iter
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """
    Draw ``w1`` (E, 2I, H) and ``w2`` (E, H, I), normal with variance ``1 / H`` and ``1 / I``.

    The bits depend on `seed` alone, not on the number of threads. `progress` wraps the iteration over
    finished experts, as ``tqdm.tqdm`` does.
    """
    E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size
    w1 = np.empty((E, 2 * I, H), DTYPES[dtype])
    w2 = np.empty((E, H, I), DTYPES[dtype])

    def fill(e: int) -> int:
        rng = np.random.Generator(np.random.SFC64([seed, e]))
        for block in (w1[e], w2[e]):
            scale = np.float32(block.shape[1] ** -0.5)
            chunk = np.empty((min(_ROWS, block.shape[0]), block.shape[1]), np.float32)
            for first in range(0, block.shape[0], _ROWS):
                rows = block[first : first + _ROWS]
                part = chunk[: rows.shape[0]]
                rng.standard_normal(out=part, dtype=np.float32)
                part *= scale
                rows[...] = part
        return e

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        for _ in progress(pool.map(fill, range(E))):
            pass
    return w1, w2
