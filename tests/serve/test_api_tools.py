"""Tool calls in Llama 3.2's format: read from any text, forced on any model, and told back to it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI

from altiplano.serve.conversation import Message
from altiplano.serve.tools import CallReader

from .conftest import Server, settings

WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "La Paz"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "stop_all"}},
]
STRICT = [{"type": "function", "function": tool["function"] | {"strict": True}} for tool in TOOLS]  # type: ignore[operator]
ASKED = [{"role": "user", "content": "How is the weather?"}]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
NAMES = {"get_weather", "stop_all"}


@pytest.fixture(scope="module")
def server(adapter: Path) -> Iterator[Server]:
    """With room for what the template says about tools, in cria's small tokens."""
    made = Server(replace(settings(adapter), max_model_len=1536))
    yield made
    made.close()


def ask(client: OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(
        **({"model": "cria", "messages": ASKED, "tools": TOOLS, "temperature": 1.0, "seed": 5, "max_tokens": 60} | more)
    )


def read(*pieces: str) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls of a text that comes in `pieces`."""
    reader, content, calls = CallReader(NAMES), "", list[list[str]]()
    for delta in [*(reader.push(piece) for piece in pieces), reader.finish()]:
        content += delta.content
        for call in delta.calls:
            if "id" in call:
                assert call["index"] == len(calls)
                calls.append([call["function"]["name"], ""])
            calls[call["index"]][1] += call["function"]["arguments"]
    return content, [(name, arguments) for name, arguments in calls]


CALL = '{"name": "get_weather", "parameters": {"city": "Oslo {\\"x\\"} [", "days": [2, {"a": "}"}]}}'
PARAMETERS = CALL[len('{"name": "get_weather", "parameters": ') : -1]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (CALL, "", [("get_weather", PARAMETERS)]),
        (f"\n {CALL} ", "", [("get_weather", PARAMETERS)]),
        (f"{CALL}; {CALL}", "", [("get_weather", PARAMETERS)] * 2),
        ('{"type": "function", "name": "stop_all", "parameters": {}}', "", [("stop_all", "{}")]),
        ('{"parameters": {"a": 1}, "name": "stop_all"}', "", [("stop_all", '{"a": 1}')]),
        ('{"name": "stop_all", "arguments": {"a": ', "", [("stop_all", '{"a": ')]),
        ('{"name": "rm", "parameters": {}}', '{"name": "rm", "parameters": {}}', []),
        ('{"name": "stop_all"', '{"name": "stop_all"', []),
        ('{"answer": 42}', '{"answer": 42}', []),
        (f"I call {CALL}", f"I call {CALL}", []),
        ("It rains.", "It rains.", []),
        ("", "", []),
        ("{" * 300, "{" * 300, []),
    ],
)
def test_a_call_is_told_from_content(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(text) == (content, calls)


@given(st.sampled_from([CALL, f"{CALL};{CALL}", '{"a": 1}', "It {rains}.", '{"parameters": {}, "name": "stop_all"}']), st.data())
def test_where_the_pieces_end_does_not_matter(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(*pieces) == read(text)


@given(st.text('{}[]"\\:, nameprtsgwhoull_', max_size=80))
def test_no_text_is_lost_when_it_is_no_call(text: str) -> None:
    content, calls = read(text)
    assert calls or content == text


def test_the_named_tool_is_called_with_arguments_that_fit(client: OpenAI) -> None:
    for choice in ask(client, tool_choice=NAMED, n=4).choices:
        (call,) = choice.message.tool_calls
        assert call.function.name == "get_weather" and call.id.startswith("call_")
        jsonschema.validate(json.loads(call.function.arguments), WEATHER)
        assert choice.message.content is None and choice.finish_reason == "tool_calls"


def test_a_required_call_names_one_of_the_tools(client: OpenAI) -> None:
    for choice in ask(client, tool_choice="required", n=4, temperature=2.0).choices:
        (call,) = choice.message.tool_calls
        schema = WEATHER if call.function.name == "get_weather" else {"type": "object", "maxProperties": 0}
        jsonschema.validate(json.loads(call.function.arguments), schema)
        assert choice.finish_reason == "tool_calls"


def test_a_streamed_call_comes_in_pieces_of_one_call(client: OpenAI) -> None:
    whole = ask(client, tool_choice=NAMED).choices[0].message.tool_calls[0]
    chunks = list(ask(client, tool_choice=NAMED, stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert calls[0].function.name == "get_weather" and calls[0].id and calls[0].type == "function"
    assert all(call.index == 0 and call.id is None for call in calls[1:])
    assert "".join(call.function.arguments for call in calls) == whole.function.arguments
    assert len(calls) > 3 and chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_strict_tools_leave_the_choice_to_the_model(client: OpenAI, server: Server) -> None:
    """The first token decides: a brace begins a call that fits, anything else is an answer in words."""
    brace = server.generator.tokenizer.token_to_id("{")
    start = server.generator.tokenizer.token_to_id('{"')
    called = ask(client, tools=STRICT, logit_bias={str(start): 40}).choices[0]
    if called.message.tool_calls:
        jsonschema.validate(json.loads(called.message.tool_calls[0].function.arguments), WEATHER)
    spoken = ask(client, tools=STRICT, logit_bias={str(brace): -100, str(start): -100}).choices[0]
    assert called.finish_reason == "tool_calls" and spoken.message.tool_calls is None and spoken.message.content


def test_with_tool_choice_none_the_prompt_has_no_tools(client: OpenAI) -> None:
    with_tools, without = ask(client, max_tokens=2), ask(client, max_tokens=2, tool_choice="none")
    assert without.usage.prompt_tokens < with_tools.usage.prompt_tokens
    assert (
        without.usage.prompt_tokens
        == client.chat.completions.create(model="cria", messages=ASKED, max_tokens=2).usage.prompt_tokens
    )  # type: ignore[arg-type, union-attr]


def test_a_call_and_its_result_go_back_to_the_model(client: OpenAI, server: Server) -> None:
    message = ask(client, tool_choice=NAMED).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    answer = ask(client, messages=[*ASKED, message.model_dump(exclude_none=True), result])
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")
    text = server.generator.chat_text([Message.model_validate(m) for m in [*ASKED, message.model_dump(), result]], [])
    arguments = json.dumps(json.loads(message.tool_calls[0].function.arguments))
    assert f'{{"name": "get_weather", "parameters": {arguments}}}<|eot_id|>' in text
    assert text.index("ipython") < text.index("rain")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tools": []}, "tools"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "same name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "pattern"),
        ({"tools": [{"type": "retrieval"}]}, "function"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "object"),
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "fly"),
        ({"tool_choice": "sometimes"}, "auto"),
        ({"tools": None, "tool_choice": "required"}, "needs tools"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required", "extra_body": {"ignore_eos": True}}, "ignore_eos"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "["}}]}]},
            "JSON text",
        ),
        (
            {
                "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "x"}}}}}],
            },
            "Invalid type",
        ),
    ],
)
def test_tools_that_cannot_be_used_are_refused(client: OpenAI, change: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **change)
    assert words in caught.value.response.json()["error"]["message"]
