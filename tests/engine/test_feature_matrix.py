"""Every two features of the engine together answer what a plain loop over transformers' logits answers."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from altiplano.engine import Engine, EngineConfig, SamplingParams
from altiplano.engine.guessing import Wants
from altiplano.engine.request import Request
from altiplano_kernels.sampling.reference import sample

from .conftest import VOCAB, bits, make_adapter, make_draft
from .features import COMMAND, PAIRS, Feature, docs_page, is_refused

ROOT = Path(__file__).parents[2]
EOS, REQUESTS, NEW = 1, 5, 10
ROOMY = {"num_blocks": 256, "block_size": 8, "max_model_len": 256, "enable_prefix_caching": False, "debug": True}
Model = Callable[[list[int]], torch.Tensor]
Key = tuple[int, str | None, str]


@dataclass
class Answer:
    """What one request was told."""

    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[int, ...]] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)


@dataclass
class World:
    """One model, its two adapters, and what the plain loop has answered so far."""

    directory: Path
    draft: Path
    adapters: dict[str, Path]
    models: dict[str | None, Model]
    known: dict[Key, Answer] = field(default_factory=dict)


def prompts() -> list[list[int]]:
    """Half of them with a common beginning."""
    rng = random.Random(3)
    shared = [rng.randrange(3, VOCAB) for _ in range(20)]
    own = [[rng.randrange(3, VOCAB) for _ in range(rng.randint(3, 25))] for _ in range(REQUESTS)]
    return [shared + tokens if index % 2 else tokens for index, tokens in enumerate(own)]


def allowed(request: int, step: int) -> list[int]:
    """What a structured request may say next; the end is among it from the fifth token on."""
    chosen = random.Random(100 * request + step).sample(range(3, VOCAB), 8)
    return [*chosen, EOS] if step >= 4 else chosen


@pytest.fixture(scope="module")
def world(llama: tuple[Path, LlamaForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> World:
    directory, base = llama
    adapters, models = {}, dict[str | None, Model]()

    def logits(model: LlamaForCausalLM | PeftModel) -> Model:
        def of(tokens: list[int]) -> torch.Tensor:
            with torch.no_grad():
                found: torch.Tensor = model(torch.tensor([tokens])).logits[0]
            return found

        return of

    models[None] = logits(base)
    for seed, name in enumerate(("lora", "dora")):
        folder = tmp_path_factory.mktemp(name)
        tuned = make_adapter(folder, seed, name)
        adapters[name], models[name] = folder, logits(tuned)
    draft = tmp_path_factory.mktemp("draft")
    make_draft(base, draft)
    return World(directory, draft, adapters, models)


def plain_loop(model: Model, prompt: list[int], request: int, params: SamplingParams) -> Answer:
    """One request alone, the whole text through the model for every token, and the rules of sampling written out."""
    told, tokens = Answer(), list(prompt)
    if params.prompt_logprobs:
        scores = model(prompt).log_softmax(-1)
        told.prompt_logprobs = [float(scores[i, token]) for i, token in enumerate(prompt[1:])]
    while told.reason is None:
        raw = model(tokens)[-1].float()
        row = raw.clone()
        said = tokens[len(prompt) :]
        for token in range(VOCAB):
            if token in tokens and params.repetition_penalty != 1:
                row[token] = row[token] / params.repetition_penalty if row[token] > 0 else row[token] * params.repetition_penalty
            row[token] -= params.frequency_penalty * said.count(token) + params.presence_penalty * (token in said)
        for token, bias in (params.logit_bias or {}).items():
            row[token] += bias
        if len(said) < params.min_tokens:
            row[[EOS, *params.stop_token_ids]] = float("-inf")
        if params.structured:
            row[[token for token in range(VOCAB) if token not in allowed(request, len(said))]] = float("-inf")
        if params.greedy:
            token = int(row.argmax())
        else:
            numbers = [
                torch.tensor([x]) for x in (params.temperature, params.top_k, params.top_p, params.min_p, params.seed, len(said))
            ]
            token = int(sample(row[None], *numbers))
        if params.logprobs is not None:
            scores = raw.log_softmax(-1)
            told.logprobs.append(float(scores[token]))
            told.top.append(tuple(scores.topk(params.logprobs).indices.tolist()))
        tokens.append(token)
        if token == EOS or token in params.stop_token_ids:
            told.reason = "stop"
        elif len(tokens) - len(prompt) == params.max_tokens:
            told.reason = "length"
    told.tokens = tokens[len(prompt) :]
    return told


class Foresight:
    """Guesses what the plain loop has answered, but for every third guess."""

    def __init__(self, answers: list[tuple[list[int], list[int]]]) -> None:
        self._answers, self._made = answers, 0

    def propose(self, wants: Wants, budget: int) -> list[tuple[int, ...]]:
        return [self._of(request.tokens, min(4, limit)) for request, limit in wants]

    def _of(self, tokens: list[int], limit: int) -> tuple[int, ...]:
        whole = next((p + answer for p, answer in self._answers if (p + answer)[: len(tokens)] == tokens), [])
        guesses = []
        for token in whole[len(tokens) : len(tokens) + limit]:
            self._made += 1
            guesses.append(token if self._made % 3 else (token + 1) % VOCAB)
        return tuple(guesses)

    def observe(self, request: Request, proposed: int, accepted: int) -> None:
        assert 0 <= accepted <= proposed


def settings_of(pair: tuple[Feature, Feature]) -> SamplingParams:
    merged = {"temperature": 0.0, "max_tokens": NEW} | dict(pair[0].params) | dict(pair[1].params)
    return SamplingParams(**merged)


def run(engine: Engine, names: set[str], params: SamplingParams, adapters: list[str | None], namespace: str) -> list[Answer]:
    """All requests through one engine; everybody's news in their answers."""
    told = [Answer() for _ in range(REQUESTS)]
    for index, prompt in enumerate(prompts()):
        priority = -index if "priorities" in names else 0
        engine.add_request(f"{index}", prompt, params, adapter=adapters[index], priority=priority, namespace=namespace)
    if "abort" in names:
        engine.add_request("neighbour", [7, 8, 9], SamplingParams(max_tokens=20, temperature=0.0))
    steps = 0
    while engine.has_unfinished():
        if params.structured:
            for index, answer in enumerate(told):
                engine.allow(f"{index}", bits(allowed(index, len(answer.tokens))))
        for output in engine.step():
            if output.request_id == "neighbour":
                continue
            answer = told[int(output.request_id)]
            answer.prompt_logprobs += output.prompt_logprobs
            answer.reason = output.finish_reason
            assert output.token_id is not None
            answer.tokens.append(output.token_id)
            if output.logprob is not None:
                answer.logprobs.append(output.logprob)
                answer.top.append(tuple(token for token, _ in output.top_logprobs))
        steps += 1
        if steps == 3:
            engine.abort("neighbour")
    return told


