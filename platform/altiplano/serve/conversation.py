"""OpenAI's messages, as far as a text model can read them, and how Llama 3.2's chat template wants them."""

import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from altiplano.serve.tools import NAME

# Divides what would be read as a special token's name, so that no message can end its turn and begin somebody else's. A character
# that no text has: Unicode reserves it for use inside of programs.
GUARD = "\ufdd0"
_SPECIAL_NAME = re.compile(r"<(?=\|\w{1,64}\|>)")


class TextPart(BaseModel):
    """A part of a message's content. Other kinds of parts are refused: this model reads text."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    """A call that an assistant made; `arguments` is JSON text."""

    name: str = Field(pattern=NAME)
    arguments: str


class Call(BaseModel):
    """An entry of an assistant's tool_calls."""

    model_config = ConfigDict(extra="allow")

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[Call] | None = Field(None, max_length=128)
    tool_call_id: str | None = None

    def text(self) -> str:
        """The words, guarded; parts of a list are joined."""
        said = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""
        return _guarded(said)

    def turns(self) -> list[dict[str, Any]]:
        """The message as the template's turns: one, but one per call when an assistant made several.

        Raises:
            ValueError: a call's arguments are not the JSON text of an object.
        """
        role = "system" if self.role == "developer" else self.role
        if self.role != "assistant" or not self.tool_calls:
            return [{"role": role, "content": self.text()}]
        spoken = [{"role": role, "content": self.text()}] if self.text() else []
        calls = [
            {"name": call.function.name, "arguments": _object(_guarded(call.function.arguments))} for call in self.tool_calls
        ]
        return spoken + [{"role": role, "content": "", "tool_calls": [{"function": call}]} for call in calls]


def _guarded(text: str) -> str:
    return _SPECIAL_NAME.sub("<" + GUARD, text.replace(GUARD, ""))


def _object(arguments: str) -> dict[str, Any]:
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"the arguments of a tool call must be the JSON text of an object, not {arguments[:100]!r}")
    return found
