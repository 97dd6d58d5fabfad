"""The number of replicas as a pure function, and over hours of virtual time with Ray Serve's own delays around it."""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from ray.serve.autoscaling_policy import _apply_delay_logic
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from altiplano import spec
from altiplano.serve.autoscaling import (
    POLICY,
    TOLERANCE,
    Load,
    ReplicaPolicy,
    Targets,
    autoscaling_config,
    load_of,
    loads_of,
    replicas_wanted,
)
from altiplano.serve.ttft import RecentPercentile, cumulative_buckets

TARGETS = Targets(num_seqs=50, kv_cache_usage=0.8, ttft_s=1.0)
IDLE = Load(0, 0, 0)

loads = st.builds(
    lambda running, waiting, kv, ttft: Load(running + waiting, waiting, kv, ttft),
    st.integers(0, 64),
    st.integers(0, 1000),
    st.floats(0, 1),
    st.floats(0, 100),
)
fleets = st.lists(loads, min_size=1, max_size=20)


def test_each_rule_alone() -> None:
    assert replicas_wanted([Load(150, 100, 0.1)], TARGETS) == 3
    assert replicas_wanted([Load(10, 0, 1.0), Load(10, 0, 1.0)], TARGETS) == 3
    # Two clients wait 1.6 s where 1 s was promised.
    assert replicas_wanted([Load(52, 2, 0.1, 1.6), Load(40, 0, 0.1, 0.1)], TARGETS) == 4
    # Slow without a queue: prompts are long, and more replicas would not make them shorter.
    assert replicas_wanted([Load(10, 0, 0.1, 5.0)], TARGETS) == 1
    assert replicas_wanted([IDLE, IDLE], TARGETS) == 0
    assert replicas_wanted([], TARGETS) == 0
    # However little is held, somebody holds it.
    assert replicas_wanted([Load(0, 0, 2e-216)], TARGETS) == 1
    # Three tenths are not a hair more than 0.3.
    assert replicas_wanted([Load(0, 0, 0.8 / 3)] * 3 + [IDLE] * 3, TARGETS) == 1


@given(fleets)
def test_the_largest_rule_decides(fleet: list[Load]) -> None:
    quiet = [replace(load, num_seqs=0, num_waiting=0, kv_cache_held=0) for load in fleet]
    queue = [replace(one, num_seqs=load.num_seqs) for one, load in zip(quiet, fleet, strict=True)]
    cache = [replace(one, kv_cache_held=load.kv_cache_held) for one, load in zip(quiet, fleet, strict=True)]
    first_token = [replace(one, num_waiting=load.num_waiting) for one, load in zip(quiet, fleet, strict=True)]
    alone = [replicas_wanted(fleet_of_rule, TARGETS) for fleet_of_rule in (queue, cache, first_token)]
    wanted = replicas_wanted(fleet, TARGETS)
    assert wanted == max(alone) or abs(wanted - max(alone)) <= 1 + TOLERANCE * len(fleet)
    assert wanted <= max(max(alone), len(fleet))


@given(fleets, loads)
def test_more_load_never_wants_fewer(fleet: list[Load], more: Load) -> None:
    first = fleet[0]
    raised = Load(
        first.num_seqs + more.num_seqs,
        first.num_waiting + more.num_waiting,
        min(1.0, first.kv_cache_held + more.kv_cache_held),
        first.ttft_p95_s + more.ttft_p95_s,
    )
    assert replicas_wanted([raised, *fleet[1:]], TARGETS) >= replicas_wanted(fleet, TARGETS)


@given(fleets)
def test_what_is_wanted_is_enough(fleet: list[Load]) -> None:
    wanted = replicas_wanted(fleet, TARGETS)
    slack = 1 + TOLERANCE + 1e-6
    assert sum(load.num_seqs for load in fleet) <= wanted * TARGETS.num_seqs * slack
    assert sum(load.kv_cache_held for load in fleet) <= wanted * TARGETS.kv_cache_usage * slack
    assert (wanted == 0) <= all(load.num_seqs == 0 and load.kv_cache_held == 0 for load in fleet)


