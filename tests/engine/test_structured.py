"""Requests whose caller says before each step which tokens may come next."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from altiplano.engine import EngineConfig, SamplingParams, create_engine
from altiplano.engine.masks import forbid

from .conftest import VOCAB, bits

VOCAB_TOP = 5
STRUCTURED = SamplingParams(max_tokens=6, temperature=0.0, structured=True)


@given(st.lists(st.one_of(st.none(), st.sets(st.integers(0, 20), min_size=1)), min_size=1, max_size=5))
def test_what_a_set_leaves_out_becomes_impossible(sets: list[set[int] | None]) -> None:
    logits = torch.randn(len(sets), 21)
    before = logits.clone()
    forbid(logits, [None if allowed is None else bits(allowed) for allowed in sets])
    for row, allowed in enumerate(sets):
        kept = set(range(21)) if allowed is None else allowed
        assert all((logits[row, token] == before[row, token]) == (token in kept) for token in range(21))


def test_only_allowed_tokens_are_drawn_and_others_go_on_meanwhile(llama: tuple[Path, LlamaForCausalLM]) -> None:
    """Pages are so few that requests are preempted, blocked or not."""
    engine = create_engine(EngineConfig(llama[0], max_model_len=32, block_size=4, num_blocks=9, debug=True))
    generator = random.Random(7)
    plain = engine.generate([[5, 6, 7]], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))[0].token_ids
    sets = [[generator.sample(range(3, VOCAB), 4) for _ in range(6)] for _ in range(4)]
    for i in range(4):
        engine.add_request(f"s{i}", [9, 8, i + 10], STRUCTURED)
    engine.add_request("plain", [5, 6, 7], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    said = {name: list[int]() for name in ("s0", "s1", "s2", "s3", "plain")}
    while engine.has_unfinished():
        for output in engine.step():
            assert output.token_id is not None
            said[output.request_id].append(output.token_id)
        # The answers to what may come next arrive in any order, and late.
        name = f"s{generator.randrange(4)}"
        if len(said[name]) < 6:
            engine.allow(name, bits(sets[int(name[1])][len(said[name])]))
    assert said["plain"] == plain
    assert engine.stats().preemptions > 0
    for i in range(4):
        assert [token in allowed for token, allowed in zip(said[f"s{i}"], sets[i], strict=True)] == [True] * 6


def test_a_blocked_engine_says_so_and_an_end_token_ends(llama: tuple[Path, LlamaForCausalLM]) -> None:
    engine = create_engine(EngineConfig(llama[0], max_model_len=32, block_size=4, num_blocks=16, debug=True))
    engine.add_request("s", [9, 8, 7], STRUCTURED)
    assert engine.is_blocked() and engine.has_unfinished() and engine.step() == []
    engine.allow("s", bits([40]))
    assert not engine.is_blocked()
    assert [output.token_id for output in engine.step()] == [40]
    assert engine.is_blocked()
    engine.allow("s", bits([1]))
    (last,) = engine.step()
    assert (last.token_id, last.finish_reason) == (1, "stop")
    assert not engine.has_unfinished()


def test_prompt_log_probabilities_come_with_the_first_token(llama: tuple[Path, LlamaForCausalLM]) -> None:
    """In chunks of two tokens, as long prompts are computed."""
    engine = create_engine(EngineConfig(llama[0], max_model_len=32, block_size=4, num_blocks=16, max_num_batched_tokens=2))
    expected = engine.score([[5, 6, 7, 8]])[0]
    engine.add_request("p", [5, 6, 7, 8], SamplingParams(max_tokens=2, prompt_logprobs=True, logprobs=VOCAB_TOP, ignore_eos=True))
    assert engine.step() == []
    first, second = engine.step()[0], engine.step()[0]
    assert list(first.prompt_logprobs) == pytest.approx(expected)
    likely = llama[1](torch.tensor([[5, 6, 7, 8]])).logits[0].log_softmax(-1).topk(VOCAB_TOP)
    assert [[i for i, _ in row] for row in first.prompt_top] == likely.indices[:3].tolist()
    assert [p for row in first.prompt_top for _, p in row] == pytest.approx(likely.values[:3].flatten().tolist(), abs=1e-4)
    assert second.prompt_logprobs == second.prompt_top == ()


@pytest.mark.parametrize("wrong", [{"min_tokens": 2}, {"ignore_eos": True}])
def test_what_contradicts_a_grammar_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="structured"):
        SamplingParams(max_tokens=4, structured=True, **wrong)  # type: ignore[arg-type]
