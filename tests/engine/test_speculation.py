"""Guesses save steps and change nothing."""

import random
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from altiplano.engine import Engine, EngineConfig, SamplingParams
from altiplano.engine.speculation import MAX_REST, PromptLookup

from .conftest import greedy


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 8), st.data())
def test_guesses_are_what_followed_the_same_words_before(tokens: list[int], limit: int, data: st.DataObject) -> None:
    lookup = PromptLookup(8)
    seen = data.draw(st.integers(1, len(tokens)))
    lookup.propose(tokens[:seen], limit)
    guesses = lookup.propose(tokens, limit)
    assert len(guesses) <= limit
    ends = {n: [end for end in range(n, len(tokens)) if tokens[end - n : end] == tokens[-n:]] for n in (3, 2)}
    at = next((found[-1] for found in ends.values() if found), None)
    wanted = [] if at is None else list(islice(cycle(tokens[at:]), limit))
    assert list(guesses) == wanted


def test_a_request_that_is_guessed_badly_is_left_alone_longer_and_longer() -> None:
    lookup, text = PromptLookup(4), [1, 2, 3, 4, 5, 6] * 3
    pauses = []
    for _ in range(8):
        assert lookup.propose(text, 4)
        lookup.observe(4, 0)
        pause = 0
        while not lookup.propose(text, 4):
            pause += 1
        pauses.append(pause)
    assert pauses == [2, 4, 8, 16, 32, MAX_REST, MAX_REST, MAX_REST]
    assert len(lookup.propose(text, 4)) == 1, "careful after so many misses"
    for _ in range(2):
        lookup.observe(len(lookup.propose(text, 4)), len(lookup.propose(text, 4)))
    assert len(lookup.propose(text, 4)) == 4, "and bold again once it is right"


def test_a_text_that_repeats_itself_takes_fewer_steps_and_says_the_same(llama: tuple[Path, LlamaForCausalLM]) -> None:
    directory, model = llama
    prompt = [random.Random(5).randrange(3, 120) for _ in range(12)]
    params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    wanted = greedy(model, prompt, 200)
    assert wanted[-40:-20] == wanted[-20:] or len(set(wanted)) < 100, "a small random model falls into loops"
    steps = []
    for guesses in (0, 6):
        engine = Engine(EngineConfig(directory, max_model_len=256, num_blocks=64, num_speculative_tokens=guesses, debug=True))
        assert engine.generate([prompt], params)[0].token_ids == wanted
        steps.append(engine.stats().steps)
    assert steps[1] < 0.7 * steps[0]
    assert engine.stats().accepted_tokens == steps[0] - steps[1]


def test_a_stop_token_among_right_guesses_ends_the_answer(llama: tuple[Path, LlamaForCausalLM]) -> None:
    directory, _ = llama
    prompt = [random.Random(5).randrange(3, 120) for _ in range(12)]
    params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    whole = Engine(EngineConfig(directory, max_model_len=256, num_blocks=64)).generate([prompt], params)[0].token_ids
    for length in range(100, 120):
        # Ends wherever this token comes first, in the middle of a run of guesses or not.
        stops = replace(params, stop_token_ids=(whole[length],), min_tokens=100)
        engine = Engine(EngineConfig(directory, max_model_len=256, num_blocks=64, num_speculative_tokens=6, debug=True))
        plain = Engine(EngineConfig(directory, max_model_len=256, num_blocks=64))
        assert engine.generate([prompt], stops) == plain.generate([prompt], stops)


def test_many_requests_at_once_are_not_guessed(llama: tuple[Path, LlamaForCausalLM]) -> None:
    engine = Engine(EngineConfig(llama[0], max_model_len=64, num_blocks=64, num_speculative_tokens=6))
    engine.generate([[5, 6] * 8] * 16, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
    assert engine.stats().guessed_tokens == 0


@pytest.mark.parametrize("wrong", [{"num_speculative_tokens": -1}, {"num_speculative_tokens": 16, "device": "cuda"}])
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="num_speculative_tokens"):
        EngineConfig(Path("x"), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_quantization_of_no_draft_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="speculative_quantization"):
        EngineConfig(Path("x"), device=device, num_speculative_tokens=2, speculative_quantization="int4")
