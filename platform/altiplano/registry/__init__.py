"""MLflow: the run tree, the registry and its aliases, lineage, and the gate before a promotion.

May import: evaluate, data, models, spec, mlflow. Must never know: Ray, HTTP endpoints, the engine's inside.
"""

from altiplano.registry.lineage import Lineage
from altiplano.registry.models import ModelRegistry, ModelVersion, RegistryUnavailableError
from altiplano.registry.tracking import LateSink, MlflowSink, TrackedRun, Tracker

__all__ = [
    "LateSink",
    "Lineage",
    "MlflowSink",
    "ModelRegistry",
    "ModelVersion",
    "RegistryUnavailableError",
    "TrackedRun",
    "Tracker",
]
