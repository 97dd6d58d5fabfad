"""What a batch already knows, on disk: one line per answered row, so that a run that is killed goes on where it was."""

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any


class Journal:
    """Append-only JSON lines, one writer at a time. Use as a context manager.

    A line is written with one call, so a killed process leaves at most one torn line at the end, which is cut off here. Answers
    survive the death of the process; the death of the machine may cost the last ones.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        self._failed: set[str] = set()
        self.finished = False

    def __enter__(self) -> "Journal":
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise ValueError(f"another batch writes to {self.path} now: wait for it, or choose another output") from error
        self._end = self._load()
        os.ftruncate(self._file, self._end)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.fsync(self._file)
        os.close(self._file)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def is_failure(self, key: str) -> bool:
        """Whether the row was asked and refused."""
        return key in self._failed

    def add(self, key: str, result: dict[str, Any]) -> None:
        """Note a result; one with an `error` that is not None is a failure."""
        start, length = self._append({"key": key, "result": result})
        self._places[key] = (start, length)
        if result.get("error") is not None:
            self._failed.add(key)

    def finish(self) -> None:
        """The outputs are written. From now on a row that failed counts as not asked."""
        self._append({"finished": True})

    def result(self, key: str) -> dict[str, Any]:
        """What was noted for a row."""
        start, length = self._places[key]
        result: dict[str, Any] = json.loads(os.pread(self._file, length, start))["result"]
        return result

    def remove(self) -> None:
        """Nothing is left to remember."""
        self.path.unlink()

    def _append(self, value: dict[str, Any]) -> tuple[int, int]:
        data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        start = self._end
        while data:
            data = data[os.write(self._file, data) :]
        self._end = os.lseek(self._file, 0, os.SEEK_END)
        return start, self._end - start

    def _load(self) -> int:
        """Index the whole lines; the size of the part that can be trusted."""
        start = 0
        for line in _whole_lines(self.path):
            try:
                value = json.loads(line)
            except ValueError:
                break
            if value.get("finished"):
                self.finished = True
                for key in self._failed:
                    del self._places[key]
                self._failed.clear()
            else:
                self._places[value["key"]] = (start, len(line))
                if value["result"].get("error") is not None:
                    self._failed.add(value["key"])
            start += len(line)
        return start


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield line
