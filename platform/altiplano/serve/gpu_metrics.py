"""GPU memory and utilisation through NVML, read when somebody scrapes. Without NVIDIA's library or driver there are no such metrics."""

from collections.abc import Iterator
from types import ModuleType

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class GpuCollector(Collector):
    """One sample per GPU that this machine shows."""

    def __init__(self) -> None:
        self._nvml = _nvml()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        if self._nvml is None:
            return
        used = GaugeMetricFamily("altiplano_gpu_memory_used_bytes", "GPU memory in use by anyone", labels=["gpu"])
        total = GaugeMetricFamily("altiplano_gpu_memory_total_bytes", "GPU memory", labels=["gpu"])
        busy = GaugeMetricFamily("altiplano_gpu_utilization_ratio", "Share of time with a kernel running", labels=["gpu"])
        for index in range(self._nvml.nvmlDeviceGetCount()):
            handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            used.add_metric([str(index)], memory.used)
            total.add_metric([str(index)], memory.total)
            try:
                busy.add_metric([str(index)], self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
            except self._nvml.NVMLError:  # MIG slices do not report it
                continue
        yield from (used, total, busy)


def _nvml() -> ModuleType | None:
    try:
        import pynvml  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml  # type: ignore[no-any-return,unused-ignore]
