"""The OpenAI-compatible endpoint: HTTP in front, the engine in a process of its own behind it, Ray Serve around both.

May import: spec, data, models, engine, fastapi, ray.serve, msgspec. Must never know: MLflow, training.
"""

from altiplano.serve.deployment import deploy, is_serving, undeploy
from altiplano.serve.settings import ServeSettings

__all__ = ["ServeSettings", "deploy", "is_serving", "undeploy"]
