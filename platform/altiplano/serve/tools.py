"""Tools in Llama 3.2's format: a call is the whole message, `{"name": "f", "parameters": {…}}`."""

import json
import re
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from altiplano.serve.structured import json_rule

NAME = r"^[a-zA-Z0-9_-]{1,64}$"
MAX_TOOLS = 128
# A call up to its parameters. No repetition inside a repetition: it matches in linear time.
_HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([a-zA-Z0-9_-]{1,64})"\s*,\s*"(?:parameters|arguments)"\s*:\s*(?=\{)'
)
_LONGEST_HEAD = 256


class Function(BaseModel):
    """One function; `parameters` is a JSON schema of type object."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _usable(self) -> "Function":
        if self.parameters is not None and self.parameters.get("type", "object") != "object":
            raise ValueError("parameters must be a JSON schema of type 'object'")
        return self

    def rule(self) -> str:
        """The right side of a rule for one call."""
        schema = self.parameters or {"properties": {}, "additionalProperties": False}
        return f"{json.dumps(_opening(self.name))} {json_rule(schema | {'type': 'object'})} {json.dumps('}')}"


class Tool(BaseModel):
    """An entry of `tools`."""

    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    """The function that an answer must call."""

    name: str


class NamedTool(BaseModel):
    """tool_choice with a name."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass
class Delta:
    """New content, and pieces of calls in OpenAI's shape for streams."""

    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


class CallReader:
    """Tells calls from content while the text comes in. Whatever is not exactly a call of a known tool stays content."""

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self._read = self._head
        self._buffer = ""
        self._depth = 0
        self._quoted = self._escaped = False
        self.count = 0

    def push(self, text: str) -> Delta:
        """Take new text; returns what it settles."""
        self._buffer += text
        delta = Delta()
        while self._buffer and self._read(delta):
            pass
        return delta

    def finish(self) -> Delta:
        """What was held back. A whole object with its keys in another order is a call as well."""
        delta = Delta()
        rest, self._buffer = self._buffer, ""
        if self._read != self._head or (self.count and not rest.strip(" \n;")):
            return delta
        found = _whole_call(rest, self._names)
        if found is None:
            delta.content = rest
        else:
            self._begin(delta, found[0])
            self._more(delta, found[1])
        return delta

    # Each reader takes from the buffer what it understands and returns whether another one is to go on.

    def _head(self, delta: Delta) -> bool:
        text = self._buffer.lstrip(" \n;" if self.count else " \n")
        if not text:
            return False
        match = _HEAD.match(text)
        if match is not None and match[1] in self._names:
            self._begin(delta, match[1])
            self._buffer, self._read = text[match.end() :], self._parameters
            return True
        if text[0] == "{" and match is None and len(text) < _LONGEST_HEAD:
            return False
        self._read = self._content
        return True

    def _parameters(self, delta: Delta) -> bool:
        for at, character in enumerate(self._buffer):
            if self._quoted:
                self._quoted = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._more(delta, self._buffer[: at + 1])
                    self._buffer, self._read = self._buffer[at + 1 :], self._tail
                    return True
        self._more(delta, self._buffer)
        self._buffer = ""
        return False

    def _tail(self, delta: Delta) -> bool:
        """The brace that closes a call, and then perhaps the next one."""
        text = self._buffer.lstrip()
        if not text:
            return False
        self._buffer, self._read = text.removeprefix("}"), self._head
        return True

    def _content(self, delta: Delta) -> bool:
        delta.content += self._buffer
        self._buffer = ""
        return False

    def _begin(self, delta: Delta, name: str) -> None:
        function = {"name": name, "arguments": ""}
        delta.calls.append({"index": self.count, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
        self.count += 1

    def _more(self, delta: Delta, arguments: str) -> None:
        if delta.calls and delta.calls[-1]["index"] == self.count - 1:
            delta.calls[-1]["function"]["arguments"] += arguments
        else:
            delta.calls.append({"index": self.count - 1, "function": {"arguments": arguments}})


def _opening(name: str) -> str:
    return f'{{"name": "{name}", "parameters": '


def _whole_call(text: str, names: set[str]) -> tuple[str, str] | None:
    """Name and arguments of an object that is a call."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("name") not in names:
        return None
    arguments = found.get("parameters", found.get("arguments"))
    return (found["name"], json.dumps(arguments)) if isinstance(arguments, dict) else None
