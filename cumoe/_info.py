"""Facts about this machine and installation, as `cumoe info` prints them and result files keep them."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = (
    *("numpy", "numba", "llvmlite", "ml_dtypes", "tbb", "safetensors"),
    *("cupy", "numba-cuda", "cuda-core", "cuda-bindings", "torch", "transformers"),
)
_CUPY_WHEELS = ("cupy-cuda13x", "cupy-cuda12x", "cupy")

# Instruction sets that decide about a kernel somewhere in this field; LLVM's names.
_FEATURES = (
    *("avx2", "fma", "f16c", "avxvnni", "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512bf16", "avx512fp16"),
    *("amx-tile", "amx-int8", "amx-bf16", "amx-fp16", "neon", "dotprod", "i8mm", "bf16", "fullfp16", "sve", "sve2"),
)


def gather() -> dict[str, dict[str, str]]:
    """Collect everything, by section."""
    return {"versions": versions(), "cpu": cpu(), "kernels": kernels(), "gpu": gpus() | gpu_compiler()}


def versions() -> dict[str, str]:
    """Versions of Python, of cumoe and of the libraries that it may use."""
    import cumoe

    found = {"cumoe": cumoe.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        candidates = _CUPY_WHEELS if package == "cupy" else (package,)
        found[package] = next((version for name in candidates if (version := _version(name))), "not installed")
    return found


def cpu() -> dict[str, str]:
    """Model, instruction sets, threads, threading layer, cache and memory."""
    import numba
    from llvmlite import binding

    from cumoe.bench.ceilings import last_level_cache_bytes
    from cumoe.cpu import _threads
    from cumoe.cpu._features import cpu_features

    _threads.start()  # before Numba is asked for threads, or it would pick a layer of its own
    features = cpu_features()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "model": cpu_model(),
        "llvm name": numba.config.CPU_NAME or binding.get_host_cpu_name(),
        "instruction sets": " ".join(name for name in _FEATURES if name in features) or "baseline",
        "threads": f"{numba.get_num_threads()} of {os.cpu_count()} CPUs",
        "threading layer": threading_layer(),
        "last-level cache": _gib(last_level_cache_bytes()) if last_level_cache_bytes() else "unknown",
        "memory available": _gib(available_memory()),
    }


def kernels() -> dict[str, str]:
    """The micro-kernel that each dtype uses here, the slower ones that would run too, and what becomes of codes."""
    from cumoe.cpu import coded_panels, microkernel

    found = {}
    for dtype in ("bfloat16", "float16", "float32"):
        used, *others = microkernel.names(dtype)
        found[dtype] = f"{used} (would run too: {', '.join(others)})" if others else used
    bits = coded_panels.bits_in_registers()
    found["codes"] = (
        f"of {' and '.join(map(str, bits))} bits: numbers in registers" if bits else "decoded panel by panel"
    )
    if coded_panels.multiplies_integers():
        found["codes"] += "; int8 rows meet int8 and int4 weights in integers"
    return found


def gpus() -> dict[str, str]:
    """CUDA devices that CuPy sees and the kernel of each dtype there, or why there is none."""
    if importlib.util.find_spec("cupy") is None:
        return {"CUDA": "CuPy is not installed (pip install 'cumoe[cuda13]')"}
    try:
        import cupy

        runtime = cupy.cuda.runtime
        found = {
            "CUDA": f"runtime {_dotted(runtime.runtimeGetVersion())}, driver {_dotted(runtime.driverGetVersion())}"
        }
        for number in range(runtime.getDeviceCount()):
            facts = runtime.getDeviceProperties(number)
            found[f"device {number}"] = (
                f"{facts['name'].decode()}, sm_{facts['major']}{facts['minor']}, {_gib(facts['totalGlobalMem'])}"
            )
    except Exception as error:  # CuPy raises its own kinds, and ImportError when a CUDA library is missing
        return {"CUDA": f"none: {str(error).splitlines()[0]}"}
    if version := driver_version():
        found["driver"] = version
    return found | gpu_kernels()


def driver_version() -> str:
    """Version of the GPU's driver, "" where nvidia-ml-py is not installed or has nothing to say."""
    from cumoe.bench.gpu_clocks import Watch

    return Watch().driver_version()


def gpu_kernels() -> dict[str, str]:
    """The kernel of the products that each dtype uses on the current device."""
    import cumoe

    found = {}
    for dtype in ("bfloat16", "float16", "float32"):
        try:
            found[f"kernel {dtype}"] = cumoe.plan(1, 64, 64, 2, 1, dtype=dtype, device="cuda").kernel
        except Exception as error:  # also CuPy's own kinds
            found[f"kernel {dtype}"] = f"none: {error}"
    return found


def gpu_compiler() -> dict[str, str]:
    """What compiles the GPU kernels here, and where they are kept."""
    from cumoe.rawkernels import _cache, _compile

    folder = _cache.folder()
    kept = list(folder.glob("*.cubin")) if folder else []
    size = sum(path.stat().st_size for path in kept) / 1e6
    return {
        "compiler": _compile.nvrtc_version() or "none (pip install 'cumoe[compile]')",
        "kernel cache": f"{folder}: {len(kept)} kernels, {size:.1f} MB" if folder else "in memory only",
    }


def cpu_model() -> str:
    """The name that the processor gives itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def threading_layer() -> str:
    """Name of Numba's threading layer, after a parallel loop has made it choose."""
    import numba

    from cumoe.bench.ceilings import run_parallel_loop

    run_parallel_loop()
    return str(numba.threading_layer())


def available_memory() -> int:
    """Bytes that a process may still take: of the machine, or of its control group if that has less."""
    return min(_free_memory(), *(limit for limit in _group_limits()), 1 << 62)


def _free_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # half: the rest may be in use
    except (ValueError, OSError, AttributeError):
        return 8 << 30


def _group_limits() -> list[int]:
    """Free bytes of the control group of a container, versions 2 and 1."""
    free = []
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most = (Path("/sys/fs/cgroup") / limit).read_text().strip()
            taken = int((Path("/sys/fs/cgroup") / used).read_text())
            free.append(max(0, int(most) - taken) if most != "max" else 1 << 62)
        except (OSError, ValueError):
            continue
    return free


def git_commit(folder: Path | None = None) -> str:
    """Commit of the checkout that holds this file, with "+" if files differ; "" outside a checkout."""
    folder = folder or Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists() or not shutil.which("git"):
        return ""
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    return commit + "+" if commit and _git(folder, "status", "--porcelain", "--untracked-files=no") else commit


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gib(num_bytes: Any) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _dotted(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
