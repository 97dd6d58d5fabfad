"""The routes of OpenAI's API, and a few that its users know from vLLM."""

import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ValidationError

from altiplano.serve.call import current_call
from altiplano.serve.engine_client import EngineDiedError, RefusedError
from altiplano.serve.errors import ApiError
from altiplano.serve.generation import Generator
from altiplano.serve.protocol import ChatRequest, CompletionRequest
from altiplano.serve.responses import as_api_error, events, whole

UNKNOWN_FIELDS = "x-altiplano-unknown-fields"
STARTED = int(time.time())
T = TypeVar("T", bound=BaseModel)


def add_api(app: FastAPI, make_generator: Callable[[], Generator]) -> None:
    """Add the routes to `app`. `make_generator` is called per request and raises ApiError while there is none."""

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        generator, body = make_generator(), await read_body(request, ChatRequest)
        return await _answer(generator, body, [await generator.chat_prompt(body)])

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        generator, body = make_generator(), await read_body(request, CompletionRequest)
        return await _answer(generator, body, await generator.completion_prompts(body))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        generator = make_generator()
        return {"object": "list", "data": [_model(name) for name in generator.model_names()]}


async def read_body(request: Request, kind: type[T]) -> T:
    """The checked body. Strict JSON: NaN, Infinity and halves of characters, which Python's parser would take, are refused.

    Raises:
        ApiError: 400, with the first thing to change.
    """
    try:
        values = msgspec.json.decode(await request.body())
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply: flatten it") from error
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON ({error})") from error
    call = current_call()
    if call is not None:
        call.check_values(values)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ApiError.from_problems(error.errors()) from error


async def _answer(generator: Generator, body: ChatRequest | CompletionRequest, prompts: list[list[int]]) -> Response:
    # What would be refused is refused before the first byte, so that the status can say so.
    generator.adapter_of(body.model)
    for prompt in prompts:
        generator.sampling(body, len(prompt))
    call = current_call()
    if call is not None:
        for param, schema in body.schemas.items():
            call.check_schema(schema, param)
        call.admit(body.model, sum(map(len, prompts)), len(prompts) * body.n)
    headers = {UNKNOWN_FIELDS: _listed(body.unknown)} if body.unknown else {}
    try:
        if body.stream:
            stream = events(generator, body, prompts)
            first = await anext(stream)
            return StreamingResponse(_resumed(first, stream), media_type="text/event-stream", headers=headers)
        return JSONResponse(await whole(generator, body, prompts), headers=headers)
    except (RefusedError, EngineDiedError) as error:
        raise as_api_error(error) from error


async def _resumed(first: bytes, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for event in stream:
        yield event


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "altiplano"}


def _listed(names: list[str]) -> str:
    """Field names as a header may carry them."""
    return ",".join(quote(name, safe="") for name in names)[:1024]
