"""`altiplano …`: words in, exit code out. One module per group of verbs.

Imports of torch, Ray and MLflow happen inside the commands, so that `altiplano --help` answers at once.
"""

from altiplano.cli.app import main

__all__ = ["main"]
