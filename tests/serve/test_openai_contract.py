"""The endpoint through OpenAI's own client: what it answers, and how it refuses."""

import asyncio
import json
import os
import signal
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from altiplano.serve import messages as m
from altiplano.serve.engine_errors import EngineDiedError

from .conftest import Server

NOTE = [{"role": "user", "content": "Priya wants 3 melon pies at 14 Elm Street on Friday. Where?"}]


def ask(client: OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**({"model": "cria", "messages": NOTE, "temperature": 0, "max_tokens": 40} | more))


def test_a_chat_answer_has_openais_shape(client: OpenAI) -> None:
    answer = ask(client)
    assert answer.choices[0].message.content == "14 Elm Street"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.object == "chat.completion" and answer.model == "cria"


def test_a_stream_says_the_same_piece_by_piece(client: OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "14 Elm Street"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 2
    assert chunks[-1].usage.completion_tokens == ask(client).usage.completion_tokens


def test_stop_strings_end_an_answer_across_token_borders(client: OpenAI) -> None:
    answer = ask(client, stop=["m Str", "never"])
    assert answer.choices[0].message.content == "14 El"
    assert answer.choices[0].finish_reason == "stop"
    streamed = "".join(c.choices[0].delta.content or "" for c in ask(client, stop="m Str", stream=True))
    assert streamed == "14 El"


def test_length_seed_and_several_answers(client: OpenAI) -> None:
    assert ask(client, max_tokens=2).choices[0].finish_reason == "length"
    wild: dict[str, Any] = {"model": "cria", "prompt": [5, 6, 7], "temperature": 2.0, "seed": 3, "n": 3, "max_tokens": 12}
    first, second = client.completions.create(**wild), client.completions.create(**wild)
    said = [choice.text for choice in first.choices]
    assert said == [choice.text for choice in second.choices]
    assert len(said) == 3 and len(set(said)) == 3


def test_logprobs_of_chat_and_completion(client: OpenAI) -> None:
    content = ask(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert "".join(token.token for token in content) == "14 Elm Street"
    assert all(
        len(token.top_logprobs) == 2 and token.logprob == pytest.approx(token.top_logprobs[0].logprob) for token in content
    )
    completion = client.completions.create(model="cria", prompt="A note", max_tokens=3, temperature=0, logprobs=1)
    assert len(completion.choices[0].logprobs.token_logprobs) == 3


def test_completions_take_text_ids_and_lists(client: OpenAI, server: Server) -> None:
    begin = server.generator.tokenizer.token_to_id("<|begin_of_text|>")
    ids = [begin, *server.generator.tokenizer.encode("A note", add_special_tokens=False).ids]
    options: dict[str, Any] = {"model": "cria", "max_tokens": 5, "temperature": 0}
    text = client.completions.create(prompt="A note", **options).choices[0].text
    assert client.completions.create(prompt=ids, **options).choices[0].text == text
    assert [c.text for c in client.completions.create(prompt=["A note", "A note"], **options).choices] == [text, text]


def test_the_adapter_answers_under_its_name_and_alias(client: OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["cria", "orders-1", "champion"]
    tuned = ask(client, model="orders-1").choices[0].message.content
    assert tuned == ask(client, model="champion").choices[0].message.content
    assert tuned != ask(client).choices[0].message.content


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "orders-1"),
        ({"max_tokens": 5000}, openai.BadRequestError, "512"),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
        ({"n": 100}, openai.BadRequestError, "n:"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, openai.BadRequestError, "role"),
        ({"top_logprobs": 3}, openai.BadRequestError, "logprobs=true"),
        ({"stop": [""]}, openai.BadRequestError, "stop"),
        ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "99999"),
    ],
)
def test_wrong_requests_get_openais_error_object(
    client: OpenAI, change: dict[str, Any], error: type[openai.APIStatusError], words: str
) -> None:
    with pytest.raises(error) as caught:
        ask(client, **change)
    body = caught.value.response.json()["error"]
    assert words in body["message"] and set(body) == {"message", "type", "param", "code"}


def test_http_errors_have_the_same_shape(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for response, status in (
            (http.get("/nowhere"), 404),
            (http.get("/v1/chat/completions"), 405),
            (http.post("/v1/chat/completions", content=b"{"), 400),
            (http.post("/v1/chat/completions", content=b'{"model": "cria", "temperature": NaN}'), 400),
            (http.post("/v1/chat/completions", content=b"x" * (3 << 20)), 413),
        ):
            assert response.status_code == status
            assert response.json()["error"]["message"]
            assert response.headers["x-request-id"]


def test_unknown_fields_are_named_and_request_ids_come_back(server: Server) -> None:
    body = {"model": "cria", "messages": NOTE, "max_tokens": 2, "colour": "red", "best_of": 3}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers={"x-request-id": "mine"}, timeout=60)
    assert response.headers["x-altiplano-unknown-fields"] == "best_of,colour"
    assert response.headers["x-request-id"] == "mine"


def test_health_and_metrics(server: Server, client: OpenAI) -> None:
    ask(client)
    assert httpx.get(f"{server.url}/health", timeout=60).json() == {"status": "ok"}
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    assert "altiplano_generation_tokens" in text and 'route="/v1/chat/completions"' in text


def test_many_at_once_say_what_each_says_alone(server: Server) -> None:
    async def crowd() -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            bodies = [
                {
                    "model": "cria",
                    "messages": [{"role": "user", "content": f"Repeat: kite {i}"}],
                    "temperature": 0,
                    "max_tokens": 20,
                }
                for i in range(24)
            ]
            answers = await asyncio.gather(*(http.post("/v1/chat/completions", json=body) for body in bodies))
            return [answer.json()["choices"][0]["message"]["content"] for answer in answers]

    assert asyncio.run(crowd()) == [f"kite {i}" for i in range(24)]


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    async def leave() -> None:
        stream = server.generator.client.generate("leaver", [5, 6, 7], m.Sampling(max_tokens=400, ignore_eos=True))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]

    server.run(leave())
    # Commands are handled in order, so these counters come after the abort.
    stats = server.run(server.generator.client.stats())
    assert stats["num_running"] == stats["num_waiting"] == 0


def test_a_killed_engine_ends_requests_and_comes_back_with_its_adapters(server: Server, client: OpenAI) -> None:
    engine = server.generator.client
    stream = engine.generate("victim", [5, 6, 7], m.Sampling(max_tokens=400, ignore_eos=True))

    async def begun() -> None:
        await anext(stream)

    async def killed() -> None:
        with pytest.raises(EngineDiedError):
            async for _ in stream:
                pass

    async def back() -> None:
        await asyncio.wait_for(engine._ready.wait(), 120)

    restarts = engine.restarts
    with server.unending():
        server.run(begun())
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        server.run(killed())
    server.run(back())
    assert engine.restarts == restarts + 1
    assert ask(client).choices[0].message.content == "14 Elm Street"
    assert ask(client, model="champion").choices[0].finish_reason in ("stop", "length")


def test_events_end_with_done(server: Server) -> None:
    body = {"model": "cria", "messages": NOTE, "max_tokens": 3, "stream": True}
    lines = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: ")) for line in lines[:-1])
