"""The OpenAI-compatible endpoint: HTTP in front, the engine in a process of its own behind it, Ray Serve around both.

May import: spec, data, models, engine, fastapi, ray.serve, msgspec. Must never know: MLflow, training.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from altiplano.serve.application import deploy
    from altiplano.serve.control import ServeControl
    from altiplano.serve.settings import ServeSettings

__all__ = ["ServeControl", "ServeSettings", "deploy"]
_HOMES = {"ServeControl": "control", "ServeSettings": "settings", "deploy": "application"}


def __getattr__(name: str) -> Any:
    # Ray takes seconds to import; who only needs the keys or the wire format does not wait for it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"altiplano.serve.{_HOMES[name]}"), name)
