"""The pipeline file as typed values: the only place where a user's words become configuration.

May import: pydantic, yaml. Must never know: torch, ray, mlflow, or any other package of Altiplano.
"""

from altiplano.spec.sections import (
    AshaScheduler,
    Data,
    DataSource,
    Evaluate,
    Failure,
    Gate,
    Lora,
    Model,
    OptunaSearch,
    Pipeline,
    Run,
    Scaling,
    Section,
    Serve,
    ServeAutoscaling,
    ServeLimits,
    ServeRemote,
    Tracking,
    Training,
    Tune,
    is_loopback,
)

__all__ = [
    "AshaScheduler",
    "Data",
    "DataSource",
    "Evaluate",
    "Failure",
    "Gate",
    "Lora",
    "Model",
    "OptunaSearch",
    "Pipeline",
    "Run",
    "Scaling",
    "Section",
    "Serve",
    "ServeAutoscaling",
    "ServeLimits",
    "ServeRemote",
    "Tracking",
    "Training",
    "Tune",
    "is_loopback",
]
