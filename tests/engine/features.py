"""The engine's features, two by two: what is asked of the engine for each, and the page that lists the pairs that are tested."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Feature:
    """`params`: of SamplingParams; `settings`: of EngineConfig, `gpu` on top of them on a GPU; `adapter`: of every other request."""

    name: str
    about: str
    params: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    gpu: Mapping[str, Any] = field(default_factory=dict)


Pair = tuple[Feature, Feature]


FEATURES = (
    Feature("prefix cache", "the same prompts again, from cached pages", settings={"enable_prefix_caching": True}),
    Feature("chunked prefill", "17 tokens a step", settings={"max_num_batched_tokens": 17}),
    Feature(
        "preemption",
        "pages for a third of what five requests need",
        settings={"num_blocks": 14, "block_size": 4, "max_model_len": 56},
        gpu={"num_blocks": 6, "block_size": 16, "max_model_len": 96},
    ),
    Feature("priorities", "the last to come goes first"),
    Feature("abort", "a neighbour leaves in mid-answer"),
    Feature("sleep", "once between two runs, and the weights are loaded again"),
    Feature(
        "speculation",
        "guesses at the next tokens: every third of them wrong; on a GPU from the request's own text",
        settings={"num_speculative_tokens": 4},
    ),
    Feature("draft model", "another model guesses, and is often wrong", settings={"num_speculative_tokens": 3}),
    Feature(
        "ITL target",
        "no more prompt tokens beside a decode than fit into half a millisecond",
        settings={"itl_target_ms": 0.5},
    ),
    Feature(
        "deterministic mode",
        "to the bit what each would be told alone",
        settings={"deterministic": True},
    ),
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
ON_A_GPU_ONLY = (
    Feature(
        "INT4 draft",
        "the guessing model with weights of 4 bits",
        settings={"num_speculative_tokens": 3, "speculative_quantization": "int4"},
    ),
    Feature("FP8 KV", "8-bit keys and values", settings={"kv_cache_dtype": "fp8"}),
    Feature("INT8 KV", "8-bit keys and values", settings={"kv_cache_dtype": "int8"}),
    Feature("INT8 weights", "in groups of 128", settings={"quantization": "int8"}),
    Feature("INT4 weights", "in groups of 128", settings={"quantization": "int4"}),
    Feature("W8A8 FP8", "products in 8 bits", settings={"quantization": "w8a8-fp8"}),
    Feature("W8A8 INT8", "products in 8 bits", settings={"quantization": "w8a8-int8"}),
)
GPU_FEATURES = (*FEATURES, *ON_A_GPU_ONLY)
_NO_BITWISE = "the tiles of 8-bit products depend on the number of rows"
REFUSED = {
    frozenset({"min tokens", "structured output"}): "the grammar decides where an answer ends",
    frozenset({"deterministic mode", "W8A8 FP8"}): _NO_BITWISE,
    frozenset({"deterministic mode", "W8A8 INT8"}): _NO_BITWISE,
}
# Of each group an engine has one.
ALTERNATIVES = {
    ("speculation", "draft model", "INT4 draft"): "guesses come from the text itself or from one model",
    ("FP8 KV", "INT8 KV"): "a cache has one type",
    ("INT8 weights", "INT4 weights", "W8A8 FP8", "W8A8 INT8"): "weights have one type",
}
COMMAND = "python tests/engine/features.py > docs/features.md"
RESULTS = Path(__file__).parents[2] / "benchmarks/results/features.json"


def are_alternatives(pair: Pair) -> bool:
    return any(pair[0].name in group and pair[1].name in group for group in ALTERNATIVES)


def pairs_of(features: Sequence[Feature]) -> tuple[Pair, ...]:
    return tuple(pair for pair in combinations(features, 2) if not are_alternatives(pair))


PAIRS = pairs_of(FEATURES)
GPU_PAIRS = pairs_of(GPU_FEATURES)


def is_refused(pair: Pair) -> bool:
    return frozenset(feature.name for feature in pair) in REFUSED


def docs_page(results: Mapping[str, Any] | None) -> str:
    """docs/features.md. `results`: what tests/gpu/test_feature_matrix.py has written, if it has been run."""
    lines = [
        "# What works together",
        "",
        f"Written by `{COMMAND}`: the CPU's table from the list that `tests/engine/test_feature_matrix.py` runs in CI, the GPU's from what",
        "`tests/gpu/test_feature_matrix.py` has found on a GPU. In both, five requests that use two features in one engine are asked.",
        "",
        "## On the CPU",
        "",
        "✓: they answer token by token what a plain loop over transformers' logits answers, and end for the same reason with the same",
        "log-probabilities. ✗: refused with a message.",
        "",
        *_table(FEATURES, lambda pair: "✓"),
        "",
        "## On a GPU",
        "",
    ]
    if results is None:
        lines.append("Not run yet.")
    else:
        lines += _gpu(results)
    lines += ["", "## What each one is in these tests", ""]
    lines += [f"{i + 1}. {feature.name}: {feature.about}" for i, feature in enumerate(GPU_FEATURES)]
    lines += ["", "Refused:", ""]
    lines += [f"- {' with '.join(sorted(names))}: {why}" for names, why in REFUSED.items()]
    lines += ["", "One or the other (or):", ""]
    lines += [f"- {', '.join(group)}: {why}" for group, why in ALTERNATIVES.items()]
    return "\n".join(lines) + "\n"


def _gpu(results: Mapping[str, Any]) -> list[str]:
    found = {frozenset(names): outcome for *names, outcome in results["pairs"]}
    marks = {"passed": "✓", "failed": "!", "unknown": "?"}
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return [
        f"{results['hardware']}, {versions}, commit {results['commit']}. The kernels add in bf16, and in an order that the number of rows decides:",
        "✓ says that every token is the best one, under all rules of its request and with its noise, of the float32 model with the same quantized",
        "weights, or closer to it than the rounding of bf16 explains; and the same of log-probabilities. In deterministic mode all is equal to the",
        "bit, alone and together. ✗: refused with a message. !: failed in this run. ?: not run yet.",
        "",
        *_table(GPU_FEATURES, lambda pair: marks[found.get(frozenset(one.name for one in pair), "unknown")]),
        *(line for note in results.get("notes", ()) for line in ("", note)),
    ]


def _table(features: Sequence[Feature], mark: Callable[[Pair], str]) -> list[str]:
    """A row and a column for each of `features`; `mark`: of a pair that is run and not refused."""

    def of(pair: Pair) -> str:
        if are_alternatives(pair):
            return "or"
        return "✗" if is_refused(pair) else mark(pair)

    lines = ["| | " + " | ".join(str(i + 1) for i in range(len(features) - 1)) + " |", "|---|" + "---|" * (len(features) - 1)]
    for row, feature in enumerate(features):
        marks = [of((features[column], feature)) for column in range(row)]
        lines.append(f"| {row + 1} {feature.name} | " + " | ".join(marks + [""] * (len(features) - 1 - row)) + " |")
    return lines


def results() -> dict[str, Any] | None:
    """What the GPU's run has written, if there was one."""
    if not RESULTS.exists():
        return None
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found


if __name__ == "__main__":
    print(docs_page(results()), end="")
