"""The row formats in use, and one canonical form: a list of messages, or a plain text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from altiplano.data.sources import RawRow
from altiplano.data.templates import Message

ROLES = {"system", "user", "assistant", "tool", "ipython"}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}


class RowError(ValueError):
    """A row that does not follow its format."""


@dataclass(frozen=True)
class Row:
    """A canonical row: `messages` of a dialogue, or `text`."""

    source: str
    number: int
    messages: tuple[Message, ...] = ()
    text: str | None = None


def canonical(raw: RawRow, name: str) -> Row:
    """`raw` in canonical form; `name` is a format or `auto`.

    Raises:
        RowError: says which column is missing or wrong.
    """
    chosen = detect(raw.values) if name == "auto" else name
    return FORMATS[chosen](raw)


def detect(values: Mapping[str, Any]) -> str:
    """The format whose columns a row has.

    Raises:
        RowError: none of them.
    """
    for name, columns in COLUMNS.items():
        if all(column in values for column in columns):
            return name
    wanted = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in COLUMNS.items())
    raise RowError(f"has columns {sorted(values)}, which fit no format ({wanted}): rename columns, or set the source's format")


def _messages(raw: RawRow) -> Row:
    return _dialogue(raw, [(m.get("role"), m.get("content"), m) for m in _list(raw, "messages")])


def _sharegpt(raw: RawRow) -> Row:
    turns = _list(raw, "conversations")
    return _dialogue(raw, [(SHAREGPT_ROLES.get(str(t.get("from")), t.get("from")), t.get("value"), {}) for t in turns])


def _prompt_completion(raw: RawRow) -> Row:
    prompt, completion = raw.values.get("prompt"), raw.values.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _dialogue(raw, [(m.get("role"), m.get("content"), m) for m in [*prompt, *completion]])
    return _dialogue(raw, [("user", prompt, {}), ("assistant", completion, {})])


def _alpaca(raw: RawRow) -> Row:
    instruction, extra = raw.values.get("instruction"), raw.values.get("input")
    question = f"{instruction}\n\n{extra}" if extra else instruction
    return _dialogue(raw, [("user", question, {}), ("assistant", raw.values.get("output"), {})])


def _text(raw: RawRow) -> Row:
    text = raw.values.get("text")
    if not isinstance(text, str) or not text.strip():
        raise RowError("column text is empty")
    return Row(raw.source, raw.number, text=text)


def _dialogue(raw: RawRow, turns: list[tuple[Any, Any, Mapping[str, Any]]]) -> Row:
    """Checked messages: known roles, words in every turn, something for the assistant to say."""
    if not turns:
        raise RowError("has no messages")
    messages = []
    for position, (role, content, extra) in enumerate(turns, start=1):
        if role not in ROLES:
            raise RowError(f"message {position} has role {role!r}: use system, user, assistant or tool")
        calls = extra.get("tool_calls")
        if not calls and (not isinstance(content, str) or not content.strip()):
            raise RowError(f"message {position} ({role}) is empty")
        if role == "system" and position > 1:
            raise RowError(f"message {position} is a system message: only the first may be one")
        messages.append({"role": role, "content": content or ""} | ({"tool_calls": calls} if calls else {}))
    return Row(raw.source, raw.number, messages=tuple(messages))


def _list(raw: RawRow, column: str) -> list[dict[str, Any]]:
    value = raw.values.get(column)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError(f"column {column} is not a list of objects")
    return value


COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
FORMATS: dict[str, Callable[[RawRow], Row]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _text,
}
