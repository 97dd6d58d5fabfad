"""How many replicas: the largest of three rules, each in proportion to what the replicas report.

- queue: answers that run or wait, against as many as one replica should have;
- KV use: pages that requests hold, against the share that may be in use. Pages of cached prefixes alone do not count: they give
  way when somebody needs them;
- TTFT: the 95th percentile against the objective, only while requests wait: more replicas shorten waiting, not computing.

The policy knows no time. Delays are Ray Serve's (`upscale_delay_s`, `downscale_delay_s`), and so is the first replica after none.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from altiplano import spec

POLICY = "altiplano.serve.autoscaling:ReplicaPolicy"

# One replica busy to its target takes this part: enough for bursts to meet a free slot.
BUSY = 0.8
# One decision at most doubles for the sake of TTFT: what more replicas bring shows only when they are there.
MOST_FOR_TTFT = 2.0
# Loads this close to the present number change nothing, so that noise moves no replica.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Load:
    """What one replica reports: answers running and waiting, share of KV pages held (0 to 1), seconds (0: nobody was answered)."""

    num_seqs: float
    num_waiting: float
    kv_cache_held: float
    ttft_p95_s: float = 0.0


@dataclass(frozen=True)
class Targets:
    """What one replica should have at most, in the units of Load; a `ttft_s` of None is no rule."""

    num_seqs: float
    kv_cache_usage: float
    ttft_s: float | None = None


def replicas_wanted(loads: Sequence[Load], targets: Targets) -> int:
    """How many replicas the load of these replicas needs, without bounds; 0 when there is none."""
    present = len(loads)
    needed = max(
        sum(load.num_seqs for load in loads) / targets.num_seqs,
        sum(load.kv_cache_held for load in loads) / targets.kv_cache_usage,
        _for_ttft(loads, targets),
    )
    if present and abs(needed / present - 1) <= TOLERANCE:
        return present
    # Rounding is forgiven in proportion: a load of almost nothing still needs a replica.
    return math.ceil(needed * (1 - 1e-9))


def _for_ttft(loads: Sequence[Load], targets: Targets) -> float:
    """The worst replica decides: its clients wait, however idle the others are."""
    if targets.ttft_s is None:
        return 0.0
    late = [load.ttft_p95_s / targets.ttft_s for load in loads if load.num_waiting > 0]
    return len(loads) * min(max(late, default=0.0), MOST_FOR_TTFT)


class ReplicaPolicy:
    """The policy as Ray Serve calls it. A replica that does not report holds the number: it may be the busiest one."""

    def __init__(self, **targets: float | None) -> None:
        self._targets = Targets(**targets)  # type: ignore[arg-type]  # names and numbers of autoscaling_config

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """`context`: Serve's AutoscalingContext."""
        replicas = context.running_replicas
        loads = loads_of(context.aggregated_metrics or {}, replicas)
        if loads is None or len(replicas) < context.current_num_replicas:
            return context.target_num_replicas, {}
        return replicas_wanted(loads, self._targets), {}


def loads_of(metrics: Mapping[str, Mapping[Any, float]], replicas: Sequence[Any]) -> list[Load] | None:
    """Loads of `replicas` from Serve's numbers by name and replica; None when one of them is missing."""

    def value(name: str, replica: Any) -> float:
        found = metrics[name][replica]
        if not math.isfinite(found):
            raise KeyError(name)
        return found

    try:
        return [Load(*(value(field.name, replica) for field in fields(Load))) for replica in replicas]
    except KeyError:
        return None


def load_of(stats: Mapping[str, float], ttft_p95_s: float) -> Load:
    """The load of a replica, from its engine's counters."""
    waiting = stats["num_waiting"]
    return Load(stats["num_running"] + waiting, waiting, stats["kv_cache_held"], ttft_p95_s)


def autoscaling_config(endpoint: spec.Serve) -> dict[str, Any]:
    """The part of a deployment's options that says how many replicas run."""
    wanted = endpoint.autoscaling
    if wanted.min_replicas == wanted.max_replicas:
        return {"num_replicas": wanted.min_replicas}
    num_seqs = wanted.target_num_seqs if wanted.target_num_seqs is not None else BUSY * endpoint.max_num_seqs
    return {
        "autoscaling_config": {
            "min_replicas": wanted.min_replicas,
            "max_replicas": wanted.max_replicas,
            # Serve's window; the delays below already wait out bursts.
            "look_back_period_s": 20.0,
            "upscale_delay_s": wanted.upscale_delay_s,
            "downscale_delay_s": wanted.downscale_delay_s,
            "downscale_to_zero_delay_s": wanted.downscale_to_zero_delay_s,
            # Serve's own rule, which is not used, also decides what a request to no replica is worth.
            "target_ongoing_requests": num_seqs,
            "policy": {
                "policy_function": POLICY,
                "policy_kwargs": asdict(Targets(num_seqs, wanted.target_kv_cache_usage, wanted.target_ttft_s)),
            },
        }
    }
