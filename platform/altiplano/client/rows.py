"""Rows of a batch file, from JSONL or CSV to requests.

Three kinds of row: OpenAI's batch request (`custom_id`, `method`, `url`, `body`), a chat (`messages`), a question (`prompt`, or
a template over the row's columns). Other columns of the last two are data and travel to the output.
"""

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

PATHS = {"/v1/chat/completions": "chat/completions", "/v1/completions": "completions"}
PLACEHOLDER = re.compile(r"\{(\w+)\}")
MAX_CELL_CHARACTERS = 4 << 20


class RowFormat(StrEnum):
    """How rows are written down."""

    jsonl = "jsonl"
    csv = "csv"


@dataclass(frozen=True)
class Asking:
    """What rows leave open. A model given here also replaces the model of OpenAI batch rows, which name somebody else's."""

    default_model: str
    model: str | None = None
    system: str | None = None
    template: str | None = None
    answer_column: str = "answer"
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One request. `index` counts from 0; `where` names the row in messages."""

    index: int
    where: str
    source: dict[str, Any]
    path: str
    body: dict[str, Any]
    custom_id: str | None = None
    """Set for OpenAI's batch format."""

    def key(self) -> str:
        """Names the request over restarts: the same row, asked the same way."""
        text = json.dumps([self.index, self.path, self.body], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def format_of(path: Path) -> RowFormat:
    """The format that a file's name says."""
    if path.suffix in (".jsonl", ".ndjson"):
        return RowFormat.jsonl
    if path.suffix == ".csv":
        return RowFormat.csv
    raise ValueError(f"{path}: the name must end with .jsonl or .csv, so that the format is known")


def read_rows(path: Path, asking: Asking) -> Iterator[Row]:
    """The rows of a file, one at a time.

    Raises:
        ValueError: a row that cannot be asked, with its place and what to change.
    """
    seen: set[str] = set()
    reader = _csv_rows if format_of(path) is RowFormat.csv else _jsonl_rows
    for index, (line, source) in enumerate(reader(path)):
        where = f"{path}, line {line}"
        if "custom_id" in source and "body" in source:
            row = _batch_row(index, where, source, asking)
            assert row.custom_id is not None
            if row.custom_id in seen:
                raise ValueError(f"{where}: custom_id {row.custom_id!r} is used twice: answers could not be told apart")
            seen.add(row.custom_id)
        else:
            row = _data_row(index, where, source, asking)
        yield row


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig"), parse_constant=_no_constants)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: this is no JSON ({error})") from error
            if not isinstance(value, dict):
                raise ValueError(f"{path}, line {number}: a row is a JSON object, and this is a {type(value).__name__}")
            yield number, value


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        try:
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise ValueError(f"{path}: a column name is used twice: {', '.join(names)}")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{path}, line {reader.line_num}: this row does not have the header's {len(names)} columns")
                yield reader.line_num, dict(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {reader.line_num + 1}: this is no CSV in UTF-8 ({error})") from error


def _batch_row(index: int, where: str, source: dict[str, Any], asking: Asking) -> Row:
    custom_id, url, body = source["custom_id"], source.get("url"), source["body"]
    if not isinstance(custom_id, str) or not isinstance(body, dict):
        raise ValueError(f"{where}: custom_id is a string and body an object in OpenAI's batch format")
    if source.get("method", "POST") != "POST" or url not in PATHS:
        raise ValueError(f"{where}: only POST to {' or '.join(PATHS)} can be asked, not {source.get('method', 'POST')} {url}")
    if body.get("stream"):
        raise ValueError(f"{where}: a batch row cannot be streamed: remove stream")
    asked = asking.parameters | body
    asked["model"] = asking.model or body.get("model") or asking.default_model
    return Row(index, where, source, PATHS[url], asked, custom_id)


def _data_row(index: int, where: str, source: dict[str, Any], asking: Asking) -> Row:
    if asking.answer_column in source:
        raise ValueError(
            f"{where}: the column {asking.answer_column!r} is in the input already: name the answers with --answer-column"
        )
    messages = source.get("messages") if asking.template is None else None
    if messages is None:
        messages = [{"role": "user", "content": _prompt(where, source, asking.template)}]
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{where}: messages is a list of objects with role and content")
    if asking.system is not None and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": asking.system}, *messages]
    body = {"model": asking.model or asking.default_model, "messages": messages} | asking.parameters
    return Row(index, where, source, "chat/completions", body)


def _prompt(where: str, source: dict[str, Any], template: str | None) -> str:
    columns = ", ".join(source) or "none"
    if template is not None:
        missing = [name for name in PLACEHOLDER.findall(template) if name not in source]
        if missing:
            raise ValueError(f"{where}: the template asks for {{{missing[0]}}}, and the row has the columns {columns}")
        return PLACEHOLDER.sub(lambda match: str(source[match[1]]), template)
    prompt = source.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(
            f"{where}: give a text in `prompt`, a list in `messages`, or a --template; the row has the columns {columns}"
        )
    return prompt


def _no_constants(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
