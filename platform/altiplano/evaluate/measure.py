"""Run the tasks for several adapters of one base, on one engine: same rows, same decoding."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from altiplano import spec
from altiplano.data import EvalRow
from altiplano.data.templates import IGNORED
from altiplano.engine import Completion, Engine, EngineConfig, SamplingParams, create_engine
from altiplano.evaluate import tasks
from altiplano.evaluate.harness import lm_eval_scores

BLOCK = 32
TIMED_ROWS, TIMED_ROUNDS = 32, 3
LM_EVAL = "lm_eval:"


class EvaluationError(ValueError):
    """A task that does not exist, or rows that it cannot be measured on."""


@dataclass(frozen=True)
class Scores:
    """One subject's results: per task one value per row (perplexity: mean nats per token of the row), and their summary."""

    rows: dict[str, list[float]]
    answers: list[str]
    seconds_per_token: float
    summary: dict[str, float] = field(default_factory=dict)


def measure(
    model: Path,
    adapters: Mapping[str, Path | None],
    rows: Sequence[EvalRow],
    settings: spec.Evaluate,
    *,
    max_model_len: int,
    dtype: str,
    device: str,
) -> dict[str, Scores]:
    """Scores of every subject of `adapters` (None: the base alone) on the first `settings.limit` of `rows`.

    Raises:
        EvaluationError: an unknown task.
        EngineError: a model or an adapter that the engine refuses.
    """
    unknown = [t for t in settings.tasks if t != "perplexity" and t not in tasks.GENERATED and not t.startswith(LM_EVAL)]
    if unknown:
        known = ", ".join(["perplexity", *tasks.GENERATED, f"{LM_EVAL}<task>"])
        raise EvaluationError(f"evaluate.tasks names {', '.join(unknown)}: use {known}")
    rows = rows[: settings.limit]
    longest = max(len(row.input_ids) for row in rows) + settings.max_new_tokens
    engine = create_engine(
        EngineConfig(
            model,
            dtype=dtype,
            device=device,
            max_model_len=max(max_model_len, longest),
            max_num_seqs=settings.batch_size,
            num_blocks=-(-max(max_model_len, longest) // BLOCK) + settings.batch_size * -(-longest // BLOCK),
            block_size=BLOCK,
            max_num_batched_tokens=max(2048, settings.batch_size),
            max_lora_rank=512,
        )
    )
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    scores = {}
    for subject, adapter in adapters.items():
        if adapter is not None:
            engine.load_adapter(subject, adapter)
        own = _measure_one(engine, tokenizer, subject if adapter else None, rows, settings)
        harness = [t.removeprefix(LM_EVAL) for t in settings.tasks if t.startswith(LM_EVAL)]
        for task, values in (lm_eval_scores(model, adapter, harness, settings.limit) if harness else {}).items():
            own.rows[LM_EVAL + task] = values
            own.summary[LM_EVAL + task] = statistics.fmean(values)
        scores[subject] = own
    if any(task in tasks.GENERATED for task in settings.tasks):
        seconds = _seconds_per_token(engine, rows[:TIMED_ROWS], [s if a else None for s, a in adapters.items()], settings)
        scores = {name: replace(score, seconds_per_token=s) for (name, score), s in zip(scores.items(), seconds, strict=True)}
    return scores


def _measure_one(engine: Engine, tokenizer: Any, adapter: str | None, rows: Sequence[EvalRow], settings: spec.Evaluate) -> Scores:
    values: dict[str, list[float]] = {}
    summary: dict[str, float] = {}
    if "perplexity" in settings.tasks:
        pairs = [
            tasks.negative_log_likelihood(row, logprobs)
            for row, logprobs in zip(rows, engine.score([row.input_ids for row in rows], adapter), strict=True)
        ]
        nats, counts = [n for n, _ in pairs], [c for _, c in pairs]
        values["perplexity"] = [n / max(1, c) for n, c in pairs]
        summary["perplexity"] = tasks.perplexity(nats, counts)
        learned = [[token for token, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORED] for row in rows]
        summary["bits_per_byte"] = tasks.bits_per_byte(nats, [tokenizer.decode(ids) for ids in learned])
    answers: list[str] = []
    if any(task in tasks.GENERATED for task in settings.tasks):
        completions = _answer(engine, rows, adapter, settings.max_new_tokens)
        answers = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
        for task in settings.tasks:
            if task in tasks.GENERATED:
                values[task] = [tasks.GENERATED[task](row, answer) for row, answer in zip(rows, answers, strict=True)]
                summary[task] = math.fsum(values[task]) / len(rows)
    return Scores(values, answers, 0.0, summary)


def _seconds_per_token(
    engine: Engine, rows: Sequence[EvalRow], subjects: Sequence[str | None], settings: spec.Evaluate
) -> list[float]:
    """Of each subject, the best of some rounds in which all take turns: what else the machine does hits everybody alike."""
    best = [math.inf] * len(subjects)
    for _ in range(TIMED_ROUNDS):
        for index, adapter in enumerate(subjects):
            started = time.perf_counter()
            made = _answer(engine, rows, adapter, settings.max_new_tokens)
            best[index] = min(best[index], (time.perf_counter() - started) / max(1, sum(len(c.token_ids) for c in made)))
    return best


def _answer(engine: Engine, rows: Sequence[EvalRow], adapter: str | None, max_new_tokens: int) -> list[Completion]:
    with torch.inference_mode():
        return engine.generate(
            [row.prompt_ids for row in rows], SamplingParams(max_tokens=max_new_tokens, temperature=0.0), adapter
        )
