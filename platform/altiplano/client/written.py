"""Results of a batch in the shape of its rows, written so that a reader sees the whole file or none."""

import csv
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from altiplano.client.rows import Row, RowFormat, format_of

Result = dict[str, Any]


def write_answers(rows: Iterable[tuple[Row, Result]], output: Path, failed: Path, answer_column: str) -> None:
    """Answered rows to `output`, refused rows to `failed`, both in the input's order.

    Rows of OpenAI's batch format get OpenAI's output objects; other rows keep their columns and gain the answer, or the error.
    """
    make: type[_CsvFile] | type[_JsonlFile] = _CsvFile if format_of(output) is RowFormat.csv else _JsonlFile
    with ExitStack() as stack:
        good, bad = stack.enter_context(make(output)), stack.enter_context(make(failed))
        for row, result in rows:
            (good if result.get("error") is None else bad).write(_shaped(row, result, answer_column))


def _shaped(row: Row, result: Result, answer_column: str) -> dict[str, Any]:
    error = result.get("error")
    if row.custom_id is not None:
        response = {"status_code": result["status_code"], "request_id": result["request_id"], "body": result.get("body")}
        return {
            "id": f"batch_req_{row.key()}",
            "custom_id": row.custom_id,
            "response": response if result["status_code"] is not None else None,
            "error": error,
        }
    if error is not None:
        return row.source | {"error": error["message"], "status_code": result["status_code"]}
    body = result["body"]
    choice, usage = body["choices"][0], body.get("usage") or {}
    return row.source | {
        answer_column: choice["message"]["content"],
        "finish_reason": choice["finish_reason"],
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
    }


class _AtomicFile(ABC):
    """Text that takes its name when it is complete. Without rows there is no file, and an older one goes away."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(f".{path.name}.{os.getpid()}")
        self._rows = 0

    @abstractmethod
    def write(self, row: dict[str, Any]) -> None: ...

    def __enter__(self) -> Self:
        self._text = self._temporary.open("w", encoding="utf-8", newline="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._text.flush()
        os.fsync(self._text.fileno())
        self._text.close()
        if error is None and self._rows:
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink()
            if error is None:
                self._path.unlink(missing_ok=True)


class _JsonlFile(_AtomicFile):
    def write(self, row: dict[str, Any]) -> None:
        self._text.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._rows += 1


class _CsvFile(_AtomicFile):
    def write(self, row: dict[str, Any]) -> None:
        if not self._rows:
            self._writer = csv.DictWriter(self._text, list(row), lineterminator="\n")
            self._writer.writeheader()
        self._writer.writerow({name: _cell(value) for name, value in row.items()})
        self._rows += 1


def _cell(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
