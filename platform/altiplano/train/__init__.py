"""Fine-tuning: one global step, the Ray Train worker around it, checkpoints that can be trusted.

May import: spec, data, models, torch, trl, peft, ray. Must never know: MLflow, sweeps, serving.
"""

from altiplano.train.fit import TrainError, TrainResult, fit
from altiplano.train.sink import MetricSink

__all__ = ["MetricSink", "TrainError", "TrainResult", "fit"]
