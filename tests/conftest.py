"""The `xp` fixture (every test body runs on every side that exists here) and the hypothesis profiles."""

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

_common = {
    "deadline": None,  # the first example of a test compiles kernels
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("dev", max_examples=25, **_common)
settings.register_profile("ci", max_examples=100, derandomize=True, **_common)
settings.register_profile("nightly", max_examples=1000, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def _cupy():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not cupy.cuda.is_available():
        pytest.skip("no CUDA device")
    return cupy


@pytest.fixture(params=["numpy", "cupy"])
def xp(request):
    """The array namespace that a test runs on."""
    return np if request.param == "numpy" else _cupy()