def make_engine(world: World, pair: tuple[Feature, Feature], answers: list[tuple[list[int], list[int]]]) -> Engine:
    """On a clock of its own, so that nothing is found slow on a busy machine."""
    ticks = itertools.count()
    settings = ROOMY | dict(pair[0].settings) | dict(pair[1].settings)
    names = {feature.name for feature in pair}
    if "draft model" in names:
        settings["speculative_model"] = world.draft
    proposer = Foresight(answers) if names & {"speculation"} else None
    return Engine(EngineConfig(world.directory, **settings), clock=lambda: next(ticks) / 1000, proposer=proposer)  # type: ignore[arg-type]


@pytest.mark.parametrize("pair", PAIRS, ids=[f"{a.name}+{b.name}".replace(" ", "-") for a, b in PAIRS])
def test_two_features_together(world: World, pair: tuple[Feature, Feature]) -> None:
    if is_refused(pair):
        with pytest.raises(ValueError, match="structured"):
            settings_of(pair)
        return
    names, params = {feature.name for feature in pair}, settings_of(pair)
    used = [feature.adapter for feature in pair if feature.adapter]
    choices = [None, *used]
    adapters = [choices[index % len(choices)] for index in range(REQUESTS)]
    expected = []
    for index, prompt in enumerate(prompts()):
        key = (index, adapters[index], repr(params))
        if key not in world.known:
            world.known[key] = plain_loop(world.models[adapters[index]], prompt, index, params)
        expected.append(world.known[key])

    engine = make_engine(world, pair, [(p, answer.tokens) for p, answer in zip(prompts(), expected, strict=True)])
    for name in used:
        engine.load_adapter(name, world.adapters[name])
    told = run(engine, names, params, adapters, "")
    if names & {"speculation", "draft model"}:
        # What a structured request may say next is known only step by step.
        assert (0 < engine.stats().accepted_tokens < engine.stats().guessed_tokens) == (not params.structured)
    if "prefix cache" in names:
        before = engine.stats().cached_tokens
        told = run(engine, names, params, adapters, "")
        # Scores of a prompt need its logits, so it is computed again.
        assert (engine.stats().cached_tokens > before) == (not params.prompt_logprobs)
    if "sleep" in names:
        engine.sleep(2)
        assert engine.stats().kv_cache_usage == 0
        engine.wake_up()
        told = run(engine, names, params, adapters, "")
    if "preemption" in names:
        assert engine.stats().preemptions > 0
    for answer, wanted in zip(told, expected, strict=True):
        assert (answer.tokens, answer.reason, answer.top) == (wanted.tokens, wanted.reason, wanted.top)
        assert answer.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        assert answer.prompt_logprobs == pytest.approx(wanted.prompt_logprobs, abs=1e-4)


def test_the_docs_page_lists_what_is_tested() -> None:
    assert (ROOT / "docs/features.md").read_text() == docs_page(), COMMAND
