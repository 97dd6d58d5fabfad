"""The engine's features, two by two: what is asked of the engine for each, and the page that lists the pairs that are tested."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any


@dataclass(frozen=True)
class Feature:
    """`params`: of SamplingParams; `settings`: of EngineConfig; `adapter`: of every other request."""

    name: str
    about: str
    params: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | None = None


FEATURES = (
    Feature("prefix cache", "the same prompts again, from cached pages", settings={"enable_prefix_caching": True}),
    Feature("chunked prefill", "17 tokens a step", settings={"max_num_batched_tokens": 17}),
    Feature(
        "preemption",
        "pages for a third of what five requests need",
        settings={"num_blocks": 14, "block_size": 4, "max_model_len": 56},
    ),
    Feature("priorities", "the last to come goes first"),
    Feature("abort", "a neighbour leaves in mid-answer"),
    Feature("sleep", "once between two runs, and the weights are loaded again"),
    Feature("speculation", "guesses at the next tokens, every third of them wrong", settings={"num_speculative_tokens": 4}),
    Feature("draft model", "another model guesses, and is often wrong", settings={"num_speculative_tokens": 3}),
    Feature(
        "ITL target",
        "no more prompt tokens beside a decode than fit into half a millisecond",
        settings={"itl_target_ms": 0.5},
    ),
    Feature("deterministic mode", "every token computed alone", settings={"deterministic": True}),
    Feature("LoRA", "every other request with an adapter", adapter="lora"),
    Feature("DoRA", "every other request with an adapter that has magnitudes", adapter="dora"),
    Feature("seed", "temperature 0.9 with a seed", params={"temperature": 0.9, "seed": 11}),
    Feature(
        "filters", "top-k, top-p and min-p", params={"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "seed": 11}
    ),
    Feature(
        "penalties",
        "presence, frequency, repetition",
        params={"presence_penalty": 0.6, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    ),
    Feature("logit bias", "some tokens pushed, one banned", params={"logit_bias": {5: 4.0, 17: 3.0, 40: -100.0}}),
    Feature("min tokens", "no end before the seventh token", params={"min_tokens": 7}),
    Feature("stop tokens", "every eighth token ends the answer", params={"stop_token_ids": tuple(range(3, 120, 8))}),
    Feature("logprobs", "of the chosen token and the three most likely", params={"logprobs": 3}),
    Feature("prompt logprobs", "of every token of the prompt", params={"prompt_logprobs": True}),
    Feature("structured output", "eight tokens to choose from at every step", params={"structured": True}),
)
REFUSED = {
    frozenset({"min tokens", "structured output"}): "the grammar decides where an answer ends",
}
ALTERNATIVES = {frozenset({"speculation", "draft model"}): "guesses come from the text itself or from a model"}
PAIRS = tuple(pair for pair in combinations(FEATURES, 2) if frozenset(feature.name for feature in pair) not in ALTERNATIVES)
COMMAND = "python tests/engine/features.py > docs/features.md"


def is_refused(pair: tuple[Feature, Feature]) -> bool:
    return frozenset(feature.name for feature in pair) in REFUSED


def mark(pair: tuple[Feature, Feature]) -> str:
    if pair not in PAIRS:
        return "or"
    return "✗" if is_refused(pair) else "✓"


def docs_page() -> str:
    """docs/features.md."""
    lines = [
        "# What works together",
        "",
        f"Written by `{COMMAND}` from the list that `tests/engine/test_feature_matrix.py` runs. ✓: on the CPU backend five requests that use both,",
        "in one engine, answer token by token what a plain loop over transformers' logits answers, and end for the same reason with the same",
        "log-probabilities. ✗: refused with a message. What the GPU backend is tested for is in `tests/gpu`.",
        "",
    ]
    lines += ["| | " + " | ".join(str(i + 1) for i in range(len(FEATURES) - 1)) + " |", "|---|" + "---|" * (len(FEATURES) - 1)]
    for row, feature in enumerate(FEATURES):
        marks = [mark((FEATURES[column], feature)) for column in range(row)]
        lines.append(f"| {row + 1} {feature.name} | " + " | ".join(marks + [""] * (len(FEATURES) - 1 - row)) + " |")
    lines += ["", "What each one is in these tests:", ""]
    lines += [f"{i + 1}. {feature.name}: {feature.about}" for i, feature in enumerate(FEATURES)]
    lines += ["", "Refused:", ""]
    lines += [f"- {' with '.join(sorted(names))}: {why}" for names, why in REFUSED.items()]
    lines += ["", "One or the other (or):", ""]
    lines += [f"- {' and '.join(sorted(names))}: {why}" for names, why in ALTERNATIVES.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(docs_page(), end="")
