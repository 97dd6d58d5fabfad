"""Memory, tokens per second, hours and money of a fine-tune, before anything starts.

May import: spec, torch (to look at the machine). Must never know: Ray, MLflow, data sets beyond their token counts.
"""

from altiplano.estimate.hardware import Hardware, detect
from altiplano.estimate.memory import Memory, memory
from altiplano.estimate.plan import Plan, plan
from altiplano.estimate.shape import ModelShape, read_shape

__all__ = ["Hardware", "Memory", "ModelShape", "Plan", "detect", "memory", "plan", "read_shape"]
