"""A draft model guesses: fewer steps of the large model, the same answers, the same distribution."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import LlamaForCausalLM

from altiplano.engine import Engine, EngineConfig, EngineError, SamplingParams
from altiplano_kernels.sampling.reference import sample

from .conftest import VOCAB, greedy, make_draft, make_llama

Llama = tuple[Path, LlamaForCausalLM]
SETTINGS = {"max_model_len": 256, "block_size": 8, "num_blocks": 256, "debug": True}


@pytest.fixture(scope="module")
def draft(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("draft")
    make_draft(llama[1], directory)
    return directory


def engine_with(directory: Path, draft: Path | None, tokens: int = 4, **settings: object) -> Engine:
    """On a clock that stands still: nothing is found slow on a busy machine."""
    guesses = {"num_speculative_tokens": tokens, "speculative_model": draft} if draft else {}
    return Engine(EngineConfig(directory, **(SETTINGS | guesses | settings)), clock=lambda: 0.0)  # type: ignore[arg-type]


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(8)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randrange(4, 40))] for _ in range(count)]


def test_a_draft_that_is_the_model_itself_is_always_right(llama: Llama) -> None:
    directory, model = llama
    engine = engine_with(directory, directory)
    params = SamplingParams(max_tokens=41, temperature=0.0, ignore_eos=True)
    for prompt in prompts(3):
        before = engine.stats()
        assert engine.generate([prompt], params)[0].token_ids == greedy(model, prompt, 41)
        now = engine.stats()
        assert now.accepted_tokens - before.accepted_tokens == now.guessed_tokens - before.guessed_tokens > 0
        assert now.steps - before.steps < 41 / 3


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_are_those_of_the_model_alone(llama: Llama, draft: Path, temperature: float) -> None:
    params = [SamplingParams(max_tokens=40, temperature=temperature, seed=i, ignore_eos=True) for i in range(5)]
    wanted = engine_with(llama[0], None).generate(prompts(5), params)
    engine = engine_with(llama[0], draft)
    assert engine.generate(prompts(5), params) == wanted
    assert 0 < engine.stats().accepted_tokens < engine.stats().guessed_tokens
    if temperature == 0:
        assert [c.token_ids for c in wanted] == [greedy(llama[1], prompt, 40) for prompt in prompts(5)]


def test_preempted_requests_and_cached_prefixes_keep_the_drafts_cache_right(llama: Llama) -> None:
    """The draft is the model itself, so a single wrong entry in its cache shows as a wrong guess."""
    engine = engine_with(llama[0], llama[0], num_blocks=20, max_model_len=100)
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    asked = prompts(6)
    wanted = [greedy(llama[1], prompt, 40) for prompt in asked]
    for chosen in (range(6), range(6), range(1), range(1)):
        assert [c.token_ids for c in engine.generate([asked[i] for i in chosen], params)] == [wanted[i] for i in chosen]
    stats_now = engine.stats()
    assert stats_now.preemptions > 0 and stats_now.cached_tokens > 0
    assert stats_now.accepted_tokens == stats_now.guessed_tokens > 0


def test_the_draft_starts_from_cached_pages_too(llama: Llama) -> None:
    engine = engine_with(llama[0], llama[0])
    computed = []
    execute = engine._proposer._runner.execute  # type: ignore[union-attr]
    engine._proposer._runner.execute = lambda plan: computed.append(plan.num_tokens) or execute(plan)  # type: ignore[union-attr, func-returns-value]
    prompt = list(range(3, 100))
    for namespace, fewest, most in (("a", 97, 200), ("a", 1, 20), ("b", 97, 200)):
        computed.clear()
        engine.add_request("x", prompt, SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True), namespace=namespace)
        while engine.has_unfinished():
            engine.step()
        assert fewest <= sum(computed) <= most
    assert engine.stats().accepted_tokens == engine.stats().guessed_tokens


def test_the_distribution_is_the_models_and_not_the_drafts(tmp_path: Path) -> None:
    """The first two tokens over many seeds, against the exact probabilities of pairs, by chi-square.

    The draft is far from the model: the same test against the draft's own probabilities must fail.
    """
    torch.manual_seed(1)
    model = make_llama(tmp_path / "model", vocab=12)
    make_llama(tmp_path / "draft", seed=5, vocab=12)
    many, prompt, temperature = 2000, [3, 4, 5], 2.0
    engine = engine_with(tmp_path / "model", tmp_path / "draft", 3, max_num_seqs=5, num_blocks=512)
    params = [SamplingParams(max_tokens=3, temperature=temperature, seed=i, ignore_eos=True) for i in range(many)]
    said = [completion.token_ids for completion in engine.generate([prompt] * many, params)]
    guessed, accepted = engine.stats().guessed_tokens, engine.stats().accepted_tokens
    assert 0.05 < accepted / guessed < 0.95

    def exact(model: LlamaForCausalLM) -> torch.Tensor:
        """P(first, second) as [vocab, vocab]."""
        with torch.no_grad():
            first = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
            second = (model(torch.tensor([[*prompt, token] for token in range(12)])).logits[:, -1] / temperature).softmax(-1)
        return first[:, None] * second

    counts = torch.zeros(12, 12)
    for tokens in said:
        counts[tokens[0], tokens[1]] += 1
    drafts = LlamaForCausalLM.from_pretrained(tmp_path / "draft")
    assert chi_square(counts, exact(model)) > 1e-3
    assert chi_square(counts, exact(drafts)) < 1e-6


@given(st.integers(0, 1000), st.floats(0.1, 3.0))
def test_two_models_with_the_same_noise_agree_as_often_as_is_possible_without_talking(seed: int, distance: float) -> None:
    """P[equal] >= (1 - TV) / (1 + TV): Daliri, Musco and Suresh, arXiv 2408.07978."""
    torch.manual_seed(seed)
    many = 4000
    logits = torch.randn(20)
    drafts = logits + distance * torch.randn(20)
    settings = (torch.ones(many), torch.zeros(many, dtype=torch.int64), torch.ones(many), torch.zeros(many))
    noise = (torch.arange(many), torch.full((many,), 3))
    equal = sample(logits.expand(many, -1), *settings, *noise) == sample(drafts.expand(many, -1), *settings, *noise)
    apart = float((logits.softmax(-1) - drafts.softmax(-1)).abs().sum()) / 2
    bound = (1 - apart) / (1 + apart)
    assert float(equal.float().mean()) >= bound - 5 * (0.25 / many) ** 0.5


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """The p-value; cells that expect fewer than five are taken together."""
    total = float(counts.sum())
    expected = probabilities.double().flatten() / probabilities.double().sum() * total
    rare = expected < 5
    seen = torch.cat([counts.double().flatten()[~rare], counts.double().flatten()[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    kept = wanted > 0
    return float(stats.chisquare(seen[kept], wanted[kept]).pvalue)


def test_structured_requests_are_not_guessed_and_others_beside_them_are(llama: Llama, draft: Path) -> None:
    engine = engine_with(llama[0], draft)
    engine.add_request("s", [5, 6], SamplingParams(max_tokens=4, temperature=0.0, structured=True))
    engine.add_request("p", [9, 8], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    said: dict[str, list[int]] = {"s": [], "p": []}
    while engine.has_unfinished():
        engine.allow("s", bytes([255] * 15))
        for output in engine.step():
            assert output.token_id is not None
            said[output.request_id].append(output.token_id)
    assert len(said["s"]) == 4 and said["p"] == greedy(llama[1], [9, 8], 20)
    assert engine.stats().guessed_tokens > 0


def test_drafts_that_do_not_fit_are_refused(llama: Llama, tmp_path: Path) -> None:
    make_llama(tmp_path, vocab=12)
    with pytest.raises(EngineError, match="same tokenizer"):
        engine_with(llama[0], tmp_path)
    with pytest.raises(ValueError, match="num_speculative_tokens 0"):
        EngineConfig(llama[0], speculative_model=tmp_path)


def test_penalties_and_ends_hold_while_guessing(llama: Llama, draft: Path) -> None:
    params = SamplingParams(
        max_tokens=40,
        min_tokens=6,
        temperature=0.7,
        top_p=0.9,
        seed=2,
        frequency_penalty=1.0,
        stop_token_ids=tuple(range(3, 120, 9)),
    )
    each = [replace(params, seed=seed) for seed in range(5)]
    engine = engine_with(llama[0], draft)
    assert engine.generate(prompts(5), each) == engine_with(llama[0], None).generate(prompts(5), each)
    assert engine.stats().accepted_tokens > 0
