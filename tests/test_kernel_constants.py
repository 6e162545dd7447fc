"""
Numbers that a launcher and its kernel both hold are the same, with no GPU: the compiler is asked.

A kernel file is cut off before its first kernel, so that only constants are left, and what must hold stands below
them as ``static_assert``.
"""

import ast
import itertools

import numpy as np
import pytest
from tree import GPU

pytest.importorskip("cuda.core", reason="cuda-core is not installed (extra `compile`)")

from cumoe.rawkernels import (
    _coded_weights,
    _compile,
    _grouped_gemm_mma,
    _grouped_gemm_wgmma,
    _rows,
    _tensor_maps,
    formats,
    grouped_gemm,
    permute,
    route,
    unpermute,
)

ARCH = "sm_90a"


def check(file, constants, **expected):
    """Let the compiler compare expressions of a kernel file with numbers."""
    text = _compile.source(file).partition('extern "C"')[0]
    claims = [f'static_assert(({name}) == {number}, "{name}");' for name, number in expected.items()]
    options = tuple(f"{name}={value}" for name, value in sorted(constants.items()))
    _compile.compile_text(file, "\n".join([text, *claims]), ARCH, options)


def constant_of(file, name):
    """A number that a kernel file in Python gives a name; importing the file would need Numba."""
    for node in ast.parse((GPU / file).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise KeyError(name)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("rows", "parted"), [(rows, parted) for parted in (0, 2) for rows in _grouped_gemm_wgmma.heights(False, parted)]
)
def test_tiles_of_hoppers_kernel(rows, parted, gated, scaled, factored):
    tile = _grouped_gemm_wgmma._tile(rows, parted)
    activation, gathered = "silu" if gated else "", gated
    given = {"scaled": scaled, "factored": factored, "of_codes": _coded_weights.constants("", 128, parted)}
    constants = _grouped_gemm_wgmma._constants(tile, "bfloat16", activation, gathered, **given)
    assert constants["GATED"] == gated
    barriers = 16  # of a stage
    check(
        "grouped_gemm_wgmma.cu",
        constants,
        BLOCK_K=_tensor_maps.BLOCK_K,
        WEIGHTS=tile.weights,
        STAGE=tile.stage_bytes - barriers,
        **{
            "GROUPS * 4 * STAGING + Announced::BYTES + (PARTED ? GROUPS * 2 * FACTORS : 0)": tile.fixed_bytes(
                gated, gathered, scaled, factored, parted
            )
        },
    )


@pytest.mark.parametrize("rule", _coded_weights.BITS)
def test_codes_between_the_rings(rule):
    """Of each rule its bits, and of the smallest tile what its ring of codes takes."""
    tile = _grouped_gemm_wgmma._TILES[8]
    constants = _grouped_gemm_wgmma._constants(
        tile, "bfloat16", "silu", True, of_codes=_coded_weights.constants(rule, 32)
    )
    barriers = 16
    check("grouped_gemm_wgmma.cu", constants, CODES=tile.code_bytes(rule) - barriers, PIECE=_coded_weights.PIECE)


def tiles_of_other_kernels():
    """One case for each tile, size of an element, and whether there is a gate."""
    found = {}
    for file, _, constants in _grouped_gemm_mma.variants(ARCH):
        names = ("X", "BLOCK_ROWS", "BLOCK_COLUMNS", "WARPS_M", "WARPS_N", "STAGES", "GATED", "CODED")
        found[file, *(constants[name] for name in names)] = file, constants
    return [pytest.param(*case, id=" ".join(map(str, key))) for key, case in found.items() if "float16" not in key]


@pytest.mark.parametrize(("file", "constants"), tiles_of_other_kernels())
def test_tiles_of_the_other_kernels(file, constants):
    shape = (constants[name] for name in ("BLOCK_ROWS", "BLOCK_COLUMNS", "WARPS_M", "WARPS_N", "STAGES", "MIN_CTAS"))
    tile = _grouped_gemm_mma.Tile(*shape, _coded_weights.BITS[constants["RULE"]] if constants["CODED"] else 0)
    item = 4 if constants["X"] == "float32" else 2
    held = tile.shared_bytes(constants["GATED"], item)
    used, staged = "(STAGES * STAGE + 2 * CODED * NUMBERS)", "BLOCK_ROWS * STAGED_PITCH * (int)sizeof(X)"
    check(
        file,
        constants,
        TILE_PITCH=_grouped_gemm_mma._PITCH,
        THREADS=tile.threads,
        STAGE=_grouped_gemm_mma._stage_bytes(tile.rows, tile.columns, tile.bits, item),
        **{f"{used} > {staged} ? {used} : {staged}": held},
    )


def test_a_warp_and_its_rows():
    for _, _, constants in itertools.islice(route.variants(ARCH), 1):
        check("route.cu", constants, SORTED_VALUES=_rows._SORTED_VALUES)
        check("route.cu", constants, **{f"(1 << INDEX_BITS) >= {_rows._MOST_EXPERTS}": 1})
    constants = unpermute._constants("bfloat16", "int32", False, 2) | {"BYTES": 16}
    check("unpermute.cu", constants, MAX_THREADS=unpermute._MOST_THREADS, WARP=unpermute._WARP)


def test_rows_in_registers():
    *_, constants = next(one for one in formats.variants(ARCH) if one[1] == "quantise_rows" and not one[2]["GIVEN"])
    check("format_rows.cu", constants, **{"TEAM * KEPT": formats._WARP * formats._KEPT})


def test_kernels_in_python():
    assert permute._SUMS_WORDS == constant_of("_sort_kernels.py", "SUMS_WORDS")
    for file in ("_sort_kernels.py", "_few_kernels.py", "_tile_kernels.py"):
        assert permute._WARP == permute._FEW_PAIRS == constant_of(file, "WARP")


def test_a_number_that_differs_is_noticed():
    constants = unpermute._constants("bfloat16", "int32", False, 2) | {"BYTES": 16}
    with pytest.raises(Exception, match=r"static assertion failed with .MAX_THREADS"):
        check("unpermute.cu", constants, MAX_THREADS=128)


# -- sizes that a kernel cannot count ---------------------------------------------------------------


def huge(*shape):
    """An array of any size that takes no memory."""
    return np.broadcast_to(np.uint16(0), shape)


def product(kernel, x, top_k, out):
    nothing = np.empty(0, np.float32)
    order = np.zeros(8 if top_k else 0, np.int32)
    scales = nothing, nothing, nothing, nothing
    steps = "", False, 0.0, 0.0, 0.0, "bfloat16", kernel, nothing, 8, False
    grouped_gemm.grouped_gemm(x, order, top_k, nothing, huge(1, 8, 8), None, nothing, *scales, *steps, nothing, out)


@pytest.mark.parametrize("kernel", ["wgmma", "mma"])
def test_more_rows_than_a_schedule_counts(kernel):
    with pytest.raises(
        NotImplementedError, match=r"^no kernel for 2147483648 rows in one product; at most 2147483647$"
    ):
        product(kernel, huge(2**31, 8), 0, huge(2**31, 8))


def test_more_tokens_than_a_gather_counts():
    with pytest.raises(
        NotImplementedError, match=r"^no kernel for tokens of 34359738376 elements; wgmma: at most 3435"
    ):
        product("wgmma", huge(2**32 + 1, 8), 1, huge(8, 8))
