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
        for gpu in self._gpus():
            try:
                handle = self._nvml.nvmlDeviceGetHandleByIndex(gpu)
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            except self._nvml.NVMLError:
                continue  # lost: the scrape that would tell of it must not fail
            used.add_metric([str(gpu)], memory.used)
            total.add_metric([str(gpu)], memory.total)
            try:
                busy.add_metric([str(gpu)], self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
            except self._nvml.NVMLError:  # MIG slices do not report it
                continue
        yield from (used, total, busy)

    def _gpus(self) -> range:
        assert self._nvml is not None
        try:
            return range(self._nvml.nvmlDeviceGetCount())
        except self._nvml.NVMLError:  # the driver is gone, or another one since this process began
            return range(0)


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
