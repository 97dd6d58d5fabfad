"""A rollout on disk: what is needed to go on after a crash, and the mailbox through which people speak to it."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from altiplano.models.files import replace_file
from altiplano.serve.evidence import Notebook
from altiplano.serve.rollout import Plan, State, share, told

VERBS = ("pause", "resume", "promote", "rollback")


class NoRolloutError(ValueError):
    """There is no rollout to speak to."""


class RolloutBusyError(RuntimeError):
    """Another rollout is on its way."""

    exit_code = 5


@dataclass
class Saved:
    """Everything about one rollout. Times in seconds since 1970."""

    plan: Plan
    state: State
    started: float
    notebook: Notebook = field(default_factory=Notebook)
    run_id: str | None = None
    changed: float = 0.0
    seen: float = 0.0
    """When a controller looked last."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Every move: time, phase, share in percent, reason."""

    def to_json(self) -> dict[str, Any]:
        """What people may see."""
        kept = {
            "started": self.started,
            "changed": self.changed,
            "seen": self.seen,
            "run_id": self.run_id,
            "history": self.history,
        }
        return {"plan": told(self.plan), "state": asdict(self.state), "share": share(self.plan, self.state)} | kept


class Store:
    """The present (or last) rollout of one endpoint in a directory, which outlives processes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file, self._mail = directory / "rollout.json", directory / "command.json"

    def load(self) -> Saved | None:
        """The rollout, or None when there was never one."""
        try:
            values = json.loads(self._file.read_text())
        except FileNotFoundError:
            return None
        notebook = Notebook.from_json(values["notebook"])
        plan, state = Plan.from_json(values["plan"]), State.from_json(values["state"])
        return Saved(
            plan, state, values["started"], notebook, values["run_id"], values["changed"], values["seen"], values["history"]
        )

    def save(self, saved: Saved) -> None:
        """Replace what is kept; a crash leaves the old file or the new one."""
        self._replace(self._file, saved.to_json() | {"plan": asdict(saved.plan), "notebook": saved.notebook.to_json()})

    def begin(self, plan: Plan, now: float) -> Saved:
        """A new rollout.

        Raises:
            RolloutBusyError: one is on its way.
        """
        before = self.load()
        if before is not None and not before.state.phase.ended:
            phase = before.state.phase.replace("_", " ")
            raise RolloutBusyError(
                f"a rollout of {before.plan.challenger} is {phase}: wait for it (`altiplano rollout status`), or end it with "
                "`altiplano rollout promote` or `altiplano rollout rollback`"
            )
        self._mail.unlink(missing_ok=True)
        made = Saved(plan, State(), now, changed=now, seen=now)
        self.save(made)
        return made

    def ask(self, verb: str, reason: str = "") -> None:
        """Leave a command for whoever controls the rollout; `reason` is kept in its history.

        Raises:
            NoRolloutError: there is none on its way.
        """
        assert verb in VERBS
        saved = self.load()
        if saved is None or saved.state.phase.ended:
            raise NoRolloutError("no rollout is on its way: start one with `altiplano rollout start`")
        self._replace(self._mail, {"verb": verb, "reason": reason})

    def taken(self) -> tuple[str, str] | None:
        """The command that was left last and its reason, once."""
        try:
            mail = json.loads(self._mail.read_text())
        except FileNotFoundError:
            return None
        self._mail.unlink(missing_ok=True)
        return (mail["verb"], mail["reason"]) if mail["verb"] in VERBS else None

    @contextmanager
    def controlled(self) -> Iterator[bool]:
        """Be the one who controls; False when somebody else does. Ends with the process, however it ends."""
        self.directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.directory / "controller.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            yield False
            return
        try:
            yield True
        finally:
            os.close(descriptor)

    def _replace(self, path: Path, value: Any) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(value).encode())
