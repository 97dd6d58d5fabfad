"""Optuna behind Ray Tune, told the truth about trials that ASHA stopped.

Ray's own adapter reports a stopped trial as complete with the loss it had when it was stopped. A trial that was cut after a
tenth of its budget then looks like one that is simply bad, and the sampler learns from it as if it had run to its end.
"""

from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from altiplano import spec


class PrunedOptunaSearch(OptunaSearch):
    """OptunaSearch that tells trials below `max_t` tokens as pruned."""

    def __init__(self, max_t: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._max_t = max_t

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        stopped_early = not error and result is not None and result.get("tokens_seen", 0) < self._max_t
        if not stopped_early or trial_id in self._completed_trials:
            super().on_trial_complete(trial_id, result, error)
            return
        self._ot_study.tell(self._ot_trials[trial_id], None, state=TrialState.PRUNED)
        self._completed_trials.add(trial_id)


def make_search(tune: spec.Tune) -> PrunedOptunaSearch:
    """The search of a `tune` section."""
    seed = tune.search_alg.seed
    sampler: optuna.samplers.BaseSampler
    if tune.search_alg.sampler == "tpe":
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
    else:
        sampler = optuna.samplers.RandomSampler(seed=seed)
    space = {name: distribution(written) for name, written in tune.search_space.items()}
    return PrunedOptunaSearch(tune.scheduler.max_t, space=space, metric=tune.metric, mode=tune.mode, sampler=sampler)


def distribution(written: dict[str, Any]) -> BaseDistribution:
    """One entry of tune.search_space (checked by the loader) as Optuna's distribution."""
    kind, values = next(iter(written.items()))
    if kind == "choice":
        return CategoricalDistribution(values)
    low, high = values
    if kind == "randint":
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=kind == "loguniform")