@given(fleets, st.data())
def test_one_missing_signal_holds_the_number(fleet: list[Load], data: st.DataObject) -> None:
    metrics = reported(fleet)
    name = data.draw(st.sampled_from(sorted(metrics)))
    replica = data.draw(st.sampled_from(range(len(fleet))))
    how = data.draw(st.sampled_from(["absent", math.nan, math.inf, "no such metric"]))
    if how == "absent":
        del metrics[name][replica]
    elif how == "no such metric":
        del metrics[name]
    else:
        metrics[name][replica] = how  # type: ignore[assignment]
    policy = ReplicaPolicy(**asdict(TARGETS))
    assert policy(context(range(len(fleet)), metrics, target=len(fleet) + 3))[0] == len(fleet) + 3


def test_a_replica_that_runs_no_more_or_not_yet_holds_the_number() -> None:
    policy = ReplicaPolicy(**asdict(TARGETS))
    assert policy(context([0], reported([IDLE]), target=2, current=2))[0] == 2
    assert policy(context([0], reported([IDLE]), target=1))[0] == 0
    assert loads_of({}, []) == []


@dataclass
class Service:
    """Clients keep so many answers in flight; a replica takes a minute to start and has slots for some of them, the rest waits."""

    config: AutoscalingConfig
    running: int
    target: int
    now: float = 0.0
    starts: Sequence[float] = ()
    STEP_S = 5.0
    START_S = 60.0
    SLOTS = 62

    def __post_init__(self) -> None:
        self.policy = ReplicaPolicy(**asdict(TARGETS))
        self.state: dict[str, Any] = {}
        self.targets = [self.target]

    def step(self, in_flight: float) -> None:
        self.now += self.STEP_S
        self.running += sum(start <= self.now for start in self.starts)
        self.starts = [start for start in self.starts if start > self.now]
        each = in_flight / max(1, self.running)
        waiting = max(0.0, each - self.SLOTS)
        fleet = [Load(each, waiting, 0.5 * (each - waiting) / self.SLOTS, 0.2 + waiting / self.SLOTS)] * self.running
        wanted, _ = self.policy(context(range(self.running), reported(fleet), self.target, self.running + len(self.starts)))
        if self.running == 0 and in_flight > 0:
            wanted = 1
        bounded = min(max(wanted, self.config.min_replicas), self.config.max_replicas)
        chosen, self.state = _apply_delay_logic(bounded, self.target, self.config, self.state, _now=self.now)
        self.take(chosen)

    def take(self, chosen: int) -> None:
        if chosen > self.target:
            self.starts = [*self.starts, *[self.now + self.START_S] * (chosen - self.target)]
        else:
            self.running = min(self.running, chosen)
        self.target = chosen
        self.targets.append(chosen)


def service(**more: Any) -> Service:
    options: dict[str, Any] = {
        "min_replicas": 1,
        "max_replicas": 8,
        "upscale_delay_s": 10.0,
        "downscale_delay_s": 300.0,
        "downscale_to_zero_delay_s": 600.0,
    } | more
    return Service(AutoscalingConfig(**options), running=options["min_replicas"], target=options["min_replicas"])


def hours(made: Service, rate: Callable[[float], float], seconds: float) -> Service:
    while made.now < seconds:
        made.step(rate(made.now))
    return made


