"""The sweep: Ray Tune in charge, Optuna suggesting, ASHA stopping.

May import: train, spec, data, models, ray, optuna. Must never know: MLflow, serving.
"""

from altiplano.tune.sweep import SweepResult, TrialRow, sweep

__all__ = ["SweepResult", "TrialRow", "sweep"]
