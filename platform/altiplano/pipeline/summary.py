"""What a run found, read back from its records: the last screen of a run and the answer of `altiplano status`."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from altiplano.pipeline import services
from altiplano.pipeline.events import last_run
from altiplano.pipeline.ledger import Ledger
from altiplano.pipeline.workspace import Workspace

STAGE_NAMES = ("data", "tune", "train", "evaluate", "gate", "register", "deploy")


class NoRunError(ValueError):
    """There is no such run in this workspace."""


class RunPlace(Workspace):
    """A workspace whose run exists."""

    def is_running(self) -> bool:
        """Whether a driver holds the workspace now."""
        try:
            descriptor = os.open(self.root / "pipeline.lock", os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except OSError:
            return True
        finally:
            os.close(descriptor)


def latest_run(root: Path, name: str | None) -> RunPlace:
    """The run called `name`, or the one with the youngest events.

    Raises:
        NoRunError: no such run; the message lists those that exist.
    """
    found = {path.parent.name: path.stat().st_mtime for path in root.glob("*/events.jsonl")}
    chosen = name or max(found, key=lambda run: found[run], default=None)
    if chosen is None or chosen not in found:
        known = ", ".join(sorted(found)) or "none yet: start one with `altiplano run FILE`"
        raise NoRunError(
            f"{root} has no run {name!r}; runs: {known}" if name else f"{root} has no runs: start one with `altiplano run FILE`"
        )
    return RunPlace(root, chosen)


def summarize(workspace: Workspace) -> dict[str, Any]:
    """Stages, numbers, addresses: JSON-ready. `lines` are (label, text) pairs for people."""
    ledger = Ledger(workspace)
    done = {event["stage"] for event in last_run(workspace.events_file) if event["kind"] in ("stage_finished", "stage_skipped")}
    records = {name: record for name in STAGE_NAMES if name in done and (record := ledger.latest(name)) is not None}
    outputs = {name: record.outputs for name, record in records.items()}
    running = services.find_mlflow(workspace.root) or _tracking_uri(workspace)
    summary: dict[str, Any] = {
        "run": workspace.run,
        "status": _status(workspace),
        "stages": {name: {"seconds": record.seconds, "mlflow_run_id": record.mlflow_run_id} for name, record in records.items()},
        "trials": outputs.get("tune", {}).get("trials", []),
        "verdict": outputs.get("gate", {}).get("decision"),
        "endpoint": outputs.get("deploy", {}).get("url"),
        "mlflow": running,
        "evaluation": outputs.get("evaluate", {}).get("summary"),
        "lines": _lines(outputs, running),
    }
    if outputs.get("deploy", {}).get("answer"):
        summary["chat"] = {key: outputs["deploy"][key] for key in ("question", "answer", "model")}
    return summary


def _lines(outputs: dict[str, Any], mlflow: str | None) -> list[tuple[str, str]]:
    lines = []
    if train := outputs.get("train"):
        lines.append(
            ("loss", f"{train['loss_curve'][0][1]:.3f} → {train['loss_curve'][-1][1]:.3f}, held-out {train['eval_loss']:.3f}")
        )
    if gate := outputs.get("gate"):
        form = ".3f" if gate["primary"] == "perplexity" else ".1%"
        interval = f"gain {gate['delta']:+{form}}, 95 % interval [{gate['ci_low']:+{form}}, {gate['ci_high']:+{form}}]"
        lines.append(
            (gate["label"], f"{gate['baseline']:{form}} ({gate['rival']}) → {gate['candidate']:{form}} (tuned); {interval}")
        )
        lines.append(("gate", f"{gate['decision']}: {'; '.join(gate['reasons'])}"))
    if register := outputs.get("register"):
        lines.append(("registry", f"{register['name']} version {register['version']}"))
    if deploy := outputs.get("deploy"):
        lines.append(("endpoint", deploy["url"] or deploy["reason"]))
    if mlflow:
        lines.append(("MLflow", mlflow))
    return lines


def _status(workspace: Workspace) -> str:
    """running, finished, failed or interrupted."""
    ends = [event for event in last_run(workspace.events_file) if event["kind"] == "run_finished"]
    if ends:
        return "failed" if ends[-1].get("error") else "finished"
    return "running" if RunPlace(workspace.root, workspace.run).is_running() else "interrupted"


def _tracking_uri(workspace: Workspace) -> str | None:
    try:
        uri: str | None = json.loads(workspace.pipeline_file.read_text())["tracking"]["tracking_uri"]
    except (OSError, ValueError, KeyError):
        return None
    return uri
