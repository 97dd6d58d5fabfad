"""A rollout as a state machine: a pure function of the plan, the state, the evidence and the time.

A challenger gets more of the traffic step by step. At every step the weights bake for a while; the challenger goes on when it had
enough requests and its budgets look kept, is promoted from the last step when they are proven kept, and is taken back at once when
one is proven broken. Without evidence nothing moves. "Proven" is by confidence sequences, so looking every second costs nothing:
a challenger that keeps its budgets is taken back with probability `alpha` at most, over all steps and budgets together.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from altiplano.serve.ab import Comparison, compare
from altiplano.serve.outcomes import ArmOutcomes, Outcomes

CHAMPION, CHALLENGER = "champion", "challenger"


class Phase(StrEnum):
    """Where a rollout is. The last two are ends."""

    running = "running"
    paused = "paused"
    promoting = "promoting"
    rolling_back = "rolling_back"
    promoted = "promoted"
    rolled_back = "rolled_back"

    @property
    def ended(self) -> bool:
        return self in (Phase.promoted, Phase.rolled_back)


class Mark(StrEnum):
    """What is known about one budget."""

    broken = "broken"  # proven
    over = "over"  # as it looks
    unknown = "unknown"  # too few observations to say anything
    likely = "likely"  # kept, as it looks
    kept = "kept"  # proven


@dataclass(frozen=True)
class Budgets:
    """How much worse than the champion a challenger may be."""

    error_rate: float = 0.02
    """Largest growth of the share of failed requests."""
    ttft_ratio: float = 1.3
    """Largest ratio of the geometric means of the time to the first token."""
    tokens_per_s_ratio: float = 0.75
    """Smallest ratio of the speed after the first token."""
    feedback: float = 0.25
    """Largest loss of the mean rating, which is in -1 … 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.error_rate < 1:
            raise ValueError(f"the error budget is {self.error_rate}: use a share from 0 to 1, such as 0.02")
        if not self.ttft_ratio >= 1:
            raise ValueError(f"the TTFT budget is {self.ttft_ratio}: use a ratio of at least 1, such as 1.3")
        if not 0 < self.tokens_per_s_ratio <= 1:
            raise ValueError(f"the speed budget is {self.tokens_per_s_ratio}: use a ratio of at most 1, such as 0.75")
        if not 0 <= self.feedback <= 2:
            raise ValueError(f"the feedback budget is {self.feedback}: ratings are in -1 … 1, so use 0 to 2")


@dataclass(frozen=True)
class Plan:
    """What is rolled out, and how. Shares in percent, times in seconds."""

    model: str
    version: int
    champion: str
    challenger: str
    path: str
    """Adapters: what answers now, what should, and the directory of the latter."""
    salt: str
    steps: tuple[float, ...] = (5.0, 25.0, 50.0)
    bake_s: float = 300.0
    min_requests: int = 200
    """Of the challenger, at every step."""
    alpha: float = 0.05
    give_up_after_s: float | None = None
    """A step that takes longer than this is taken back; None: it waits for evidence as long as it takes."""
    budgets: Budgets = field(default_factory=Budgets)
    live_within_s: float = 120.0
    """A challenger that the endpoint cannot load by then is taken back."""
    shadow: float = 0.0
    """Share of the champion's answers that the challenger gives too, unseen, to be compared."""
    apart: Mapping[str, Any] | None = None
    """Arguments of the challenger's own deployment that are not the champion's, the base model first; None: both share engines."""
    override: str | None = None
    """Who lets a version have traffic that the gate has rejected, and why."""

    def __post_init__(self) -> None:
        if not self.steps or any(not 0 < step < 100 for step in self.steps) or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(
                f"steps are {list(self.steps)}: use rising shares between 0 and 100 %, such as 5 25 50; 100 follows by promotion"
            )
        if self.bake_s < 0 or self.min_requests < 1 or (self.give_up_after_s is not None and self.give_up_after_s <= self.bake_s):
            raise ValueError("use a bake time from 0 on, at least 1 request per step, and more patience than bake time")
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"alpha is {self.alpha}: use a probability such as 0.05")
        if not 0 <= self.shadow <= 1:
            raise ValueError(f"the shadowed share is {self.shadow}: use 0 to 1")
        if self.apart is not None and self.shadow:
            raise ValueError("--shadow needs both arms on one base model, and the challenger has another one: leave it out")
        if self.champion == self.challenger:
            raise ValueError(f"{self.challenger} answers already: there is nothing to roll out")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Plan":
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**values, "steps": tuple(values["steps"]), "budgets": Budgets(**values["budgets"])})


