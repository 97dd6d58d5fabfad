"""Search spaces: which settings a sweep may vary, and how their distributions are written."""

from typing import Any

from altiplano.spec.sections import Lora, Pipeline, Section, Training

_SECTIONS: dict[str, type[Section]] = {"lora": Lora, "training": Training}
_RANGES = ("loguniform", "uniform", "randint")


def check_space(pipeline: Pipeline) -> list[tuple[str, str]]:
    """(dotted key, problem) for every wrong entry of `tune.search_space`."""
    if pipeline.tune is None:
        return []
    problems = []
    for key, distribution in pipeline.tune.search_space.items():
        message = _unknown(key) or _malformed(distribution)
        if message:
            problems.append((f"tune.search_space.{key}", message))
    return problems


def samples(distribution: dict[str, Any]) -> list[Any]:
    """Values that a well-formed distribution can give: every choice, or both ends and one between."""
    kind, values = next(iter(distribution.items()))
    if kind == "choice":
        return list(values)
    low, high = values
    return [low, high - 1] if kind == "randint" else [low, high, low + (high - low) * 0.3819]


def _unknown(key: str) -> str | None:
    section, _, field = key.partition(".")
    if section in _SECTIONS and field in _SECTIONS[section].model_fields:
        return None
    known = ", ".join(f"{name}.{field}" for name, model in _SECTIONS.items() for field in model.model_fields)
    return f"is not a setting that a sweep can vary: use one of {known}"


def _malformed(distribution: dict[str, Any]) -> str | None:
    if len(distribution) != 1:
        return "needs exactly one of loguniform, uniform, randint, choice"
    kind, values = next(iter(distribution.items()))
    if kind == "choice":
        return None if isinstance(values, list) and values else "choice needs a list of values"
    if kind not in _RANGES:
        return f"{kind!r} is no distribution: use loguniform, uniform, randint or choice"
    if not isinstance(values, list) or len(values) != 2 or not all(isinstance(v, int | float) for v in values):
        return f"{kind} needs [low, high]"
    low, high = values
    if low >= high:
        return f"{kind} needs low < high, not [{low}, {high}]"
    return f"loguniform needs low > 0, not {low}" if kind == "loguniform" and low <= 0 else None
