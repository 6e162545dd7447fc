"""The loader on a GPU: arguments, grids, shared memory, streams, graphs. test_kernel_cache has what needs no GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cumoe.rawkernels import _cache, _compile, _load

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
if not cupy.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

HEADERS = Path(_compile.__file__).parent

PROBE = """
#include "overlap.cuh"

struct alignas(64) Box {
    unsigned char bytes[128];
};

extern "C" __global__ void arguments(const float *x, const float *missing, int small, long long large, float scale,
                                     const __grid_constant__ Box box, double *out)
{
    out[0] = x[0];
    out[1] = missing == nullptr;
    out[2] = small;
    out[3] = (double)large;
    out[4] = scale;
    out[5] = box.bytes[0] * 1000 + box.bytes[127];
    out[6] = BIAS;
}

extern "C" __global__ void blocks(int *out)
{
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    out[block * blockDim.x + threadIdx.x] = block * 1000 + threadIdx.x;
}

extern "C" __global__ void shared(int *out, int count)
{
    __shared__ int fixed[512];
    extern __shared__ int dynamic[];
    fixed[threadIdx.x] = threadIdx.x;
    for (int i = threadIdx.x; i < count; i += blockDim.x) dynamic[i] = i;
    __syncthreads();
    if (threadIdx.x == 0) {
        int sum = fixed[blockDim.x - 1];
        for (int i = 0; i < count; ++i) sum += dynamic[i] & 1;
        *out = sum;
    }
}

