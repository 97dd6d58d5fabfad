"""Rollouts in virtual time: no evidence, no step; a bad challenger goes back; a good one arrives."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altiplano.serve.outcomes import ArmOutcomes, Outcomes, Sums
from altiplano.serve.rollout import (
    Budgets,
    Evidence,
    Mark,
    Phase,
    Plan,
    State,
    decide,
    ended,
    judge,
    paused,
    promoted,
    resumed,
    rolled_back,
    share,
)

PLAN = Plan("orders", 2, "orders-1", "orders-2", "/adapters/orders-2", "a salt for tests", bake_s=30, min_requests=100)


@dataclass
class Arm:
    """How an arm of a simulated endpoint behaves."""

    error_rate: float = 0.01
    ttft_s: float = 0.1
    tokens_per_s: float = 200.0
    rating: float | None = None


def served(rng: np.random.Generator, arm: Arm, requests: int) -> ArmOutcomes:
    """What becomes of so many requests."""
    failed = int(rng.binomial(requests, arm.error_rate))
    answered = requests - failed
    ttft, speed = rng.normal(math.log(arm.ttft_s), 0.4, answered), rng.normal(math.log(arm.tokens_per_s), 0.2, answered)
    rated = 0 if arm.rating is None else int(rng.binomial(answered, 0.2))
    ratings = np.clip(rng.normal(arm.rating or 0, 0.5, rated), -1, 1)
    return ArmOutcomes(requests, failed, 0, total(ttft), total(speed), Sums(), total(ratings))


def total(values: np.ndarray) -> Sums:
    return Sums(len(values), float(values.sum()), float((values**2).sum()))


def roll(
    plan: Plan, champion: Arm, challenger: Arm, *, seed: int = 0, rate: float = 40.0, seconds: int = 1800
) -> list[tuple[int, State]]:
    """The state at every second of a rollout under `rate` requests per second."""
    rng = np.random.default_rng(seed)
    state, outcomes, history = State(), {}, []
    for now in range(seconds):
        part = share(plan, state) / 100
        requests = int(rng.poisson(rate))
        to_challenger = int(rng.binomial(requests, part))
        if state.live_since is None:
            outcomes = {"champion": ArmOutcomes(), "challenger": ArmOutcomes()}
        for name, arm, count in (("champion", champion, requests - to_challenger), ("challenger", challenger, to_challenger)):
            outcomes[name] = outcomes[name].plus(served(rng, arm, count))
        state = decide(plan, state, Evidence(outcomes, live=True), now)
        history.append((now, state))
        if state.phase not in (Phase.running, Phase.paused):
            break
    return history


def test_a_challenger_that_is_as_good_is_promoted_after_every_step_has_baked() -> None:
    history = roll(PLAN, Arm(), Arm(rating=0.2))
    assert history[-1][1].phase is Phase.promoting
    shares = [share(PLAN, state) for _, state in history]
    assert sorted(set(shares)) == [5, 25, 50, 100] and shares == sorted(shares)
    assert history[-1][0] >= 3 * PLAN.bake_s
    assert all(shares.count(step) > PLAN.bake_s for step in PLAN.steps)


@pytest.mark.parametrize(
    ("challenger", "says"),
    [
        (Arm(error_rate=1.0), "error rate"),
        (Arm(error_rate=0.5), "error rate"),
        (Arm(ttft_s=1.0), "TTFT"),
        (Arm(tokens_per_s=50), "tokens/s"),
    ],
)
def test_a_bad_challenger_is_taken_back_within_30_seconds_at_the_first_step(challenger: Arm, says: str) -> None:
    for seed in range(5):
        now, state = roll(PLAN, Arm(), challenger, seed=seed)[-1]
        assert state.phase is Phase.rolling_back and state.step == 0 and says in state.reason
        assert now <= 30


def test_users_who_dislike_the_challenger_take_it_back() -> None:
    _, state = roll(PLAN, Arm(rating=0.5), Arm(rating=-0.6))[-1]
    assert state.phase is Phase.rolling_back and "feedback" in state.reason


def test_a_challenger_that_keeps_its_budgets_is_hardly_ever_taken_back() -> None:
    # Exactly at the budget, the hardest case: alpha bounds the share of rollouts that go back.
    plan = replace(PLAN, budgets=Budgets(error_rate=0.05), alpha=0.2, bake_s=60, steps=(50.0,))
    ends = [roll(plan, Arm(), Arm(error_rate=0.06), seed=seed, rate=100, seconds=40)[-1][1].phase for seed in range(30)]
    assert ends.count(Phase.rolling_back) / len(ends) <= plan.alpha


def test_a_loss_within_noise_holds_at_the_last_step_instead_of_promoting() -> None:
    history = roll(replace(PLAN, steps=(50.0,), min_requests=20), Arm(), Arm(error_rate=0.03), rate=2, seconds=120)
    assert history[-1][1].phase is Phase.running and "error rate" in history[-1][1].reason
    patient = replace(PLAN, steps=(50.0,), min_requests=20, give_up_after_s=100.0)
    _, state = roll(patient, Arm(), Arm(error_rate=0.03), rate=2, seconds=120)[-1]
    assert state.phase is Phase.rolling_back and "not enough evidence within 100 s" in state.reason


sums = st.builds(
    lambda count, mean, spread: Sums(count, mean * count, (mean**2 + spread) * count),
    st.integers(0, 2000),
    st.floats(-5, 5),
    st.floats(0, 2),
)
arms = st.builds(
    lambda requests, part, ttft, speed, feedback: ArmOutcomes(
        requests, int(requests * part), 0, ttft, speed, Sums(), Sums(feedback.count, min(1, max(-1, feedback.total)), 0.0)
    ),
    st.integers(0, 2000),
    st.floats(0, 1),
    sums,
    sums,
    sums,
)
evidence = st.none() | st.builds(
    Evidence,
    st.fixed_dictionaries({}, optional={"champion": arms, "challenger": arms}),
    st.booleans(),
)
states = st.builds(
    State, st.sampled_from(Phase), st.integers(0, 2), st.none(), st.none() | st.floats(0, 1000), st.just("as it was")
)


@settings(deadline=None)
@given(states, evidence, st.floats(0, 5000))
def test_no_decision_skips_a_step_moves_without_evidence_or_comes_back_from_an_end(
    state: State, seen: Evidence | None, now: float
) -> None:
    after = decide(PLAN, state, seen, now)
    before, then = share(PLAN, state), share(PLAN, after)
    ladder = [0.0, *PLAN.steps, 100.0]
    if seen is None or not seen.live or state.live_since is None:
        assert then == before and after.phase is state.phase
    if state.phase not in (Phase.running, Phase.paused):
        assert after == state
    if then > before:
        assert ladder.index(then) == ladder.index(before) + 1
        assert state.phase is Phase.running and seen is not None and state.live_since is not None
        assert now - state.live_since >= PLAN.bake_s
        assert seen.outcomes["challenger"].requests >= PLAN.min_requests
        marks = {check.name: check.mark for check in judge(PLAN, seen.outcomes)}
        assert set(marks.values()).isdisjoint({Mark.broken, Mark.over})
        assert marks["error rate"] is not Mark.unknown and marks["TTFT"] is not Mark.unknown
    if then < before:
        assert then == 0 and after.phase is Phase.rolling_back
    if after.step != state.step:
        assert after.live_since is None


@settings(deadline=None)
@given(arms, st.floats(0, 5000))
def test_while_paused_only_a_broken_budget_moves_anything(challenger: ArmOutcomes, now: float) -> None:
    state = State(Phase.paused, 1, 0.0, 0.0, "paused by hand")
    champion = ArmOutcomes(1000, 10, 0, Sums(1000, -2300.0, 5400.0), Sums(1000, 5300.0, 28100.0), Sums(), Sums())
    outcomes: Outcomes = {"champion": champion, "challenger": challenger}
    after = decide(PLAN, state, Evidence(outcomes, True), now)
    broken = any(check.mark is Mark.broken for check in judge(PLAN, outcomes))
    assert after.phase is (Phase.rolling_back if broken else Phase.paused)


def test_weights_that_never_go_live_are_taken_back() -> None:
    state = State()
    for now in range(int(PLAN.live_within_s) + 1):
        state = decide(PLAN, state, Evidence({}, live=False), now)
        assert state.phase is Phase.running and state.reason.startswith("hold")
    assert decide(PLAN, state, Evidence({}, live=False), PLAN.live_within_s + 1).phase is Phase.rolling_back
    assert decide(PLAN, replace(state, live_since=5.0), Evidence({}, live=False), 9999).phase is Phase.running


@pytest.mark.parametrize("verb", [paused, resumed, promoted, rolled_back, ended])
@pytest.mark.parametrize("phase", list(Phase))
def test_what_people_may_do_when(verb: Callable[[State], State], phase: Phase) -> None:
    allowed = {
        paused: {Phase.running: Phase.paused},
        resumed: {Phase.paused: Phase.running},
        promoted: {Phase.running: Phase.promoting, Phase.paused: Phase.promoting, Phase.promoting: Phase.promoting},
        rolled_back: dict.fromkeys((Phase.running, Phase.paused, Phase.rolling_back), Phase.rolling_back),
        ended: {Phase.promoting: Phase.promoted, Phase.rolling_back: Phase.rolled_back},
    }[verb]
    if phase in allowed:
        assert verb(State(phase)).phase is allowed[phase]
    else:
        with pytest.raises(ValueError, match=r"cannot .* a rollout that is"):
            verb(State(phase))


def test_plans_and_states_survive_json() -> None:
    state = State(Phase.paused, 1, 12.0, 12.5, "x")
    assert Plan.from_json(json.loads(json.dumps(asdict(PLAN)))) == PLAN
    assert State.from_json(json.loads(json.dumps(asdict(state)))) == state


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": ()}, "rising shares"),
        ({"steps": (50.0, 5.0)}, "rising shares"),
        ({"steps": (5.0, 100.0)}, "rising shares"),
        ({"alpha": 0.9}, "alpha"),
        ({"bake_s": -1.0}, "bake time"),
        ({"give_up_after_s": 10.0}, "patience"),
        ({"challenger": "orders-1"}, "nothing to roll out"),
        ({"shadow": 2.0}, "shadowed"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(PLAN, **change)  # type: ignore[arg-type]
    for wrong in ({"error_rate": 2.0}, {"ttft_ratio": 0.5}, {"tokens_per_s_ratio": 0.0}, {"feedback": -1.0}):
        with pytest.raises(ValueError, match="budget is"):
            Budgets(**wrong)
