"""What an answer may be, as a grammar: response_format and tools in llguidance's dialect of Lark."""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

# Fixed separators, those of the chat template's JSON: with free white space a small model can fill its context with blanks.
_WRITING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Anything that cannot be taken for a call.
FREE_TEXT = r"/[^{](.|\n)*/"


class JsonSchema(BaseModel):
    """response_format.json_schema. `strict` is accepted and always true here: the answer follows the schema, or is cut short."""

    model_config = ConfigDict(extra="allow", serialize_by_alias=True)

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, JsonValue] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """response_format."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type 'json_schema', which needs it")
        return self

    def rule(self) -> str | None:
        """The right side of a rule for the answer; None when it is free."""
        if self.type == "text":
            return None
        return json_rule({"type": "object"} if self.json_schema is None else self.json_schema.schema_)


def json_rule(schema: dict[str, Any]) -> str:
    """The right side of a rule for JSON under `schema`, written as the chat template writes it."""
    return "%json " + json.dumps(schema | {"x-guidance": _WRITING})


def grammar(*alternatives: str) -> str:
    """A grammar whose answer is one of `alternatives` (right sides of rules)."""
    names = [f"a{i}" for i in range(len(alternatives))]
    return "\n".join([f"start: {' | '.join(names)}", *(f"{n}: {rule}" for n, rule in zip(names, alternatives, strict=True))])