extern "C" __global__ void add(long long *x, int n, int step)
{
    wait_for_previous();
    let_next_start();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) x[i] = x[i] * 3 + step;
}
"""


@pytest.fixture(autouse=True)
def probe(tmp_path, monkeypatch):
    """A file of its own for each test, so that no test finds the functions of another."""
    name = f"probe_{tmp_path.name}.cu"
    (tmp_path / name).write_text(PROBE)
    shutil.copy(HEADERS / "overlap.cuh", tmp_path)
    monkeypatch.setattr(_compile, "_HERE", tmp_path)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    return name


def function(probe, name, bias=0):
    return _load.kernel(probe, name, BIAS=bias)


@pytest.mark.parametrize("small", [7, -7, np.int32(-7), np.uint8(7)])
@pytest.mark.parametrize("large", [2**40, -(2**40), np.int64(-(2**40)), 5])
def test_arguments_arrive(probe, small, large):
    out = cupy.zeros(7)
    box = np.frombuffer(bytes(range(3, 131)), "V128")
    x = cupy.arange(10, dtype=np.float32)[4:]  # the address of a view
    function(probe, "arguments", 11)(1, 1, x, None, small, large, np.float32(0.3), box, out)
    assert out.get().tolist() == [4, 1, int(small), int(large), float(np.float32(0.3)), 3130, 11]


@pytest.mark.parametrize("grid", [5, (5,), (2, 3), (2, 3, 4)])
def test_grids_of_one_to_three_numbers(probe, grid):
    count = int(np.prod(grid))
    out = cupy.full(count * 33, -1, np.int32)
    function(probe, "blocks")(grid, 33, out)
    expected = np.arange(count)[:, None] * 1000 + np.arange(33)
    np.testing.assert_array_equal(out.get(), expected.ravel())


def test_shared_memory_grows_as_it_is_asked_for(probe):
    kernel, out = function(probe, "shared"), cupy.zeros(1, np.int32)
    limit = cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
    for num_bytes in (0, 400, 47 << 10, 48 << 10, 100, limit - 2048, 4):  # 2 KiB are static
        count = num_bytes // 4
        kernel(1, 512, out, count, shared=num_bytes)
        assert int(out[0]) == 511 + count // 2


def test_more_shared_memory_than_there_is_is_an_error_that_names_the_kernel(probe):
    with pytest.raises(RuntimeError, match="shared failed: CUDA_ERROR_INVALID_VALUE"):
        function(probe, "shared")(1, 512, cupy.zeros(1, np.int32), 0, shared=1 << 20)


def test_a_launch_that_cannot_be_names_the_kernel(probe):
    with pytest.raises(RuntimeError, match="blocks failed: CUDA_ERROR_INVALID_VALUE"):
        function(probe, "blocks")(1, 4096, cupy.zeros(4096, np.int32))


@pytest.mark.parametrize("overlap", [False, True])
def test_kernels_of_a_stream_see_their_predecessors(probe, overlap):
    x, expected = cupy.zeros(100_000, np.int64), 0
    kernel = function(probe, "add")
    for step in range(30):
        kernel(40, 256, x, x.size, step, overlap=overlap)
        expected = expected * 3 + step
    np.testing.assert_array_equal(x.get(), expected)


@pytest.mark.parametrize("overlap", [False, True])
def test_launches_go_into_the_graph_of_the_current_stream(probe, overlap):
    x, stream = cupy.zeros(1000, np.int64), cupy.cuda.Stream(non_blocking=True)
    kernel = function(probe, "add")
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        kernel(4, 256, x, x.size, 1, overlap=overlap)
        kernel(4, 256, x, x.size, 2, overlap=overlap)
        graph = stream.end_capture()
        stream.synchronize()
        assert int(x[0]) == 0  # recorded, not run
        expected = 0
        for _ in range(3):
            graph.launch(stream)
            expected = (expected * 3 + 1) * 3 + 2
        stream.synchronize()
    np.testing.assert_array_equal(x.get(), expected)


def test_one_function_for_each_set_of_constants(probe):
    assert function(probe, "blocks") is function(probe, "blocks")
    assert function(probe, "blocks") is not function(probe, "blocks", 1)


def test_the_driver_tells_about_a_function(probe):
    kernel = function(probe, "blocks")
    assert kernel.attribute("LOCAL_SIZE_BYTES") == 0
    assert 1 <= kernel.attribute("NUM_REGS") <= 255
    assert kernel.attribute("BINARY_VERSION") == _load.capability()


def test_a_function_that_is_not_in_the_file_is_an_error(probe):
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="CUDA_ERROR_NOT_FOUND"):
        function(probe, "nothing")


def test_a_second_process_would_read_the_disk(probe, tmp_path):
    function(probe, "blocks")
    arch = _load.architecture()
    assert _compile.compiled(probe, arch, {"BIAS": 0}).how == _cache.READ
    assert [path.parent.name for path in tmp_path.rglob("*.cubin")] == ["cumoe"]


def test_functions_live_on_the_device_that_is_current(probe):
    for number in range(cupy.cuda.runtime.getDeviceCount()):
        with cupy.cuda.Device(number):
            out = cupy.zeros(33, np.int32)
            function(probe, "blocks")(1, 33, out)
            np.testing.assert_array_equal(out.get(), np.arange(33))
            assert _load.architecture() == _load.architecture(number)


FIRST_CALL = """
import sys, time
import cupy as cp
import ml_dtypes
import numpy as np
import cumoe
rng = np.random.default_rng(0)
shapes = (9, 64), (8, 96, 64), (8, 64, 48)
x, w1, w2 = (cp.asarray(rng.standard_normal(shape, np.float32).astype("bfloat16")) for shape in shapes)
logits = cp.asarray(rng.standard_normal((9, 8), np.float32))
cp.cuda.Device().synchronize()
started = time.perf_counter()
out = cumoe.fused_moe(x, w1, w2, logits, top_k=2)
cp.cuda.Device().synchronize()
print(time.perf_counter() - started, *sorted({"cuda.core", "numba", "llvmlite"} & set(sys.modules)))
"""


def test_the_first_layer_of_a_warm_process_loads_no_compiler(tmp_path):
    environment = {**os.environ, "CUPY_CACHE_DIR": str(tmp_path / "warm")}
    loaded = []
    for how in ("cold", "warm", "warm"):
        done = subprocess.run(
            [sys.executable, "-c", FIRST_CALL], env=environment, capture_output=True, text=True, check=True
        )
        seconds, *modules = done.stdout.split()
        print(f"first fused_moe of a process, {how} cache: {float(seconds):.2f} s")
        loaded.append(modules)
    assert "cuda.core" in loaded[0]
    assert loaded[1:] == [[], []]
