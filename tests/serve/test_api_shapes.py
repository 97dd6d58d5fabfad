"""Raw answers against the types of OpenAI's own client, checked strictly: the client itself forgives what other clients do not."""

import json
from typing import Any

import httpx
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, TypeAdapter

from .conftest import Server

NOTE = [{"role": "user", "content": "Priya wants 3 melon pies at 14 Elm Street on Friday. Where?"}]
CHAT: dict[str, Any] = {"model": "cria", "messages": NOTE, "temperature": 0, "max_tokens": 12}
PLAIN: dict[str, Any] = {"model": "cria", "prompt": "A note", "temperature": 0, "max_tokens": 4}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}


def check(kind: type[BaseModel], body: dict[str, Any]) -> None:
    """No field is missing or of another type, and nothing is there that OpenAI does not know."""
    TypeAdapter(kind).validate_json(json.dumps(body), strict=True)
    known = set(kind.model_fields)
    assert set(body) <= known, set(body) - known


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    *said, done, rest = response.text.split("\n\n")
    assert done == "data: [DONE]" and rest == ""
    return [json.loads(event.removeprefix("data: ")) for event in said]


@pytest.mark.parametrize(
    "more",
    [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}, {"stop": "Elm"}, {"response_format": SCHEMA}, {"max_tokens": 1}],
    ids=str,
)
def test_chats(server: Server, more: dict[str, Any]) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        body = http.post("/v1/chat/completions", json=CHAT | more).json()
        check(ChatCompletion, body)
        assert set(body["choices"][0]) == {"index", "message", "logprobs", "finish_reason"}
        streamed = events(http.post("/v1/chat/completions", json=CHAT | more | {"stream": True}))
        for chunk in streamed:
            check(ChatCompletionChunk, chunk)
        assert (
            "".join(c["choices"][0]["delta"].get("content", "") for c in streamed if c["choices"][0]["index"] == 0)
            == (body["choices"][0]["message"]["content"])
        )


@pytest.mark.parametrize("more", [{}, {"n": 2}, {"logprobs": 2}, {"echo": True}, {"max_tokens": 0}], ids=str)
def test_completions(server: Server, more: dict[str, Any]) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        check(Completion, http.post("/v1/completions", json=PLAIN | more).json())
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        for chunk in events(http.post("/v1/completions", json=PLAIN | more | usage)):
            for choice in chunk["choices"]:
                # OpenAI streams null here until the last chunk; its type has only the whole answer in mind.
                choice["finish_reason"] = choice["finish_reason"] or "stop"
            check(Completion, chunk)


def test_models(server: Server) -> None:
    body = httpx.get(f"{server.url}/v1/models", timeout=60).json()
    assert set(body) == {"object", "data"} and body["object"] == "list"
    for model in body["data"]:
        TypeAdapter(Model).validate_json(json.dumps(model), strict=True)
