"""The inference engine: knows tokens, tensors and time.

May import: torch, safetensors, tokenizers, altiplano_kernels. Must never know: HTTP, Ray, MLflow, pydantic. The control part
(requests, pages, prefix cache, scheduler) imports no torch at all.
"""

from altiplano.engine.backends import create_engine
from altiplano.engine.config import EngineConfig
from altiplano.engine.core import Engine
from altiplano.engine.errors import (
    AdapterError,
    EngineAsleepError,
    EngineError,
    PromptTooLongError,
    UnknownAdapterError,
    WeightsError,
)
from altiplano.engine.outputs import Completion, EngineStats, TokenOutput
from altiplano.engine.params import SamplingParams
from altiplano.engine.vllm.engine import VllmEngine

__all__ = [
    "AdapterError",
    "Completion",
    "Engine",
    "EngineAsleepError",
    "EngineConfig",
    "EngineError",
    "EngineStats",
    "PromptTooLongError",
    "SamplingParams",
    "TokenOutput",
    "UnknownAdapterError",
    "VllmEngine",
    "WeightsError",
    "create_engine",
]
