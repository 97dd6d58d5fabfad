"""What Optuna is told, and which settings a sweep may try."""

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from altiplano import spec
from altiplano.tune.search import distribution, make_search

TUNE = spec.Tune.model_validate(
    {
        "num_samples": 4,
        "scheduler": {"max_t": 1000, "grace_period": 100},
        "search_space": {"training.learning_rate": {"loguniform": [1e-4, 1e-2]}, "lora.r": {"choice": [4, 8]}},
    }
)


def test_distributions_are_optunas() -> None:
    assert distribution({"loguniform": [1e-4, 1e-2]}) == FloatDistribution(1e-4, 1e-2, log=True)
    assert distribution({"uniform": [0.0, 1.0]}) == FloatDistribution(0.0, 1.0)
    assert distribution({"randint": [1, 9]}) == IntDistribution(1, 9)
    assert distribution({"choice": [4, 8]}) == CategoricalDistribution([4, 8])


def test_trials_that_were_stopped_early_are_told_as_pruned() -> None:
    search = make_search(TUNE)
    for name in ("stopped", "finished", "crashed"):
        config = search.suggest(name)
        assert config is not None and 1e-4 <= config["training.learning_rate"] <= 1e-2 and config["lora.r"] in (4, 8)
    search.on_trial_result("stopped", {"eval/loss": 0.5, "tokens_seen": 100, "training_iteration": 1})
    search.on_trial_complete("stopped", {"eval/loss": 0.5, "tokens_seen": 100})
    search.on_trial_complete("finished", {"eval/loss": 0.7, "tokens_seen": 1000})
    search.on_trial_complete("crashed", None, error=True)
    states = [trial.state for trial in search._ot_study.trials]
    assert states == [TrialState.PRUNED, TrialState.COMPLETE, TrialState.FAIL]
    assert search._ot_study.best_value == 0.7, "a stopped trial's loss at its early end is no result"


def test_the_same_seed_suggests_the_same_settings() -> None:
    first, second = make_search(TUNE), make_search(TUNE)
    assert [first.suggest(str(i)) for i in range(3)] == [second.suggest(str(i)) for i in range(3)]
