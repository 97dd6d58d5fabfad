"""The gate: clear wins, clear losses, too few rows, broken guards, and models that are the same."""

import numpy as np

from altiplano import spec
from altiplano.evaluate import Comparison
from altiplano.evaluate.compare import compare_rows
from altiplano.registry import gate

GATE = spec.Gate(primary="exact_match", non_inferiority={}, alpha=0.05, min_delta=0.0)


def judge(
    baseline: list[float],
    candidate: list[float],
    *,
    settings: spec.Gate = GATE,
    rival: str = gate.CHAMPION,
    latency: dict[str, float] | None = None,
    missing: tuple[str, ...] = (),
) -> gate.Verdict:
    """The verdict for exact-match outcomes."""
    found = compare("exact_match", baseline, candidate)
    return gate.decide(settings, {rival: {"exact_match": found}}, latency=latency or {}, missing_lineage=missing)


def compare(task: str, baseline: list[float], candidate: list[float]) -> Comparison:
    return compare_rows(task, baseline, candidate, alpha=0.05, bootstrap_samples=400, seed=0)


def test_clear_win_is_promoted() -> None:
    verdict = judge([0.0] * 90 + [1.0] * 10, [1.0] * 95 + [0.0] * 5)
    assert verdict.decision == "promote"
    assert "# Gate: promote" in verdict.to_markdown()
    assert verdict.to_json()["decision"] == "promote"


def test_clear_loss_is_rejected() -> None:
    verdict = judge([1.0] * 95 + [0.0] * 5, [0.0] * 90 + [1.0] * 10)
    assert verdict.decision == "reject"
    assert "worse than champion" in verdict.reasons[0]


def test_a_small_gain_on_few_rows_is_inconclusive() -> None:
    assert judge([0.0] * 10 + [1.0] * 10, [1.0] * 2 + [0.0] * 8 + [1.0] * 10).decision == "inconclusive"


def test_a_gain_below_min_delta_is_inconclusive() -> None:
    settings = GATE.model_copy(update={"min_delta": 0.5})
    assert judge([0.0] * 100, [1.0] * 20 + [0.0] * 80, settings=settings).decision == "inconclusive"


def test_gaps_in_the_lineage_reject_a_winner() -> None:
    verdict = judge([0.0] * 100, [1.0] * 100, missing=("base_digest",))
    assert (verdict.decision, verdict.reasons) == ("reject", ("missing: base_digest",))


def test_a_slower_winner_is_rejected_but_a_first_model_has_no_one_to_be_slower_than() -> None:
    slow = {gate.CANDIDATE: 10.0, gate.CHAMPION: 1.0, gate.BASE: 1.0}
    assert judge([0.0] * 100, [1.0] * 100, latency=slow).decision == "reject"
    assert judge([0.0] * 100, [1.0] * 100, latency=slow, rival=gate.BASE).decision == "promote"


def test_a_broken_guard_rejects_a_winner() -> None:
    settings = GATE.model_copy(update={"non_inferiority": {"json_validity": 0.01}})
    comparisons = {
        gate.CHAMPION: {
            "exact_match": compare("exact_match", [0.0] * 100, [1.0] * 100),
            "json_validity": compare("json_validity", [1.0] * 100, [1.0] * 40 + [0.0] * 60),
        }
    }
    assert gate.decide(settings, comparisons, latency={}, missing_lineage=()).decision == "reject"


def test_two_equal_models_are_told_apart_no_more_often_than_alpha() -> None:
    generator = np.random.default_rng(7)
    runs = 300
    decisions = [
        judge(generator.integers(0, 2, 100).astype(float).tolist(), generator.integers(0, 2, 100).astype(float).tolist()).decision
        for _ in range(runs)
    ]
    assert decisions.count("promote") / runs <= GATE.alpha
    assert (decisions.count("promote") + decisions.count("reject")) / runs <= GATE.alpha + 0.025
