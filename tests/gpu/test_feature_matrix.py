"""Every two features of the engine together, on a GPU: answers are the float32 model's, but for the rounding of bf16.

With FEATURES_OUT=FILE the outcomes are written there, for benchmarks/results/features.json and docs/features.md; FEATURES_COMMIT names the
commit where there is no repository.
"""

import gc
import json
import math
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

from altiplano.engine import Engine, EngineConfig, EngineStats, SamplingParams, create_engine  # noqa: E402

from ..engine.feature_requests import NEW, Answer, Text, adapters_of, prompts, run, settings_of  # noqa: E402
from ..engine.features import GPU_PAIRS, Feature, Pair, is_refused  # noqa: E402
from .feature_reference import distance, save_adapter, stand_for  # noqa: E402

DEVICE = "cuda"
VOCAB = 1024
ENDS = tuple(range(VOCAB - 24, VOCAB))
PAGE = 16
ROOMY = {
    "num_blocks": 128,
    "block_size": PAGE,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "enable_prefix_caching": False,
    "debug": True,
}
GUESSING = {"speculation", "draft model", "INT4 draft"}
# What may lie between an answer and the float32 model's, in logits whose standard deviation is 1.1: twice what torch errs in bf16. One
# wrong token in the context puts the worst of 50 tokens 1.0 to 1.8 below the best, a wrong page or adapter 3.6 to 5.
ROUNDING = 0.2
MORE = {"INT8 KV": 0.15, "FP8 KV": 0.6, "INT8 weights": 0.1, "INT4 weights": 0.1, "W8A8 INT8": 0.3, "W8A8 FP8": 0.6}


@dataclass
class World:
    """A checkpoint, its draft and adapters; the models that they stand for; and the engine of the pair before."""

    directory: Path
    text: Text
    models: dict[tuple[str, str | None], torch.nn.Module] = field(default_factory=dict)
    key: tuple[str, ...] = ()
    engine: Engine | None = None
    outcomes: dict[frozenset[str], str] = field(default_factory=dict)

    def adapter(self, name: str) -> Path:
        return self.directory / name

    def model(self, quantization: str, adapter: str | None) -> torch.nn.Module:
        from transformers import LlamaForCausalLM

        if (quantization, adapter) not in self.models:
            model = LlamaForCausalLM.from_pretrained(self.directory / "model", dtype=torch.float32).to(DEVICE).eval()
            stand_for(model, quantization, None if adapter is None else self.adapter(adapter))
            self.models[quantization, adapter] = model
        return self.models[quantization, adapter]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("matrix")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=1024,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 256,
        },
        initializer_range=0.05,
        eos_token_id=list(ENDS),
    )
    base = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    base.save_pretrained(directory / "model")
    for seed, kind in enumerate(("lora", "dora")):
        save_adapter(base, directory / kind, kind, seed)
    text = Text(VOCAB, ENDS, repeating(base.to(DEVICE).float()))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.03 * parameter.std() * torch.randn_like(parameter)
    base.to(torch.bfloat16).save_pretrained(directory / "draft")
    found = World(directory, text)
    yield found
    if "FEATURES_OUT" in os.environ:
        write(found.outcomes, Path(os.environ["FEATURES_OUT"]))


def repeating(model: torch.nn.Module) -> tuple[list[int], ...]:
    """Prompts that hold their own answers, so that there is something to guess; their last pages are full two tokens later."""
    found = []
    for prompt in prompts(VOCAB - len(ENDS)):
        answer = greedy(model, prompt, NEW)
        for _ in range(8):  # another text, another answer; soon it is the same
            text = prompt + answer
            text += (prompt * 2)[-((PAGE - 2 - len(text)) % PAGE or PAGE) :]
            before, answer = answer, greedy(model, text, NEW)
            if before == answer:
                break
        found.append(text)
    return tuple(found)


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        row = model(torch.tensor([tokens], device=DEVICE)).logits[0, -1]
        tokens.append(int(row[: VOCAB - len(ENDS)].argmax()))
    return tokens[len(prompt) :]


def write(outcomes: dict[frozenset[str], str], path: Path) -> None:
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    commit = os.environ.get("FEATURES_COMMIT") or head.stdout.strip() or "unknown"
    ran = [(a.name, b.name) for a, b in GPU_PAIRS if frozenset((a.name, b.name)) in outcomes]
    pairs = [[*names, outcomes[frozenset(names)]] for names in ran]
    versions = {name: version(name) for name in ("torch", "triton", "transformers")}
    found = {"hardware": torch.cuda.get_device_name(), "versions": versions, "commit": commit, "pairs": pairs}
    path.write_text(json.dumps(found, indent=1) + "\n")


class Always:
    """Who decides guesses in every step, whatever it costs."""

    def decide(self) -> bool:
        return True

    def observe(self, guessed: bool, tokens: float, seconds: float) -> None:
        pass


def key_of(pair: Pair) -> tuple[str, ...]:
    """The features that are the engine's, not a request's: pairs with the same ones share an engine."""
    return tuple(feature.name for feature in pair if feature.settings or feature.gpu)


def config_of(world: World, pair: Pair) -> EngineConfig:
    settings = ROOMY | {name: value for feature in pair for name, value in (dict(feature.settings) | dict(feature.gpu)).items()}
    if {"draft model", "INT4 draft"} & {feature.name for feature in pair}:
        settings["speculative_model"] = world.directory / "draft"
    return EngineConfig(world.directory / "model", device=DEVICE, dtype="bfloat16", **settings)


