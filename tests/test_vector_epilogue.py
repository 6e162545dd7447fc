"""Rows that stay in registers from their sums to their results: the bits of the loops over single numbers."""

import numpy as np
import pytest

from cumoe.cpu import _vector_epilogue, epilogue, grouped_gemm, microkernel
from cumoe.cpu._jit import jit

ROWS, HALF = 13, {4: 8, 8: 8, 16: 32}
LANES = sorted({microkernel.choose("float32", name).lanes for name in microkernel.names("float32")})


def problem(rng, activation, dtype, has_all, half):
    """What an epilogue reads of a product: everything that there may be, or nothing."""
    outputs = 3 * half if activation else 6 * half
    nothing, no_matrix = np.empty(0, np.float32), np.empty((0, 0), np.float32)
    bits = np.float32 if dtype == "float32" else np.uint16
    fields = dict.fromkeys(grouped_gemm._Problem._fields, 0)
    fields |= {"x": np.zeros((ROWS, 4), bits), "out": np.zeros((ROWS, outputs), bits), "distance": 1}
    fields |= {
        "permuted_idx": rng.permutation(ROWS).astype(np.int32),
        "top_k": 1,
        "first_up": outputs if activation else -1,
    }
    numbers = rng.standard_normal((2, 2, 6 * half), np.float32)
    fields |= {"bias": numbers[0] if has_all else no_matrix, "column_factor": numbers[1] if has_all else no_matrix}
    scales = rng.standard_normal((2, ROWS), np.float32)
    fields |= {"output_scale": scales[0] if has_all else nothing, "row_factor": scales[1] if has_all else nothing}
    limit = np.float32(np.inf if activation == "silu" else 2)
    return grouped_gemm._Problem(**fields | {"alpha": np.float32(1.7), "beta": np.float32(0.5), "limit": limit})


finish = None  # jit(...) gives it a value


def finish_rows(p, sums, codes, edges, rows, column0, width):
    epilogue.put_rows(p, edges, sums.shape[1], 0, rows)
    finish(p, sums, codes, edges, 1, 0, rows, column0, width)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("activation", ["", "silu", "swigluoai"])
@pytest.mark.parametrize("is_integer", [False, True])
def test_the_bits_are_those_of_single_numbers(monkeypatch, is_integer, activation, dtype, lanes):
    if not _vector_epilogue.can_store(activation, dtype):
        pytest.skip("no conversion to float16 here")
    half = HALF[lanes]
    fast = epilogue.epilogue(activation, dtype, half, lanes, is_integer)
    monkeypatch.setattr(_vector_epilogue, "can_store", lambda activation, dtype: False)
    slow = epilogue.epilogue.__wrapped__(activation, dtype, half, lanes, is_integer)
    runs = [jit(finish=finish)(finish_rows) for finish in (fast, slow)]
    width = half if activation else 2 * half
    for has_all in (False, True):
        rng = np.random.default_rng(1)
        sums = 4 * rng.standard_normal((2, ROWS, half), np.float32)
        sums.reshape(-1)[:8] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e38, -100]
        if is_integer:
            sums.view(np.int32)[...] = rng.integers(-(2**31), 2**31, sums.shape) >> rng.integers(0, 31, sums.shape)
        results = []
        for run in runs:
            p = problem(np.random.default_rng(2), activation, dtype, has_all, half)
            codes = np.zeros(ROWS * 2 * half, p.out.dtype)
            edges = np.zeros(epilogue.edge_size(ROWS, 2 * half), np.float32)
            run(p, sums.copy(), codes, edges, ROWS, 0, width)
            run(p, sums.copy(), codes, edges, ROWS - 2, width, width - 3)  # a panel that is not full
            numbers = p.out.view(dtype)
            results.append(np.where(np.isnan(numbers.astype(np.float32)), 1, p.out.view(f"u{p.out.itemsize}")))
        np.testing.assert_array_equal(*results)  # signs of zeros too
        assert results[0].any()
        assert not results[0][:, 2 * width - 3 :].any() and not results[0][ROWS - 2 :, width:].any()
