"""Guessing stops where it does not pay, and starts again where it does, on a clock that only the model moves."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from altiplano.engine import Engine, EngineConfig, SamplingParams
from altiplano.engine.guessing import ENOUGH, FIRST_PAUSE, WARM_UP, Payoff, Wants
from altiplano.engine.plan import StepPlan
from altiplano.engine.request import Request

from .virtual import Clock, VirtualRunner


def live(payoff: Payoff, steps: int, speed: Callable[[bool], float], rng: random.Random | None = None) -> list[bool]:
    """What it decides over `steps`, when a second of (not) guessing brings `speed` tokens, give or take a fifth."""
    decided = []
    for _ in range(steps):
        guess = payoff.decide()
        decided.append(guess)
        noise = rng.uniform(0.8, 1.2) if rng else 1.0
        payoff.observe(guess, speed(guess), noise)
    return decided


@pytest.mark.parametrize("seed", range(5))
def test_what_does_not_pay_stops_and_is_tried_ever_more_rarely(seed: int) -> None:
    payoff = Payoff()
    decided = live(payoff, 2000, lambda guess: 0.8 if guess else 1.0, random.Random(seed))
    assert not payoff.guessing
    assert sum(decided[:200]) >= FIRST_PAUSE and sum(decided[200:]) < 0.05 * 1800
    assert any(decided[1000:]), "it is still tried"


@pytest.mark.parametrize("seed", range(5))
def test_what_pays_goes_on(seed: int) -> None:
    decided = live(Payoff(), 2000, lambda guess: 1.5 if guess else 1.0, random.Random(seed))
    assert sum(decided) > 0.96 * 2000


def test_it_changes_its_mind_when_the_text_changes_and_not_for_a_tenth() -> None:
    payoff = Payoff()
    live(payoff, 500, lambda guess: 0.7 if guess else 1.0)
    assert not payoff.guessing
    live(payoff, 3000, lambda guess: 1.05 if guess else 1.0)
    assert not payoff.guessing, "a little better is no reason"
    live(payoff, 6000, lambda guess: 2.0 if guess else 1.0)
    assert payoff.guessing


def test_the_first_steps_and_single_slow_ones_decide_nothing() -> None:
    payoff = Payoff()
    for step in range(400):
        guess = payoff.decide()
        slow = 500.0 if step < WARM_UP else 30.0 if step == 200 else 1.0
        payoff.observe(guess, 3.0 if guess else 1.0, slow)
        assert payoff.guessing


class Draft:
    """Guesses four tokens; its own passes take a while on the clock."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock, self._seconds = clock, seconds

    def propose(self, wants: Wants, budget: int) -> list[tuple[int, ...]]:
        self._clock.now += self._seconds
        return [(5,) * min(4, limit) for _, limit in wants]

    def observe(self, request: Request, proposed: int, accepted: int) -> None:
        pass


@pytest.mark.parametrize(
    ("draft_ms", "row_ms", "share", "pays"),
    [(1.0, 0.1, 0.6, True), (1.0, 0.1, 0.1, False), (30.0, 0.1, 0.6, False), (1.0, 10.0, 0.4, False)],
    ids=["a fast draft that is often right", "rarely right", "a slow draft", "rows that cost"],
)
def test_acceptance_against_the_time_of_draft_and_check(draft_ms: float, row_ms: float, share: float, pays: bool) -> None:
    """A step of 10 ms and so much for each row; all four guesses are right in a share of the steps."""
    rng, clock = random.Random(2), Clock()

    def right(plan: StepPlan) -> bool:
        return rng.random() < share

    runner = VirtualRunner(clock, lambda prompts, rows: (10 + row_ms * rows) / 1000, right)
    config = EngineConfig(Path("virtual"), max_model_len=4096, num_blocks=256, num_speculative_tokens=4)
    engine = Engine(config, runner, clock, Draft(clock, draft_ms / 1000))
    engine.generate([[7] * 10], SamplingParams(max_tokens=4000, temperature=0.0, ignore_eos=True))
    late = runner.plans[len(runner.plans) // 2 :]
    guessed = sum(chunk.num_guesses > 0 for plan in late for chunk in plan.chunks)
    assert guessed > 0.9 * len(late) if pays else guessed < 0.1 * len(late)
    assert engine.stats().guessed_steps > FIRST_PAUSE + ENOUGH
    assert engine.stats().draft_seconds + engine.stats().step_seconds == pytest.approx(clock.now)