@dataclass(frozen=True)
class State:
    """`step` indexes the plan's steps, asked for at `asked` and live everywhere at `live_since`. `reason` says why it is so."""

    phase: Phase = Phase.running
    step: int = 0
    asked: float | None = None
    live_since: float | None = None
    reason: str = "started"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "State":
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**values, "phase": Phase(values["phase"])})


@dataclass(frozen=True)
class Evidence:
    """What became of requests since this step's weights were live; `live` when all replicas have these weights."""

    outcomes: Outcomes
    live: bool


@dataclass(frozen=True)
class Check:
    """One budget."""

    name: str
    mark: Mark
    detail: str


def share(plan: Plan, state: State) -> float:
    """Percent of the traffic that the challenger should have."""
    if state.phase in (Phase.promoting, Phase.promoted):
        return 100.0
    return plan.steps[state.step] if state.phase in (Phase.running, Phase.paused) else 0.0


def decide(plan: Plan, state: State, evidence: Evidence | None, now: float) -> State:
    """What follows. `evidence` None: nobody could tell."""
    if state.phase not in (Phase.running, Phase.paused):
        return state
    if evidence is None:
        return replace(state, reason="hold: the endpoint does not tell what became of its requests")
    if not evidence.live:
        asked = now if state.asked is None else state.asked
        if state.live_since is None and now - asked > plan.live_within_s:
            return rolled_back(state, f"the endpoint did not take it within {plan.live_within_s:g} s: its log says why")
        return replace(state, asked=asked, reason="hold: the weights are not live on all replicas")
    if state.live_since is None:
        return replace(state, live_since=now, reason=f"{share(plan, state):g} % are live")
    checks = judge(plan, evidence.outcomes)
    broken = [check.detail for check in checks if check.mark is Mark.broken]
    if broken:
        return rolled_back(state, "; ".join(broken))
    if plan.give_up_after_s is not None and now - state.live_since > plan.give_up_after_s and state.phase is Phase.running:
        return rolled_back(state, f"not enough evidence within {plan.give_up_after_s:g} s")
    waits = _waits(plan, state, evidence, checks, now)
    if state.phase is Phase.paused or waits:
        return replace(state, reason=f"hold: {waits}" if state.phase is Phase.running else state.reason)
    if state.step + 1 < len(plan.steps):
        return State(Phase.running, state.step + 1, reason=f"step {state.step + 1} kept its budgets")
    return promoted(state, "all budgets are proven kept")


def judge(plan: Plan, outcomes: Outcomes) -> list[Check]:
    """All budgets, each at its part of alpha."""
    found = compare(outcomes, CHAMPION, CHALLENGER, plan.alpha / (4 * len(plan.steps)))
    budgets = plan.budgets
    return [
        _below("error rate", found["error_rate"], budgets.error_rate),
        _below("TTFT", found["ttft_s"], budgets.ttft_ratio),
        _above("tokens/s", found["tokens_per_s"], budgets.tokens_per_s_ratio),
        _above("feedback", found["feedback"], -budgets.feedback),
    ]


def doubts(plan: Plan, outcomes: Outcomes) -> list[str]:
    """What speaks against a promotion now: budgets that do not look kept. What nobody has rated is no doubt."""
    free = {"feedback": Mark.unknown}
    known = (Mark.kept, Mark.likely)
    return [check.detail for check in judge(plan, outcomes) if check.mark not in (*known, free.get(check.name))]