def test_a_step_of_load_is_followed_once_up_and_once_down() -> None:
    made = hours(service(), lambda now: 220.0 if 600 <= now < 3600 else 10.0, 7200)
    changes = [b - a for a, b in zip(made.targets, made.targets[1:], strict=False) if a != b]
    assert max(made.targets) == 5 and made.target == 1
    assert changes[0] > 0 > changes[-1] and len(changes) <= 4


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 20), st.floats(1, 400), st.integers(0, 2**32 - 1))
def test_steady_load_with_noise_comes_to_rest(noise: float, level: float, seed: int) -> None:
    """After the first hour nothing moves more than one replica back and forth."""

    def rate(now: float) -> float:
        return max(0.0, level + noise * math.sin(seed + now * 1.7))

    made = hours(service(), rate, 3600)
    settled = made.targets[len(made.targets) // 2 :]
    assert max(settled) - min(settled) <= 1
    assert made.config.min_replicas <= min(made.targets) and max(made.targets) <= made.config.max_replicas


def test_to_zero_only_when_asked_and_after_its_delay() -> None:
    assert min(hours(service(), lambda now: 0.0, 3600).targets) == 1
    sleepy = service(min_replicas=0)
    sleepy.running = sleepy.target = 1
    hours(sleepy, lambda now: 0.0, 590)
    assert sleepy.target == 1
    hours(sleepy, lambda now: 0.0, 620)
    assert sleepy.target == 0
    hours(sleepy, lambda now: 5.0, 800)
    assert sleepy.running == 1


def test_the_options_name_the_policy_and_its_targets() -> None:
    endpoint = spec.Serve(max_num_seqs=100, autoscaling=spec.ServeAutoscaling(max_replicas=4, target_ttft_s=0.5))
    config = AutoscalingConfig(**autoscaling_config(endpoint)["autoscaling_config"])
    assert (config.min_replicas, config.max_replicas) == (1, 4)
    module, _, name = config.policy.policy_function.partition(":")
    assert getattr(importlib.import_module(module), name) is ReplicaPolicy and config.policy.policy_function == POLICY
    assert ReplicaPolicy(**config.policy.policy_kwargs)(context([0], reported([Load(200, 0, 0.1)]), target=1))[0] == 3
    assert autoscaling_config(spec.Serve()) == {"num_replicas": 1}
    with pytest.raises(ValueError, match="raise max_replicas"):
        spec.ServeAutoscaling(min_replicas=3, max_replicas=2)


def test_the_percentile_forgets_what_is_older_than_its_window() -> None:
    seconds = Histogram("x", "x", ["arm"], buckets=(0.1, 0.5, 1.0, 5.0), registry=CollectorRegistry())
    recent = RecentPercentile(0.95, window_s=30)

    def look(now: float) -> float:
        return recent.update(cumulative_buckets(seconds.collect()), now)

    assert look(0) == 0
    for _ in range(100):
        seconds.labels("a").observe(3.0)
    assert look(10) == 5.0
    for _ in range(1000):
        seconds.labels("b").observe(0.2)
    assert look(39) == 5.0, "9 of 100 are late"
    assert look(45) == 0.5
    assert look(80) == 0, "nobody was answered"
    seconds.labels("a").observe(100.0)
    assert look(85) == 5.0, "beyond the last bound: the last bound"


def test_a_load_is_made_from_the_engines_counters() -> None:
    stats = {"num_running": 3.0, "num_waiting": 2.0, "kv_cache_held": 0.25, "kv_cache_usage": 1.0}
    assert load_of(stats, 0.3) == Load(5.0, 2.0, 0.25, 0.3)


def reported(fleet: Sequence[Load]) -> dict[str, dict[int, float]]:
    """As Serve hands it over: by name, then by replica."""
    names = asdict(IDLE)
    return {name: {replica: asdict(load)[name] for replica, load in enumerate(fleet)} for name in names}


def context(
    replicas: Sequence[int], metrics: dict[str, dict[int, float]], target: int, current: int | None = None
) -> AutoscalingContext:
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="endpoint",
        app_name="altiplano",
        current_num_replicas=len(replicas) if current is None else current,
        target_num_replicas=target,
        running_replicas=list(replicas),
        total_num_requests=0,
        total_queued_requests=0,
        aggregated_metrics=metrics,
        raw_metrics=None,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=10,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=None,
    )
