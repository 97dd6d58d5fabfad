"""Measure models on held-out rows, and compare two of them with paired statistics.

May import: spec, data, models, engine, scipy. Must never know: MLflow, Ray, HTTP.
"""

from altiplano.evaluate.compare import Comparison, compare
from altiplano.evaluate.measure import Scores, measure
from altiplano.evaluate.tasks import label

__all__ = ["Comparison", "Scores", "compare", "label", "measure"]
