"""The gate: a candidate is promoted only on evidence.

Promote: on the primary task it beats the rival (the champion, or the base for a first model): the paired test is significant
at alpha and the lower confidence bound of the gain is above min_delta; no guard task is clearly worse than its margin; it is
not slower than allowed; nothing is missing in its lineage. Reject: significantly worse, or a guard is broken. Anything else is
inconclusive: more rows would be needed to know.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from altiplano import spec
from altiplano.evaluate import Comparison, label

Decision = Literal["promote", "reject", "inconclusive"]
CANDIDATE, CHAMPION, BASE = "candidate", "champion", "base"


@dataclass(frozen=True)
class Check:
    """One condition. `outcome`: pass, fail (rejects) or open (not enough evidence)."""

    name: str
    outcome: Literal["pass", "fail", "open"]
    detail: str


@dataclass(frozen=True)
class Verdict:
    """The decision with everything that led to it."""

    decision: Decision
    rival: str
    checks: tuple[Check, ...]
    comparisons: dict[str, dict[str, Comparison]]

    @property
    def reasons(self) -> tuple[str, ...]:
        """What decided: the failed checks, else the open ones, else the primary's success."""
        for outcome in ("fail", "open"):
            found = tuple(check.detail for check in self.checks if check.outcome == outcome)
            if found:
                return found
        return (self.checks[0].detail,)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"reasons": list(self.reasons)}

    def to_markdown(self) -> str:
        """A page for people."""
        lines = [f"# Gate: {self.decision}", "", *(f"- **{c.outcome}** {c.name}: {c.detail}" for c in self.checks)]
        for rival, tasks in self.comparisons.items():
            lines += [
                "",
                f"## Candidate against {rival}",
                "",
                "| task | " + rival + " | candidate | gain | interval | p | test | rows |",
            ]
            lines.append("|---|---|---|---|---|---|---|---|")
            lines += [
                f"| {label(t.task)} | {t.baseline:.4f} | {t.candidate:.4f} | {t.delta:+.4f} | [{t.ci_low:+.4f}, {t.ci_high:+.4f}] | {t.p_value:.2g} | {t.test} | {t.n} |"
                for t in tasks.values()
            ]
        return "\n".join(lines) + "\n"


def decide(
    gate: spec.Gate,
    comparisons: Mapping[str, Mapping[str, Comparison]],
    *,
    latency: Mapping[str, float],
    missing_lineage: Sequence[str],
) -> Verdict:
    """The verdict. `comparisons` by rival and task; `latency` in seconds per token by subject; `missing_lineage` names gaps."""
    rival = CHAMPION if CHAMPION in comparisons else BASE
    tasks = comparisons[rival]
    checks = [_superior(gate, tasks[gate.primary], rival)]
    checks += [_not_inferior(task, margin, tasks[task]) for task, margin in gate.non_inferiority.items()]
    checks.append(_fast_enough(gate, latency, rival))
    gaps = ", ".join(missing_lineage)
    checks.append(Check("lineage", "fail" if gaps else "pass", f"missing: {gaps}" if gaps else "complete"))
    outcomes = {check.outcome for check in checks}
    decision: Decision = "reject" if "fail" in outcomes else "inconclusive" if "open" in outcomes else "promote"
    return Verdict(decision, rival, tuple(checks), {name: dict(found) for name, found in comparisons.items()})


def _superior(gate: spec.Gate, found: Comparison, rival: str) -> Check:
    numbers = (
        f"{label(found.task)} {found.baseline:.3f} → {found.candidate:.3f}, "
        f"gain {found.delta:+.3f} [{found.ci_low:+.3f}, {found.ci_high:+.3f}], p {found.p_value:.2g}"
    )
    significant = found.p_value < gate.alpha
    if significant and found.ci_low > gate.min_delta:
        return Check("superiority", "pass", f"better than {rival}: {numbers}")
    if significant and found.delta < 0:
        return Check("superiority", "fail", f"worse than {rival}: {numbers}")
    return Check("superiority", "open", f"no proof that it is better than {rival} by more than {gate.min_delta:g}: {numbers}")


def _not_inferior(task: str, margin: float, found: Comparison) -> Check:
    name = f"non-inferiority {task}"
    numbers = f"{label(task)}: gain {found.delta:+.3f} [{found.ci_low:+.3f}, {found.ci_high:+.3f}], tolerated loss {margin:g}"
    if found.ci_low >= -margin:
        return Check(name, "pass", numbers)
    if found.ci_high < -margin:
        return Check(name, "fail", f"clearly worse: {numbers}")
    return Check(name, "open", f"a larger loss cannot be excluded: {numbers}")


def _fast_enough(gate: spec.Gate, latency: Mapping[str, float], rival: str) -> Check:
    # An adapter costs time against its bare base by nature, so a first model has no one to be slower than.
    if rival == BASE or not latency.get(rival) or not latency.get(CANDIDATE):
        return Check("latency", "pass", "no champion to compare with")
    growth = latency[CANDIDATE] / latency[rival] - 1
    numbers = f"time per token {growth:+.0%} against {rival}, allowed {gate.max_latency_regression:+.0%}"
    return Check("latency", "pass" if growth <= gate.max_latency_regression else "fail", numbers)
