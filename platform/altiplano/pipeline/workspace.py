"""Where a pipeline keeps its state on disk, and the lock that keeps two pipelines out of one workspace."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from altiplano.models.files import replace_file

if TYPE_CHECKING:
    from altiplano import spec

# The driver's first line on standard output, once it holds the workspace.
READY = "ready"
LOCK_TRIES = 5


class WorkspaceBusyError(RuntimeError):
    """Another pipeline is running in this workspace."""

    exit_code = 5


class WorkspaceError(RuntimeError):
    """The workspace cannot be written."""

    exit_code = 2


@dataclass(frozen=True)
class Workspace:
    """`root/` holds services and all runs; `root/<run>/` is one pipeline."""

    root: Path
    run: str

    @classmethod
    def of(cls, run: "spec.Run") -> "Workspace":
        """The workspace that a pipeline file names.

        Raises:
            WorkspaceError: a place that is no directory.
        """
        if "://" in run.storage_path:
            raise WorkspaceError(
                f"run.storage_path {run.storage_path!r} is no directory: use a local or mounted one; object stores serve data only"
            )
        return cls(Path(run.storage_path).resolve(), run.name)

    @property
    def run_dir(self) -> Path:
        return self.root / self.run

    @property
    def pipeline_file(self) -> Path:
        """The resolved pipeline, as the driver reads it."""
        return self.run_dir / "pipeline.json"

    @property
    def events_file(self) -> Path:
        return self.run_dir / "events.jsonl"

    @property
    def log_file(self) -> Path:
        """Everything that the driver and the libraries print."""
        return self.run_dir / "driver.log"

    @property
    def spool_dir(self) -> Path:
        """Measurements on their way to MLflow; shared by all runs of the workspace."""
        return self.root / "spool"

    def stage_dir(self, stage: str) -> Path:
        return self.run_dir / stage

    @property
    def no_space(self) -> str:
        """What to tell a user whose disk is full."""
        return f"no space left on the disk of {self.root}: free some, or change run.storage_path, and run the same command again; finished stages are kept"

    def is_full(self) -> bool:
        """Whether the disk has no room for even an event."""
        return shutil.disk_usage(self.root).free < 1 << 20

    def create(self) -> None:
        """Make the directories, or say why they cannot be made."""
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.spool_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WorkspaceError(
                f"{self.run_dir} cannot be written ({error.strerror}): free space, or change run.storage_path"
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the workspace; the lock ends with this process, however it ends.

        Raises:
            WorkspaceBusyError: another process holds it.
        """
        self.create()
        path = self.root / "pipeline.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                _lock(descriptor)
            except OSError as error:
                holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
                raise WorkspaceBusyError(
                    f"{self.root} is in use by {holder}: wait for it (`altiplano status`), stop it (`altiplano down`), or set another run.storage_path"
                ) from error
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"pipeline {self.run!r} (pid {os.getpid()})".encode(), 0)
            yield
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Take the lock; a reader that only looks whether it is held (`altiplano status`) has it for an instant too."""
    for _ in range(LOCK_TRIES - 1):
        with contextlib.suppress(OSError):
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.05)
    return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def out_of_space(error: BaseException) -> bool:
    """Whether a full disk (or an exhausted quota) is what `error` comes from."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        cause = getattr(cause, "cause", None) or cause.__cause__ or cause.__context__
    return False


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by the JSON text of `value`; a crash or a full disk leaves the old file whole.

    Raises:
        WorkspaceError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(value, indent=1).encode())
    except OSError as error:
        raise WorkspaceError(f"{path} cannot be written ({error.strerror}): free space, or change run.storage_path") from error
