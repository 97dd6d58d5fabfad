"""Every two features of the engine together answer what a plain loop over transformers' logits answers."""

import itertools
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

from .conftest import VOCAB, make_adapter, make_draft
from .feature_requests import Answer, Text, adapters_of, prompts, run, settings_of
from .features import COMMAND, GPU_PAIRS, PAIRS, Feature, docs_page, is_refused, results

ROOT = Path(__file__).parents[2]
EOS = 1
TEXT = Text(VOCAB, (EOS,), prompts(VOCAB))
ROOMY = {"num_blocks": 256, "block_size": 8, "max_model_len": 256, "enable_prefix_caching": False, "debug": True}
Model = Callable[[list[int]], torch.Tensor]
Key = tuple[int, str | None, str]


@dataclass
class World:
    """One model, its two adapters, and what the plain loop has answered so far."""

    directory: Path
    draft: Path
    adapters: dict[str, Path]
    models: dict[str | None, Model]
    known: dict[Key, Answer] = field(default_factory=dict)


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
        said = tokens[len(prompt) :]
        row = TEXT.ruled(raw, prompt, said, request, params)
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
    adapters = adapters_of(pair)
    expected = []
    for index, prompt in enumerate(TEXT.prompts):
        key = (index, adapters[index], repr(params))
        if key not in world.known:
            world.known[key] = plain_loop(world.models[adapters[index]], prompt, index, params)
        expected.append(world.known[key])

    engine = make_engine(world, pair, [(p, answer.tokens) for p, answer in zip(TEXT.prompts, expected, strict=True)])
    for name in {name for name in adapters if name is not None}:
        engine.load_adapter(name, world.adapters[name])
    told = run(engine, TEXT, names, params, adapters)
    if names & {"speculation", "draft model"}:
        # What a structured request may say next is known only step by step.
        assert (0 < engine.stats().accepted_tokens < engine.stats().guessed_tokens) == (not params.structured)
    if "prefix cache" in names:
        before = engine.stats().cached_tokens
        told = run(engine, TEXT, names, params, adapters)
        # Scores of a prompt need its logits, so it is computed again.
        assert (engine.stats().cached_tokens > before) == (not params.prompt_logprobs)
    if "sleep" in names:
        engine.sleep(2)
        assert engine.stats().kv_cache_usage == 0
        engine.wake_up()
        told = run(engine, TEXT, names, params, adapters)
    if "preemption" in names:
        assert engine.stats().preemptions > 0
    for answer, wanted in zip(told, expected, strict=True):
        assert (answer.tokens, answer.reason, answer.top) == (wanted.tokens, wanted.reason, wanted.top)
        assert answer.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        assert answer.prompt_logprobs == pytest.approx(wanted.prompt_logprobs, abs=1e-4)


def test_the_docs_page_lists_what_is_tested() -> None:
    assert (ROOT / "docs/features.md").read_text() == docs_page(results()), COMMAND


def test_what_the_gpu_has_found_is_about_pairs_that_there_are() -> None:
    found = results()
    if found is None:
        pytest.skip("the matrix has not been run on a GPU yet")
    assert found["commit"] and found["hardware"] and {"torch", "triton"} <= found["versions"].keys()
    told = {frozenset((a, b)): outcome for a, b, outcome in found["pairs"]}
    pairs = {frozenset((a.name, b.name)): "refused" if is_refused((a, b)) else "passed" for a, b in GPU_PAIRS}
    assert len(told) == len(found["pairs"]) and told.keys() <= pairs.keys()
    assert all(outcome in (pairs[names], "failed") for names, outcome in told.items())


def test_the_page_shows_what_the_gpu_has_found() -> None:
    """One pair fails and one was not run; the others are as the run says."""
    listed = [[a.name, b.name, "refused" if is_refused((a, b)) else "passed"] for a, b in GPU_PAIRS]
    assert listed[0] == ["prefix cache", "chunked prefill", "passed"] and listed[1][:2] == ["prefix cache", "preemption"]
    listed[0][2] = "failed"
    found = {"pairs": [listed[0], *listed[2:]], "commit": "abc", "hardware": "H200", "versions": {"torch": "2.11"}}
    gpu = docs_page(found).split("## On a GPU")[1]
    assert "H200, torch 2.11, commit abc" in gpu
    rows = {line.split("|")[1].strip(): line for line in gpu.splitlines() if line.startswith("| ")}
    assert rows["2 chunked prefill"].split("|")[2].strip() == "!"
    assert rows["3 preemption"].split("|")[2:4] == [" ? ", " ✓ "]
    assert rows["27 W8A8 FP8"].count("or") == 2 and rows["27 W8A8 FP8"].count("✗") == 1
    assert "Not run yet" in docs_page(None)
