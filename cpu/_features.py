"""The instruction sets that Numba compiles for here; asked before anything is emitted."""

import functools

import numba
from llvmlite import binding

# Feature sets that NUMBA_CPU_NAME stands for when it overrides the host's; others run the portable kernel.
_NAMED_CPUS = {"haswell": {"avx2", "fma", "f16c"}}
_NAMED_CPUS["znver3"] = _NAMED_CPUS["haswell"]
_NAMED_CPUS["skylake-avx512"] = _NAMED_CPUS["haswell"] | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


@functools.cache
def cpu_features() -> frozenset[str]:
    """The instruction sets, Numba's environment overrides included."""
    if numba.config.CPU_FEATURES is not None:
        listed = numba.config.CPU_FEATURES.split(",")
        return frozenset(feature[1:] for feature in listed if feature.startswith("+"))
    if numba.config.CPU_NAME is not None:
        return frozenset(_NAMED_CPUS.get(numba.config.CPU_NAME, ()))
    return frozenset(feature for feature, present in binding.get_host_cpu_features().items() if present)