def engine_of(world: World, pair: Pair) -> Engine:
    """The engine of the last pair where it has the same features, else a new one. The caller puts it back when nothing went wrong."""
    engine, key, world.engine = world.engine, world.key, None
    if engine is None or key != key_of(pair):
        del engine
        gc.collect()
        engine = create_engine(config_of(world, pair))
        engine._payoffs.of = lambda requests: Always()  # type: ignore[method-assign, assignment, return-value]
        world.key = key_of(pair)
    return engine


@torch.no_grad()
def check(world: World, pair: Pair, told: list[Answer], adapters: list[str | None]) -> None:
    """Every token, score and end of five answers against the float32 model."""
    params, names = settings_of(pair), {feature.name for feature in pair}
    bound = ROUNDING + math.hypot(*(MORE.get(name, 0.0) for name in names))
    quantization = next((str(f.settings["quantization"]) for f in pair if "quantization" in f.settings), "none")
    for adapter in set(adapters):
        mine = [index for index, one in enumerate(adapters) if one == adapter]
        texts = [world.text.prompts[index] + told[index].tokens for index in mine]
        padded = [tokens + [0] * (max(map(len, texts)) - len(tokens)) for tokens in texts]
        logits = world.model(quantization, adapter)(torch.tensor(padded, device=DEVICE)).logits.float().cpu()
        for index, tokens, rows in zip(mine, texts, logits, strict=True):
            first = len(world.text.prompts[index])
            raw, answer = rows[first - 1 : len(tokens) - 1], told[index]
            found = distance(raw, world.text, index, params, answer, bound)
            assert found < bound, f"request {index} says a token that is {found:.3f} below the best one"
            check_end(answer, params)
            check_scores(rows[: len(tokens) - 1].log_softmax(-1), tokens, first, answer, params, bound)


def check_end(answer: Answer, params: SamplingParams) -> None:
    ends = {*ENDS, *params.stop_token_ids}
    assert not ends & set(answer.tokens[:-1]), "it goes on behind an end"
    assert answer.reason == ("stop" if answer.tokens[-1] in ends else "length")
    assert answer.reason == "stop" or len(answer.tokens) == params.max_tokens


def check_scores(
    scores: torch.Tensor, tokens: list[int], first: int, answer: Answer, params: SamplingParams, bound: float
) -> None:
    """scores: float32 [tokens - 1, vocab], what row i says of token i + 1; `first`: where the answer begins."""
    own = scores.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
    if params.prompt_logprobs:
        assert answer.prompt_logprobs == pytest.approx(own[: first - 1], abs=1.5 * bound)
    if params.logprobs is None:
        return
    assert answer.logprobs == pytest.approx(own[first - 1 :], abs=bound)
    assert len(answer.top) == len(answer.tokens)
    for row, top in zip(scores[first - 1 :], answer.top, strict=True):
        best = row.topk(params.logprobs).values
        assert row[list(top)].sort(descending=True).values.tolist() == pytest.approx(best.tolist(), abs=bound)


def check_use(before: EngineStats, after: EngineStats, names: set[str], params: SamplingParams) -> None:
    """The features were at work, as far as the counters tell."""
    if "preemption" in names:
        assert after.preemptions > before.preemptions
    rows = params.structured or params.penalized or params.logit_bias or params.logprobs is not None
    # Guesses are rarely made, or rarely right, with these; under a target a draft model may catch up with a prompt only when an answer has ended.
    rare = names & {"preemption", "chunked prefill", "LoRA", "DoRA", "min tokens", "stop tokens", "ITL target"}
    if names & GUESSING and not rows and not rare and params.greedy:
        guessed, right = (getattr(after, name) - getattr(before, name) for name in ("guessed_tokens", "accepted_tokens"))
        assert guessed > 0
        assert "speculation" in names or 0 < right <= guessed


def both_features(world: World, engine: Engine, pair: Pair) -> None:
    names, params, adapters = {feature.name for feature in pair}, settings_of(pair), adapters_of(pair)
    before = engine.stats()
    for name in {name for name in adapters if name is not None} - set(engine.adapters):
        engine.load_adapter(name, world.adapter(name))
    together = "+".join(sorted(names))
    told = run(engine, world.text, names, params, adapters, namespace=together)
    check(world, pair, told, adapters)
    if "prefix cache" in names:
        cached = engine.stats().cached_tokens
        check(world, pair, run(engine, world.text, names, params, adapters, namespace=together), adapters)
        # Scores of a prompt need its logits, so it is computed again.
        assert (engine.stats().cached_tokens > cached) == (not params.prompt_logprobs)
    if "sleep" in names:
        engine.sleep(2)
        assert engine.stats().kv_cache_usage == 0
        engine.wake_up()
        check(world, pair, run(engine, world.text, names, params, adapters, namespace=together), adapters)
    if "deterministic mode" in names:
        for index in (0, 3):
            alone = run(engine, world.text, names, params, adapters, [index], namespace=f"{together} {index}")
            assert alone == [told[index]], "the same to the bit"
    check_use(before, engine.stats(), names, params)


# Pairs that share an engine follow one another.
IN_ORDER = sorted(GPU_PAIRS, key=key_of)


@pytest.mark.parametrize("pair", IN_ORDER, ids=[f"{a.name}+{b.name}".replace(" ", "-") for a, b in IN_ORDER])
def test_two_features_together(world: World, pair: tuple[Feature, Feature]) -> None:
    names = frozenset(feature.name for feature in pair)
    world.outcomes[names] = "failed"
    if is_refused(pair):
        with pytest.raises(ValueError, match=r"structured output|deterministic is not for"):
            settings_of(pair)
            config_of(world, pair)
        world.outcomes[names] = "refused"
        return
    engine = engine_of(world, pair)
    both_features(world, engine, pair)
    world.engine = engine
    world.outcomes[names] = "passed"
