"""Rows of any usual format become tokens with a loss mask, audited, packed and batched.

May import: spec, models, transformers, fsspec, pyarrow, datasets. Must never know: training loops, Ray, MLflow.
"""

from altiplano.data.audit import AuditError, AuditReport
from altiplano.data.prepare import EvalRow, Prepared, prepare
from altiplano.data.templates import ChatTemplate, Example

__all__ = ["AuditError", "AuditReport", "ChatTemplate", "EvalRow", "Example", "Prepared", "prepare"]