def paused(state: State, reason: str = "paused by hand") -> State:
    """The weights stay. A broken budget still takes the challenger back.

    Raises:
        ValueError: there is nothing to pause.
    """
    _require(state, "pause", Phase.running)
    return replace(state, phase=Phase.paused, reason=reason)


def resumed(state: State, reason: str = "resumed by hand") -> State:
    """On with it.

    Raises:
        ValueError: it is not paused.
    """
    _require(state, "resume", Phase.paused)
    return replace(state, phase=Phase.running, reason=reason)


def promoted(state: State, reason: str = "promoted by hand") -> State:
    """
    Raises:
        ValueError: it has ended, or goes back.
    """
    _require(state, "promote", Phase.running, Phase.paused, Phase.promoting)
    return replace(state, phase=Phase.promoting, reason=reason)


def rolled_back(state: State, reason: str = "rolled back by hand") -> State:
    """
    Raises:
        ValueError: it has ended, or is promoted this moment.
    """
    _require(state, "roll back", Phase.running, Phase.paused, Phase.rolling_back)
    return replace(state, phase=Phase.rolling_back, reason=reason)


def ended(state: State) -> State:
    """What promoting and rolling back lead to, once the endpoint and the registry agree."""
    _require(state, "end", Phase.promoting, Phase.rolling_back)
    return replace(state, phase=Phase.promoted if state.phase is Phase.promoting else Phase.rolled_back)


def told(plan: Plan) -> dict[str, Any]:
    """A plan as people may see it. Who knows the salt can choose an arm and sign feedback."""
    return {key: value for key, value in asdict(plan).items() if key != "salt"}


def _waits(plan: Plan, state: State, evidence: Evidence, checks: list[Check], now: float) -> str:
    """What has to happen before the next step; empty when nothing has."""
    assert state.live_since is not None
    left = state.live_since + plan.bake_s - now
    if left > 0:
        return f"{left:.0f} s to bake"
    seen = evidence.outcomes.get(CHALLENGER, ArmOutcomes()).requests
    if seen < plan.min_requests:
        return f"{seen} of {plan.min_requests} requests"
    last = state.step + 1 == len(plan.steps)
    wanted = {Mark.kept} if last else {Mark.kept, Mark.likely}
    # Few users rate. What was not rated cannot be held against a challenger.
    free = {"feedback": wanted | {Mark.likely, Mark.unknown}}
    return "; ".join(check.detail for check in checks if check.mark not in free.get(check.name, wanted))


def _below(name: str, found: Comparison, most: float) -> Check:
    if found.interval is None or found.effect is None:
        return Check(name, Mark.unknown, f"{name}: {found.candidate_count} of the challenger's requests are too few")
    marks = (found.interval.low > most, found.interval.high <= most, found.effect <= most)
    return Check(name, _mark(*marks), _detail(name, found, f"at most {most:g}"))


def _above(name: str, found: Comparison, least: float) -> Check:
    if found.interval is None or found.effect is None:
        return Check(name, Mark.unknown, f"{name}: {found.candidate_count} of the challenger's requests are too few")
    marks = (found.interval.high < least, found.interval.low >= least, found.effect >= least)
    return Check(name, _mark(*marks), _detail(name, found, f"at least {least:g}"))


def _mark(broken: bool, kept: bool, looks_kept: bool) -> Mark:
    return Mark.broken if broken else Mark.kept if kept else Mark.likely if looks_kept else Mark.over


def _detail(name: str, found: Comparison, allowed: str) -> str:
    assert found.interval is not None and found.effect is not None
    return (
        f"{name} {found.effect_unit} {found.effect:.3g} [{found.interval.low:.3g}, {found.interval.high:.3g}], allowed {allowed} "
        f"({found.candidate_count} against {found.baseline_count} requests)"
    )


def _require(state: State, verb: str, *phases: Phase) -> None:
    if state.phase not in phases:
        raise ValueError(f"cannot {verb} a rollout that is {state.phase.replace('_', ' ')}: it has to be {' or '.join(phases)}")
