"""What is measured, one function a task: a value per row, so that two models can be compared row by row."""

import json
import math
from collections.abc import Callable, Sequence

from altiplano.data import EvalRow
from altiplano.data.templates import IGNORED

LOWER_IS_BETTER = {"perplexity"}


def label(task: str) -> str:
    """What the numbers of a comparison are. Row by row, perplexity is compared as nats per token."""
    return "nats per token" if task == "perplexity" else task.replace("_", " ")


def exact_match(row: EvalRow, answer: str) -> float:
    """1 when the answer is the reference, byte for byte, but for spaces around it."""
    return float(answer.strip() == row.reference.strip())


def json_validity(row: EvalRow, answer: str) -> float:
    """1 when the answer is one JSON value."""
    try:
        json.loads(answer)
    except ValueError:
        return 0.0
    return 1.0


GENERATED: dict[str, Callable[[EvalRow, str], float]] = {"exact_match": exact_match, "json_validity": json_validity}


def negative_log_likelihood(row: EvalRow, logprobs: Sequence[float]) -> tuple[float, int]:
    """(nats, tokens) over the supervised tokens of a row; `logprobs` belong to its tokens 1, 2, …"""
    learned = [-value for value, label in zip(logprobs, row.labels[1:], strict=True) if label != IGNORED]
    return math.fsum(learned), len(learned)


def perplexity(nats: Sequence[float], tokens: Sequence[int]) -> float:
    """exp of the mean loss per supervised token."""
    return math.exp(math.fsum(nats) / max(1, sum(tokens)))


def bits_per_byte(nats: Sequence[float], references: Sequence[str]) -> float:
    """Loss in bits over the UTF-8 bytes of the answers: comparable between tokenizers, unlike perplexity."""
    return math.fsum(nats) / math.log(2) / max(1, sum(len(reference.encode()) for reference in references))
