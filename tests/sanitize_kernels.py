"""
Every kernel at small odd sizes, under compute-sanitizer: `make sanitize`, on a machine with a GPU.

Without an argument this program compiles all kernels that its calls need, in parallel, and starts itself with --calls
under memcheck, racecheck and synccheck at the same time. It ends with 1 if one of them finds anything or cannot run.
With --calls it makes the calls and judges the layers' results; it fails if a kernel that a launcher lists is not
among those called.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16
import numpy as np

import cumoe
from cumoe import config
from cumoe.rawkernels import _grouped_gemm_mma, _grouped_gemm_wgmma, _load, _numba, _variants, grouped_gemm

TOOLS = {
    "memcheck": r"ERROR SUMMARY: 0 errors",
    "racecheck": r"RACECHECK SUMMARY: 0 hazards",
    "synccheck": r"ERROR SUMMARY: 0 errors",
}
DTYPES = ("bfloat16", "float16", "float32")

# constants that make a tile: each that a launcher lists is called
_OF_MMA = "BLOCK_ROWS BLOCK_COLUMNS WARPS_M WARPS_N GATED SCALED FACTORED CODED PARTED".split()
TILE = {
    "grouped_gemm_wgmma.cu": ("COLUMNS", "M_BLOCKS", "GROUPS", "GATED", "GATHERED", "FACTORED", "CODED", "PARTED"),
    **dict.fromkeys(("grouped_gemm_mma.cu", "grouped_gemm_fma.cu"), ("X", *_OF_MMA)),
}


# -- the calls --------------------------------------------------------------------------------------


class Device:
    """Draws arrays of the device; `judged` says whether results mean anything."""

    def __init__(self, xp, judged=True):
        self.xp, self.judged, self.rng = xp, judged, np.random.default_rng(0)

    def floats(self, *shape, dtype="float32"):
        """Normal numbers."""
        return self.xp.asarray(self.rng.standard_normal(shape, np.float32).astype(dtype))

    def integers(self, most, *shape, dtype="int32", least=0):
        """Numbers from least..most-1."""
        return self.xp.asarray(self.rng.integers(least, most, shape).astype(dtype))

    def ids(self, num_tokens, top_k, num_experts, dtype="int32"):
        """Expert ids, some of them beyond the experts, and negative where the dtype has such."""
        drawn = self.rng.integers(-1, num_experts + 2, (num_tokens, top_k))
        return self.xp.asarray(drawn.astype(dtype))


def route(d):
    """Logits to weights and ids: in registers and not, each scoring function, with everything that can be added."""
    for dtype in DTYPES:
        for num_experts in (1, 8, 37, 128, 500, 1100):
            logits, top_k = d.floats(13, num_experts, dtype=dtype), min(3, num_experts)
            cumoe.fused_topk(logits, top_k)
            bias = d.floats(num_experts)
            cumoe.fused_topk(logits, top_k, scoring_func="sigmoid", e_score_correction_bias=bias, indices_dtype="int64")
    logits, num_experts = d.floats(13, 60), 60
    padding = d.integers(2, 13, dtype="bool")
    cumoe.fused_topk(logits, 33, scoring_func="sqrtsoftplus", is_padding=padding, per_expert_scale=d.floats(60))
    tokens, table = d.integers(50, 13, dtype="int64"), d.integers(num_experts, 40, 5)
    cumoe.hash_topk(logits, tokens, table, is_padding=padding)
    images = {"bias_vl": d.floats(60), "image_sentinel_lo": 45}
    cumoe.fused_topk(logits, 5, scoring_func="sigmoid", input_ids=tokens, **images)


def grouped_route(d):
    """The same, by groups."""
    sizes = ((160, 8, 3, 6), (256, 8, 4, 8), (31, 31, 9, 7), (384, 1, 1, 8), (60, 4, 2, 5), (1536, 8, 3, 6))
    for dtype in DTYPES:
        for num_experts, groups, kept, top_k in sizes if dtype == "bfloat16" else sizes[2:4]:
            logits = d.floats(9, num_experts, dtype=dtype)
            named = {"num_expert_group": groups, "topk_group": kept}
            cumoe.grouped_topk(logits, top_k, **named)
            bias, padding = d.floats(num_experts), d.integers(2, 9, dtype="bool")
            named |= {"e_score_correction_bias": bias, "indices_dtype": "int64", "is_padding": padding}
            cumoe.grouped_topk(logits, top_k, scoring_func="sigmoid", **named)


def other_routes(d):
    """Dense tables of weights, experts that compute nothing."""
    for dtype in DTYPES:
        weights, ids = cumoe.topk_from_dense(d.floats(11, 37, dtype=dtype), 5)
        cumoe.dense_from_topk(weights, ids, 37)
        cumoe.topk_from_dense(d.floats(11, 1030, dtype=dtype), 40, indices_dtype="int64")
        for hidden_size in (37, 40):
            x = d.floats(11, hidden_size, dtype=dtype)
            cumoe.zero_experts(x, d.floats(11, 4), d.integers(12, 11, 4, dtype="int64"), 8)


def sort(d):
    """Pairs by expert: in one warp, in one block, in several, digit by digit; rows of every alignment."""
    sizes = ((0, 2, 5), (1, 1, 1), (7, 3, 5), (130, 3, 37), (1500, 3, 37), (90, 3, 8300), (33, 1, 1000))
    for num_tokens, top_k, num_experts in sizes:
        for dtype in ("int32", "int64", "uint32"):
            ids = d.integers(num_experts + 2, num_tokens, top_k, dtype=dtype)
            cumoe.moe_permute(d.floats(num_tokens, 9, dtype="bfloat16"), None, ids, num_experts)
    ids, expert_map = d.ids(40, 2, 6), d.xp.asarray(np.array([2, -1, 0, 1, -1, 3], np.int32))
    for width, dtype in ((37, "bfloat16"), (38, "bfloat16"), (36, "bfloat16"), (40, "bfloat16"), (520, "float32")):
        x = d.floats(40, width, dtype=dtype)
        cumoe.moe_permute(x, None, ids, 6, 4, expert_map)
        cumoe.moe_permute_aligned(x, None, ids, 4, alignment=16, expert_map=expert_map)
        batched, *_ = cumoe.moe_batch(x, ids, 4, 11, expert_map=expert_map)
        cumoe.moe_unbatch(batched, d.floats(40, 2), ids, expert_map=expert_map)
    odd = d.integers(256, 40, 37, dtype="uint8").view("float8_e4m3fn")
    cumoe.moe_permute(odd, d.floats(40, 1), ids, 6, 4, expert_map)
    cumoe.moe_batch(odd, ids, 4, 11, expert_map=expert_map, a1q_scale=d.floats(40, 1))


def align(d):
    """Blocks of one expert each."""
    expert_map = d.xp.asarray(np.array([2, -1, 0, 1, -1, 3], np.int32))
    for num_tokens, dtype in ((3, "int32"), (40, "int64"), (900, "uint32")):
        ids = d.integers(6, num_tokens, 3, dtype=dtype)
        cumoe.moe_align_block_size(ids, 16, 6)
        cumoe.moe_align_block_size(ids, 64, 6, expert_map=expert_map, pad_sorted_ids=True, return_scatter_idx=True)
        cumoe.moe_align_block_size(ids, 8, 6, expert_map=expert_map, ignore_invalid_experts=True)
        cumoe.count_expert_num_tokens(ids, 4, expert_map)
        cumoe.naive_block_assignment(d.integers(6, 2, 1, dtype=dtype), 16, 6)
    for dtype in ("int32", "int64"):
        cumoe.batched_moe_align_block_size(50, 16, d.integers(50, 5, dtype=dtype))


def activations(d):
    """Every layout, every alignment."""
    others = ("gelu", "gelu_tanh", "swigluoai", "swiglustep", "situ", "silu_no_mul", "relu2_no_mul")
    cases = [("silu", dtype, width) for dtype in DTYPES for width in (37, 38, 36, 40)]
    for name, dtype, width in (*cases, *((name, "bfloat16", width) for name in others for width in (37, 40))):
        columns = width if name.endswith("_no_mul") else 2 * width
        more = {"beta": 4.0} if name == "situ" else {}
        cumoe.moe_activation(d.floats(7, columns, dtype=dtype), name, **more)


def formats(d):
    """Every scheme and group, of every width of a load, and groups that several blocks share."""
    from quantised_rows import on_every_kernel

    schemes = (
        *((scheme, group, {}) for scheme in ("fp8", "int8", "uint8") for group in ((-1, -1), (1, -1), (1, 8), (3, 5))),
        *(("fp8", group, {"use_ue8m0": True}) for group in ((1, -1), (1, 32))),
        *(("int4", (1, 32), {"zero_points": zeros}) for zeros in (False, True)),
        *((scheme, None, {}) for scheme in ("mxfp4", "mxfp8", "nvfp4")),
        ("uint8", (128, 128), {"zero_points": True}),
    )
    for scheme, group, options in schemes:
        for dtype in DTYPES if scheme != "mxfp8" else DTYPES[:1]:
            for shape in ((3, 6, 38), (2, 130, 264)):
                quantized = cumoe.quantize(d.floats(*shape, dtype=dtype), scheme, group, **options)
                cumoe.dequantize(quantized, dtype)
    cumoe.quantize(d.floats(300, 1001), "fp8")
    cumoe.quantize(d.floats(38 * 4 + 1)[1:].reshape(4, 38), "nvfp4")
    cumoe.quantize(d.floats(0, 32), "fp8")
    on_every_kernel(d.xp, d.rng)


def unpermute(d):
    """Rows back to tokens."""
    sizes = ((37, 1), (40, 3), (520, 10), (9, 12), (9, 40))
    for dtype in DTYPES:
        for hidden_size, top_k in sizes if dtype == "bfloat16" else sizes[1:3]:
            rows = d.floats(50, hidden_size, dtype=dtype)
            index, weights = d.integers(55, 11, top_k, least=-2), d.floats(11, top_k)
            cumoe.moe_unpermute(rows, weights, index)
            cumoe.moe_unpermute(rows, None, index.astype("int64"), d.xp.asarray(np.array([0, 20, 40], np.int64)))
            x = d.floats(11, top_k, hidden_size, dtype=dtype)
            cumoe.moe_sum(x)
            cumoe.moe_fused_mul_sum(x, weights, d.ids(11, top_k, 6), d.integers(2, 6, least=-1))


def layers(d):
    """The whole layer on every kernel and tile: sizes that fit nothing, experts without a token, biases, a map."""
    wgmma = _load.capability() == 90
    for few in (False, True):  # many tiles for each multiprocessor, or a multiprocessor for each tile
        with as_if(multiprocessors=1 if few else None):
            if wgmma:
                for height in _grouped_gemm_wgmma._TILES:
                    layer(d, "wgmma", "bfloat16", height, 136, 72)
                    layer(d, "wgmma", "float16", height, 264, 136, biased=True)
            for kernel, dtype in (("mma", "bfloat16"), ("mma", "float16"), ("tf32", "float32"), ("fma", "float32")):
                for height in _grouped_gemm_mma._HEIGHTS:
                    layer(d, kernel, dtype, height, 264, 136)
                for height in (min(_grouped_gemm_mma._HEIGHTS), max(_grouped_gemm_mma._HEIGHTS)):
                    layer(d, kernel, dtype, height, 37, 19, biased=True)
                    layer(d, kernel, dtype, height, 264, 136, on_input=True)
                    layer(d, kernel, dtype, height, 40, 24, "relu2_no_mul", on_input=True)
    for kernel in ("mma", "wgmma") if wgmma else ("mma",):
        layer(d, kernel, "bfloat16", 16, 40, 24, activation="swigluoai", biased=True)
        layer(d, kernel, "bfloat16", 16, 40, 24, activation="relu2_no_mul")
        layer(d, kernel, "bfloat16", 16, 40, 24, mapped=True)
    a, b = d.floats(23, 40, dtype="bfloat16"), d.floats(3, 24, 40, dtype="bfloat16")
    for dtype in ("int32", "int64"):
        cumoe.grouped_gemm(a, b, d.xp.asarray(np.array([0, 5, 5, 23], dtype)), bias=d.floats(3, 24))
    logits, (w1, w2) = d.floats(6, 5), weights(d, "bfloat16", 40, 24)
    cumoe.fused_moe(d.floats(6, 40, dtype="bfloat16"), w1, w2, logits, top_k=2)


def products(d):
    """Weights that are codes, factors, and sums in parts, on every kernel and tile."""
    from parted_products import GPU_KERNELS, of_every_kind  # it imports pytest

    heights = {"wgmma": _grouped_gemm_wgmma.heights(True, False) if _load.capability() == 90 else ()}
    for dtype, kernel in GPU_KERNELS:
        with as_if(multiprocessors=1):
            for product in of_every_kind(d.xp, kernel, dtype, heights.get(kernel, _grouped_gemm_mma._HEIGHTS)):
                if product.is_wrong() and d.judged:
                    raise SystemExit(f"{kernel}, {dtype}: wrong, {product}")


def weights(d, dtype, hidden_size, intermediate_size, gated=True, num_experts=5):
    """Both products of a layer; results of order one."""
    rows = 2 * intermediate_size if gated else intermediate_size
    first = d.rng.standard_normal((num_experts, rows, hidden_size), np.float32) * hidden_size**-0.5
    second = d.rng.standard_normal((num_experts, hidden_size, intermediate_size), np.float32) * intermediate_size**-0.5
    return d.xp.asarray(first.astype(dtype)), d.xp.asarray(second.astype(dtype))


def layer(
    d,
    kernel,
    dtype,
    height,
    hidden_size,
    intermediate_size,
    activation="silu",
    biased=False,
    mapped=False,
    on_input=False,
):
    """One layer of 5 experts: one has a tile and a little more, one has nothing, some choices are skipped."""
    num_tokens = height + 5
    w1, w2 = weights(d, dtype, hidden_size, intermediate_size, not activation.endswith("_no_mul"))
    ids = d.rng.choice([-1, 0, 2, 4], (num_tokens, 2))
    ids[:, 0] = 3
    arrays = [d.floats(num_tokens, hidden_size, dtype=dtype), w1, w2, d.floats(num_tokens, 2)]
    arrays.append(d.xp.asarray(ids.astype(np.int32)))
    named = {"activation": activation, "apply_router_weight_on_input": on_input}
    if biased:
        biases = d.floats(*w1.shape[:2]), d.floats(*w2.shape[:2])
        named["quant_config"] = config.biased_moe_quant_config(*biases)
    if mapped:
        named["expert_map"] = d.xp.asarray(np.array([4, -1, 2, 0, 3, 1], np.int32))
    with as_if(height=height):
        out = cumoe.fused_experts(*arrays, **named, backend=kernel)
    if d.judged:
        found = cumoe.verify(out, *arrays, **named, backend=kernel)
        if not found.ok:
            raise SystemExit(
                f"{kernel}, {dtype}, tiles of {height} rows, H {hidden_size}, I {intermediate_size}: {found}"
            )


@contextlib.contextmanager
def as_if(multiprocessors=None, height=None):
    """Make the launchers believe in a small GPU, or take tiles of `height` rows."""
    before = _load.multiprocessors, _grouped_gemm_wgmma._MANY_UNITS, grouped_gemm.block_rows
    if multiprocessors is not None:
        _load.multiprocessors, _grouped_gemm_wgmma._MANY_UNITS = lambda device: multiprocessors, 0
    if height is not None:
        grouped_gemm.block_rows = lambda *sizes: height
    try:
        yield
    finally:
        _load.multiprocessors, _grouped_gemm_wgmma._MANY_UNITS, grouped_gemm.block_rows = before


CALLS = (route, grouped_route, other_routes, sort, align, activations, formats, unpermute, layers, products)


# -- what was called --------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded(launch=True):
    """Note (file, entry point, constants) of every kernel that is asked for; without `launch` none runs."""
    seen, makers = {}, (_load._kernel, _numba._kernel)

    def noting(make):
        def made(file, name, constants, device):
            seen[file, name, constants] = True
            return make(file, name, constants, device) if launch else lambda *arguments, **named: None

        return made

    _load._kernel, _numba._kernel = map(noting, makers)
    try:
        yield seen
    finally:
        _load._kernel, _numba._kernel = makers


def missing(seen, arch):
    """What the launchers list and nothing called: entry points, and tiles of the products."""

    def parts(file, name, constants):
        yield file, name
        if file in TILE:
            yield file, *((key, constants[key]) for key in TILE[file])

    called = {part for file, name, constants in seen for part in parts(file, name, dict(constants))}
    listed = {
        part
        for variant in _variants.default(arch)
        for name in variant.entries
        for part in parts(variant.file, name, dict(variant.constants))
    }
    return sorted(listed - called, key=str)


def make_calls(xp, launch=True):
    """Make every call; return what was asked for."""
    with recorded(launch) as seen:
        for call in CALLS:
            started = time.perf_counter()
            call(Device(xp, judged=launch))
            if launch:
                xp.cuda.Device().synchronize()
                print(f"{call.__name__}: {time.perf_counter() - started:.1f} s", flush=True)
    return seen


# -- the program ------------------------------------------------------------------------------------


def compile_one(kernel, arch):
    """Fill the cache, in a process of its own."""
    file, name, constants = kernel
    _variants.compiled(_variants.Variant(file, (name,), constants), arch)


def run_tool(tool, program):
    """Run the calls under one tool; return its last lines if it found something."""
    command = [program, "--tool", tool, "--error-exitcode", "86", "--print-limit", "20"]
    command += ["--report-api-errors", "no"]  # bindings ask the driver for functions that it may lack
    command += [sys.executable, __file__, "--calls"]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    clean = done.returncode == 0 and re.search(TOOLS[tool], done.stdout)
    print(f"{tool}: {'clean' if clean else 'NOT CLEAN'}, {time.perf_counter() - started:.0f} s", flush=True)
    return "" if clean else f"--- {tool}, exit status {done.returncode}\n{done.stdout[-12000:]}"


def find_sanitizer():
    """Path of compute-sanitizer."""
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [str(Path(toolkit, "bin")) for toolkit in toolkits if toolkit]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def main(arguments):
    """Return the exit status."""
    try:
        import cupy
    except ImportError:
        cupy = None
    if cupy is None or not cupy.cuda.is_available():
        print("sanitize needs CuPy and a CUDA device", file=sys.stderr)
        return 2
    arch = _load.architecture()
    if arguments == ["--calls"]:
        cupy.cuda.set_allocator(None)  # each array for itself, so that no neighbour hides an access beyond its end
        left_out = missing(make_calls(cupy), arch)
        print(f"not called: {left_out}" if left_out else "every listed kernel was called")
        return int(bool(left_out))
    tools = arguments or list(TOOLS)
    program = find_sanitizer()
    if program is None or not set(tools) <= TOOLS.keys():
        print(f"sanitize needs compute-sanitizer of the CUDA toolkit, and tools of {', '.join(TOOLS)}", file=sys.stderr)
        return 2
    started = time.perf_counter()
    asked = make_calls(cupy, launch=False)
    needed = sorted(
        {(file, name if file.endswith(".py") else "", constants) for file, name, constants in asked}, key=str
    )
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), 32), get_context("spawn")) as pool:
        list(pool.map(compile_one, needed, [arch] * len(needed)))
    print(f"{len(needed)} kernels compiled for {arch} in {time.perf_counter() - started:.0f} s", flush=True)
    with ThreadPoolExecutor(len(tools)) as pool:
        reports = list(pool.map(run_tool, tools, [program] * len(tools)))
    print("\n".join(report for report in reports if report))
    return int(any(reports))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
