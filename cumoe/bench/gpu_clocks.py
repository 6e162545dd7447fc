"""Clock and power of a GPU while something runs, read from the driver's management library where it is installed."""

import importlib
import statistics
import threading
from typing import Any

_PERIOD_S = 0.004


class Watch:
    """
    Samples the clock of the multiprocessors and the power, in a thread, while its ``with`` block runs.

    Without the package nvidia-ml-py, or where the library refuses, there are no samples and the figures are None.
    """

    def __init__(self) -> None:
        self._library, self._handle = _open()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._mhz: list[float] = []
        self._watts: list[float] = []

    def __enter__(self) -> "Watch":
        self._mhz, self._watts = [], []
        self._stop.clear()
        if self._library is not None:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def sm_mhz(self) -> float | None:
        """Median clock of the second half, when it has settled."""
        return _late_median(self._mhz)

    @property
    def watts(self) -> float | None:
        """Median power of the second half."""
        return _late_median(self._watts)

    def driver_version(self) -> str:
        """Version of the driver, or "" where it is not known."""
        if self._library is None:
            return ""
        try:
            version = self._library.nvmlSystemGetDriverVersion()
        except Exception:
            return ""
        return version.decode() if isinstance(version, bytes) else str(version)

    def _sample(self) -> None:
        library = self._library
        while True:
            try:
                mhz = library.nvmlDeviceGetClockInfo(self._handle, library.NVML_CLOCK_SM)
                watts = library.nvmlDeviceGetPowerUsage(self._handle) / 1e3
            except Exception:  # every call may be refused, in a virtual machine for one
                return
            self._mhz.append(float(mhz))
            self._watts.append(float(watts))
            if self._stop.wait(_PERIOD_S):
                return


def _open() -> tuple[Any, Any]:
    """The library and its handle of CuPy's current device, or (None, None)."""
    try:
        import cupy as cp

        library = importlib.import_module("pynvml")
        library.nvmlInit()
        device = cp.cuda.Device()
        try:
            return library, library.nvmlDeviceGetHandleByPciBusId(device.pci_bus_id.encode())
        except Exception:  # a container may hide the bus
            return library, library.nvmlDeviceGetHandleByIndex(int(device.id))
    except Exception:  # not installed, no driver, or no permission
        return None, None


def _late_median(samples: list[float]) -> float | None:
    return statistics.median(samples[len(samples) // 2 :]) if samples else None
