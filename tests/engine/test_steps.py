"""Where the time of steps went, on a clock that only the model moves, and on a real model."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
from transformers import LlamaForCausalLM

from altiplano.engine import Engine, EngineConfig, SamplingParams
from altiplano.engine.plan import StepPlan
from altiplano.engine.runner import Drawn
from altiplano.engine.steps import REMEMBERED, StepLog

from .virtual import Clock, VirtualRunner

LOW, HIGH = 0.01, 0.001


def law(prompt_tokens: int, decodes: int) -> float:
    return LOW + HIGH * prompt_tokens


def virtual(clock: Clock, **more: object) -> Engine:
    config = EngineConfig(model=Path("virtual"), block_size=4, num_blocks=64, max_model_len=64, max_num_batched_tokens=16)
    return Engine(config, VirtualRunner(clock, law), clock=clock)


def sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def test_a_record_says_what_a_step_computed_and_where_its_time_went() -> None:
    clock = Clock()
    engine = virtual(clock)
    engine.add_request("a", range(2, 22), sampling(3))
    engine.step()  # 16 tokens of the prompt
    clock.now += 0.5  # the host is busy with something else
    engine.step()  # the other 4, and the first token
    clock.now += 0.25
    engine.add_request("b", range(2, 22), sampling(2))
    engine.step()  # a decode beside the rest of a prompt whose first 5 pages are known, but for the last token's
    engine.step()
    assert not engine.has_unfinished()
    found = engine.step_log.last()
    assert [(r.number, r.decodes, r.prompt_tokens, r.generated_tokens, r.cached_tokens) for r in found] == [
        (1, 0, 16, 0, 0),
        (2, 0, 4, 1, 0),
        (3, 1, 4, 2, 16),
        (4, 2, 0, 2, 0),
    ]
    assert [r.seconds for r in found] == pytest.approx([LOW + n * HIGH for n in (16, 4, 4, 0)])
    assert [r.gap_seconds for r in found] == pytest.approx([0, 0.5, 0.25, 0])
    assert found[-1].ended == clock.now and sum(r.seconds for r in found) == pytest.approx(engine.stats().step_seconds)
    assert [r.kv_cache_usage for r in found][:2] == [4 / 64, 5 / 64]


def test_time_in_which_nobody_was_there_is_no_gap() -> None:
    clock = Clock()
    engine = virtual(clock)
    for _ in range(2):
        engine.generate([[5, 6, 7]], sampling(2))
        clock.now += 60
    engine.add_request("gone", [5, 6], sampling(2))
    engine.step()
    engine.abort("gone")
    clock.now += 60
    engine.generate([[5, 6, 7]], sampling(2))
    assert [r.gap_seconds for r in engine.step_log.last()] == [0] * 7
    assert engine.step_log.histograms()["iteration_gap_seconds"].total == 0


def test_the_parts_of_the_time_of_overlapping_bursts_add_up() -> None:
    log = StepLog()
    log.add(1.0, 2.0, 4, 0, 32, 0.5, steps=8)
    log.add(1.5, 2.75, 4, 0, 32, 0.5, steps=8)  # launched while the first one ran
    log.add(3.0, 3.5, 4, 0, 4, 0.5, drafting=0.125)
    first, second, third = log.last()
    assert (first.seconds, second.seconds, third.seconds) == (1.0, 0.75, 0.5)
    assert (second.gap_seconds, third.gap_seconds, third.draft_seconds) == (0, 0.125, 0.125)
    assert (second.number, third.number) == (16, 17)
    parts = (r.seconds + r.gap_seconds + r.draft_seconds for r in (first, second, third))
    assert sum(parts) == 3.5 - 1.0
    steps = log.histograms()["iteration_seconds"]
    assert sum(steps.counts) == 17 and steps.total == pytest.approx(2.25)
    assert log.histograms()["iteration_tokens_total"].total == 68


def test_histograms_count_every_step_and_the_ring_keeps_the_last() -> None:
    log = StepLog()
    for i in range(3 * REMEMBERED):
        log.add(i, i + 0.5, decodes=2, prompt_tokens=7 if i % 3 == 0 else 0, generated=2, kv_cache_usage=0.0)
    assert [r.number for r in log.last(2)] == [3 * REMEMBERED - 1, 3 * REMEMBERED]
    assert len(log.last()) == REMEMBERED and log.last(0) == []
    tokens = log.histograms()["iteration_tokens_total"]
    by_bound = dict(zip(tokens.bounds, tokens.counts, strict=False))
    assert (by_bound[8], by_bound[16]) == (2 * REMEMBERED, REMEMBERED)
    assert sum(tokens.counts) == 3 * REMEMBERED and tokens.total == REMEMBERED * (2 + 2 + 9)


def test_guesses_and_hits_of_a_real_model_are_in_its_records(llama: tuple[Path, LlamaForCausalLM]) -> None:
    config = EngineConfig(llama[0], max_model_len=256, num_blocks=64, block_size=8, num_speculative_tokens=4)
    engine = Engine(config)
    prompt = [11, 12, 13, 14] * 8
    for _ in range(2):
        engine.generate([prompt], sampling(40))
    stats, found = engine.stats(), engine.step_log.last()
    assert sum(r.steps for r in found) == stats.steps
    assert sum(r.generated_tokens for r in found) == stats.generation_tokens == 80
    assert sum(r.cached_tokens for r in found) == stats.cached_tokens > 0
    assert sum(r.guessed_tokens for r in found) == stats.guessed_tokens > 0
    assert sum(r.accepted_tokens for r in found) == stats.accepted_tokens
    assert sum(r.prompt_tokens for r in found) == 2 * len(prompt) - stats.cached_tokens
    assert sum(r.draft_seconds for r in found) == pytest.approx(stats.draft_seconds)
    assert sum(r.seconds for r in found) == pytest.approx(stats.step_seconds)
    assert all(r.gap_seconds >= 0 for r in found)


class Still(VirtualRunner):
    """Takes no time, so that what is left is the engine's own."""

    def execute(self, plan: StepPlan) -> list[Drawn]:
        return [Drawn(5 if chunk.sample else None) for chunk in plan.chunks]


def calls(action: Callable[[], object]) -> int:
    """How many functions of Python and of C are called: what host code costs, the same on a busy machine."""
    count = 0

    def tell(frame: FrameType, event: str, function: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(tell)
    try:
        action()
    finally:
        sys.setprofile(before)
    return count


def test_a_record_costs_little_beside_the_step_that_it_is_of() -> None:
    config = EngineConfig(Path("virtual"), block_size=4, num_blocks=512, max_model_len=64)
    engine = Engine(config, Still(Clock(), law))
    for i in range(16):
        engine.add_request(str(i), [5, 6, 7], sampling(40))
    engine.step()
    before = engine._totals()
    record = calls(lambda: engine._record(1.0, 2.0, 16, 0, before))
    assert 0 < record < calls(engine.step) / 10
