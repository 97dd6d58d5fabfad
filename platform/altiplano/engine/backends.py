"""Which engine runs on which device."""

from altiplano.engine.config import EngineConfig
from altiplano.engine.core import Engine


def create_engine(config: EngineConfig) -> Engine:
    """The engine for `config.device`: on `cuda` the one that runs ahead of the host on Triton kernels, else the torch backend.

    Raises:
        WeightsError: the model directory cannot be used.
        EngineError: no such device, or too little memory on it.
    """
    if not config.device.startswith("cuda"):
        return Engine(config)
    # Triton is installed on GPU machines only.
    from altiplano.engine.cuda.overlap import OverlappedEngine
    from altiplano.engine.cuda.runner import CudaRunner

    return OverlappedEngine(config, CudaRunner(config, config.kv_cache_dtype, config.device, config.quantization))
