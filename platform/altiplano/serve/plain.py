"""Requests that OpenAI's API does not have: tokens of a text, text of tokens, and one plain question."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from altiplano.serve.conversation import Message
from altiplano.serve.protocol import CompletionRequest
from altiplano.serve.tools import MAX_TOOLS, Tool


class TokenizeRequest(BaseModel):
    """POST /tokenize, as in vLLM: a prompt, or the messages of a chat."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=1024)
    tools: list[Tool] | None = Field(None, min_length=1, max_length=MAX_TOOLS)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(BaseModel):
    """POST /detokenize, as in vLLM."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    tokens: list[int] = Field(max_length=1 << 20)


class GenerateRequest(CompletionRequest):
    """POST /generate: a completion without ceremony. The served model answers unless `model` names another."""

    model: str = ""
    prompt: str = Field(min_length=1)
    n: Literal[1] = 1
    max_tokens: int = Field(128, ge=0)


def generated(body: dict[str, Any]) -> dict[str, Any]:
    """The answer of /generate from that of /v1/completions."""
    choices = body["choices"]
    return {
        "model": body["model"],
        "text": choices[0]["text"],
        "finish_reason": choices[0]["finish_reason"],
        "usage": body["usage"],
    }
