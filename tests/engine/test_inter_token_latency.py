"""Prompts that come in the middle of answers do not make them falter, and still end."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from altiplano.engine import Engine, EngineConfig, SamplingParams
from altiplano.engine.step_time import SMALLEST_CHUNK, Line, Step, StepTimes, fit

from .virtual import Clock, VirtualRunner

seconds = st.floats(1e-5, 1e-2)


def steps_of(line: Line, rng: random.Random, count: int = 48) -> list[Step]:
    made = [(rng.choice((0, rng.randrange(1, 600))), rng.randrange(1, 32)) for _ in range(count)]
    return [Step(prompts, decodes, line.seconds(prompts, decodes)) for prompts, decodes in made]


@given(seconds, seconds, seconds, st.integers(0, 1000))
def test_a_line_is_found_though_one_step_in_six_is_fifty_times_as_slow(
    base: float, prompt: float, decode: float, seed: int
) -> None:
    line, rng = Line(base, prompt / 100, decode / 10), random.Random(seed)
    steps = steps_of(line, rng)
    slow = [step._replace(seconds=50 * step.seconds) if i % 6 == 3 else step for i, step in enumerate(steps)]
    found, usual = fit(slow), sorted(step.seconds for step in steps)[24]
    for prompts, decodes in ((0, 4), (100, 8), (500, 30)):
        assert found.seconds(prompts, decodes) == pytest.approx(line.seconds(prompts, decodes), rel=0.1, abs=0.1 * usual)


@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 64), st.floats(0, 10)), min_size=1, max_size=30))
def test_no_coefficient_is_negative_whatever_was_measured(measured: list[tuple[int, int, float]]) -> None:
    assert min(fit([Step(*step) for step in measured])) >= 0


@given(st.integers(1, 30), st.floats(1e-6, 10), st.integers(0, 100))
def test_every_step_has_room_for_some_of_a_prompt_and_never_more_than_it_can_judge(
    decodes: int, target: float, seed: int
) -> None:
    times = StepTimes()
    assert times.prompt_limit(decodes, target) == SMALLEST_CHUNK, "nothing is known yet"
    steps = steps_of(Line(1e-3, 1e-5, 1e-4), random.Random(seed))
    for step in steps:
        times.observe(step)
    limit = times.prompt_limit(decodes, target)
    assert SMALLEST_CHUNK <= limit <= 2 * max(step.prompt_tokens for step in steps)
    assert limit <= times.prompt_limit(decodes, 2 * target), "more time, no fewer tokens"
    assert limit >= times.prompt_limit(decodes + 1, target), "more answers, no more of a prompt"


def test_the_first_steps_which_compile_are_not_counted() -> None:
    times = StepTimes()
    for seconds_taken in (60.0, 30.0, 0.02, 0.02, 0.02, 0.02):
        times.observe(Step(100, 4, seconds_taken))
    assert times.line is not None and times.line.seconds(100, 4) == pytest.approx(0.02)


def gaps_of_answers(engine: Engine, clock: Clock, arrivals: dict[int, tuple[int, int]]) -> list[float]:
    """Seconds between two tokens of an answer, over all answers. `arrivals`: before which step, (prompt, answer) tokens."""
    times: dict[str, list[float]] = {}
    step = 0
    while engine.has_unfinished() or step <= max(arrivals):
        if step in arrivals:
            prompt, answer = arrivals[step]
            engine.add_request(f"{step}", [7] * prompt, SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True))
        for output in engine.step():
            times.setdefault(output.request_id, []).append(clock.now)
        step += 1
    assert {name: len(found) for name, found in times.items()} == {f"{s}": answer for s, (_, answer) in arrivals.items()}
    return [after - before for found in times.values() for before, after in pairwise(found)]


@settings(deadline=None, max_examples=20)
@given(st.floats(1e-3, 2e-2), st.floats(1e-5, 2e-4), st.floats(0, 3e-4), st.floats(1.3, 6.0), st.integers(0, 10_000))
def test_95_of_100_gaps_are_within_the_target_when_decodes_alone_are(
    base: float, prompt: float, decode: float, room: float, seed: int
) -> None:
    """Prompts of up to 3000 tokens among answers; steps vary by a tenth, one in a hundred takes twice as long, the first a second more."""
    rng, clock = random.Random(seed), Clock()
    seqs = 8
    target = room * 1.1 * (base + decode * seqs + prompt * SMALLEST_CHUNK)

    def law(prompts: int, decodes: int) -> float:
        first = 1.0 if clock.now == 0 else 0.0
        noise = rng.uniform(0.9, 1.1) * (2 if rng.random() < 0.01 else 1)
        return first + noise * (base + prompt * prompts + decode * decodes)

    runner = VirtualRunner(clock, law)
    engine = Engine(
        EngineConfig(
            Path("virtual"),
            max_model_len=4096,
            num_blocks=2048,
            max_num_seqs=seqs,
            max_num_batched_tokens=4096,
            itl_target_ms=1000 * target,
            enable_prefix_caching=False,
        ),
        runner,
        clock,
    )
    arrivals = {step * 7: (rng.choice((20, 200, 1500, 3000)), rng.randrange(30, 90)) for step in range(30)}
    gaps = sorted(gaps_of_answers(engine, clock, arrivals))
    assert gaps[int(0.95 * len(gaps))] <= target
    for plan in runner.plans:
        decodes = sum(chunk.generated > 0 for chunk in plan.chunks)
        waiting = any(not chunk.sample for chunk in plan.chunks)
        if decodes and waiting:
            assert plan.num_tokens - decodes >= SMALLEST_CHUNK, "a prompt that waits goes on in every step"


def test_without_a_target_a_long_prompt_stops_everybody() -> None:
    """What the target is for."""
    clock = Clock()
    engine = Engine(
        EngineConfig(Path("virtual"), max_model_len=4096, num_blocks=2048, max_num_batched_tokens=4096),
        VirtualRunner(clock, lambda prompts, decodes: 0.01 + 1e-4 * prompts),
        clock,
    )
    assert max(gaps_of_answers(engine, clock, {0: (10, 40), 10: (3000, 2)})) > 0.3


def test_answers_under_a_target_are_those_without_on_a_real_model(llama: tuple[Path, LlamaForCausalLM]) -> None:
    rng = random.Random(4)
    prompts = [[rng.randrange(3, 120) for _ in range(rng.randrange(5, 180))] for _ in range(8)]
    params = [SamplingParams(max_tokens=8 + 5 * i, temperature=0.8, seed=3, ignore_eos=True) for i in range(8)]
    said, steps = [], []
    for target in (None, 0.001):
        engine = Engine(
            EngineConfig(
                llama[0], max_model_len=256, block_size=8, num_blocks=256, max_num_seqs=3, itl_target_ms=target, debug=True
            )
        )
        said.append([completion.token_ids for completion in engine.generate(prompts, params)])
        steps.append(engine.stats().steps)
    assert said[0] == said[1]
    assert steps[0] < steps[1], "a target that cannot be met cuts prompts as small as it may"


@pytest.mark.parametrize("wrong", [{"itl_target_ms": 0.0}, {"itl_target_ms": float("nan")}])
def test_targets_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="itl_target_ms"):
        EngineConfig(Path("x"), **wrong)  # type: ignore[arg-type]
