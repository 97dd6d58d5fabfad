"""Answers that must be JSON, through OpenAI's own client: what a model of a few million parameters cannot do by itself."""

import asyncio
import json
import os
import signal
from typing import Any

import httpx
import jsonschema
import openai
import psutil
import pytest
from openai import OpenAI
from pydantic import BaseModel

from .conftest import Server

NOTE = [{"role": "user", "content": "Priya wants 3 melon pies at 14 Elm Street on Friday."}]
ORDER = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 1, "maximum": 99},
        "day": {"enum": ["Monday", "Friday"]},
    },
    "required": ["name", "count", "day"],
    "additionalProperties": False,
}


def follow(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "order", "schema": schema, "strict": True}}


def ask(client: OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**({"model": "cria", "messages": NOTE, "max_tokens": 60} | more))


def test_every_answer_follows_the_schema_however_wild_the_draw(client: OpenAI) -> None:
    answers = ask(client, response_format=follow(ORDER), n=6, temperature=2.0, seed=3).choices
    for choice in answers:
        jsonschema.validate(json.loads(choice.message.content), ORDER)
        assert choice.finish_reason == "stop"
    assert len({choice.message.content for choice in answers}) > 1


def test_a_stream_of_json_adds_up_and_ends(client: OpenAI) -> None:
    said = list(ask(client, response_format=follow(ORDER), temperature=0, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in said if chunk.choices)
    jsonschema.validate(json.loads(text), ORDER)
    assert text == ask(client, response_format=follow(ORDER), temperature=0).choices[0].message.content
    assert said[-1].usage.completion_tokens > 5


def test_the_client_parses_into_pydantic(client: OpenAI) -> None:
    class Order(BaseModel):
        count: int
        urgent: bool

    parsed = client.chat.completions.parse(model="cria", messages=NOTE, response_format=Order, temperature=0, max_tokens=40)  # type: ignore[arg-type]
    assert isinstance(parsed.choices[0].message.parsed, Order)


def test_json_object_and_completions(client: OpenAI) -> None:
    answer = ask(client, response_format={"type": "json_object"}, temperature=0).choices[0]
    assert answer.message.content.startswith("{") and answer.finish_reason in ("stop", "length")
    text = client.completions.create(
        model="cria", prompt="An order:", temperature=1.0, max_tokens=60, extra_body={"response_format": follow(ORDER)}
    )
    jsonschema.validate(json.loads(text.choices[0].text), ORDER)


def test_a_cut_answer_says_so(client: OpenAI) -> None:
    cut = ask(client, response_format=follow(ORDER), max_tokens=3).choices[0]
    assert cut.finish_reason == "length" and cut.message.content.startswith("{")


def test_structured_and_free_answers_share_steps(server: Server, client: OpenAI) -> None:
    async def crowd() -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            bodies: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": f"Repeat: kite {i}"}]} for i in range(8)]
            bodies += [{"messages": NOTE, "response_format": follow(ORDER)} for _ in range(8)]
            asked = [http.post("/v1/chat/completions", json=body | {"model": "cria", "temperature": 0}) for body in bodies]
            return [answer.json()["choices"][0]["message"]["content"] for answer in await asyncio.gather(*asked)]

    said = asyncio.run(crowd())
    assert said[:8] == [f"kite {i}" for i in range(8)]
    assert set(said[8:]) == {ask(client, response_format=follow(ORDER), temperature=0).choices[0].message.content}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "strin"}, "Invalid type"),
        ({"type": "object", "not": {}}, "not"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"$ref": "http://127.0.0.1:1/schema"}, "not fetch"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "5"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_cannot_be_followed_is_refused_before_the_first_byte(
    client: OpenAI, schema: dict[str, Any], words: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, response_format=follow(schema), stream=stream)
    assert words in caught.value.response.json()["error"]["message"]


def test_a_dead_grammar_process_costs_nothing_but_time(server: Server, client: OpenAI) -> None:
    def workers() -> list[int]:
        children = psutil.Process(server.generator.client.pid).children()
        return [child.pid for child in children if any("grammar_worker" in word for word in child.cmdline())]

    before = ask(client, response_format=follow(ORDER), temperature=0).choices[0].message.content
    (pid,) = workers()
    os.kill(pid, signal.SIGKILL)
    assert ask(client, response_format=follow(ORDER), temperature=0).choices[0].message.content == before
    assert workers() != [pid]
    assert server.generator.client.restarts == 0


def test_the_parts_of_response_format_must_fit(client: OpenAI) -> None:
    for wrong, words in (
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": follow({}), "extra_body": {"min_tokens": 5}}, "min_tokens"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            ask(client, **wrong)
