"""The routes of OpenAI's API, and a few that its users know from vLLM."""

import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from altiplano.serve.call import current_call
from altiplano.serve.engine_errors import EngineDiedError, RefusedError
from altiplano.serve.errors import ApiError
from altiplano.serve.experiment import SESSION_HEADER
from altiplano.serve.feedback import FeedbackRequest
from altiplano.serve.generation import Generator
from altiplano.serve.openapi import answers, body_of, describe
from altiplano.serve.plain import DetokenizeRequest, GenerateRequest, TokenizeRequest, generated
from altiplano.serve.protocol import ChatRequest, CompletionRequest
from altiplano.serve.responses import EventStream, as_api_error, events, whole

UNKNOWN_FIELDS = "x-altiplano-unknown-fields"
ANSWER = ("id", "object", "created", "model", "choices", "usage")
STARTED = int(time.time())
T = TypeVar("T", bound=BaseModel)


def add_api(app: FastAPI, make_generator: Callable[[], Generator]) -> None:
    """Add the routes to `app`. `make_generator` is called per request and raises ApiError while there is none."""

    @app.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest), responses=answers(*ANSWER, streamed=True))
    async def chat_completions(request: Request) -> Response:
        generator, body = make_generator(), await read_body(request, ChatRequest)
        return await _answer(request, generator, body, [await generator.chat_prompt(body)])

    @app.post("/v1/completions", openapi_extra=body_of(CompletionRequest), responses=answers(*ANSWER, streamed=True))
    async def completions(request: Request) -> Response:
        generator, body = make_generator(), await read_body(request, CompletionRequest)
        return await _answer(request, generator, body, await generator.completion_prompts(body))

    @app.post("/generate", openapi_extra=body_of(GenerateRequest), responses=answers("text", "usage", streamed=True))
    async def generate(request: Request) -> Response:
        """The text alone; a stream has the events of /v1/completions."""
        generator, body = make_generator(), await read_body(request, GenerateRequest)
        body.model = body.model or generator.settings.served_model_name
        return await _answer(request, generator, body, await generator.completion_prompts(body), generated)

    @app.get("/v1/models", responses=answers("object", "data"))
    async def models() -> Response:
        generator = make_generator()
        return JSONResponse({"object": "list", "data": [_model(generator, name) for name in generator.model_names()]})

    @app.get("/v1/models/{model:path}", responses=answers("id", "object"))
    async def model(model: str) -> Response:
        generator = make_generator()
        generator.adapter_of(model)
        return JSONResponse(_model(generator, model))

    @app.post("/tokenize", openapi_extra=body_of(TokenizeRequest), responses=answers("count", "max_model_len", "tokens"))
    async def tokenize(request: Request) -> Response:
        generator, body = make_generator(), await read_body(request, TokenizeRequest)
        ids = await _token_ids(generator, body)
        names = [generator.vocabulary.name_of(token_id) for token_id in ids] if body.return_token_strs else None
        limit = generator.settings.max_model_len
        return JSONResponse({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": names})

    @app.post("/detokenize", openapi_extra=body_of(DetokenizeRequest), responses=answers("prompt"))
    async def detokenize(request: Request) -> Response:
        generator, body = make_generator(), await read_body(request, DetokenizeRequest)
        generator.check_ids(body.tokens, "tokens")
        return JSONResponse({"prompt": await generator.decode(body.tokens)})

    @app.get("/ready", responses=answers("status"))
    async def ready() -> Response:
        """200 while requests can be taken: the engine has its model in memory, and is awake."""
        client = make_generator().client
        client.sleep.check_awake()
        if not client.ready:
            raise ApiError(503, "the engine is starting: try again in a moment", code="engine_starting", retry_after=2)
        return JSONResponse({"status": "ready"})

    describe(app, [ChatRequest, CompletionRequest, GenerateRequest, TokenizeRequest, DetokenizeRequest, FeedbackRequest])


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


async def _answer(
    request: Request,
    generator: Generator,
    body: ChatRequest | CompletionRequest,
    prompts: list[list[int]],
    shaped: Callable[[dict[str, Any]], dict[str, Any]] = lambda answer: answer,
) -> Response:
    # What would be refused is refused before the first byte, so that the status can say so.
    generator.client.sleep.check_awake()
    generator.adapter_of(body.model)
    for prompt in prompts:
        generator.sampling(body, len(prompt))
    call = current_call()
    if call is not None:
        for param, schema in body.schemas.items():
            call.check_schema(schema, param)
        call.admit(body.model, sum(map(len, prompts)), len(prompts) * body.n)
    headers = {UNKNOWN_FIELDS: _listed(body.unknown)} if body.unknown else {}
    experiment, refusable = generator.experiment, body.grammar is not None
    if call is not None:
        session = request.headers.get(SESSION_HEADER)
        headers |= experiment.enter(call, body.model, session, body.user or body.safety_identifier)
    try:
        if body.stream:
            stream = experiment.streamed(events(generator, body, prompts), refusable=refusable)
            first = await anext(stream)
            return EventStream(_resumed(first, stream), headers)
        return JSONResponse(shaped(await experiment.whole(whole(generator, body, prompts), refusable=refusable)), headers=headers)
    except (ApiError, RefusedError, EngineDiedError) as error:
        # Who is told that a test's arm has failed is told which arm it was.
        failed = error if isinstance(error, ApiError) else as_api_error(error)
        failed.headers = headers
        raise failed from error


async def _resumed(first: bytes, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for event in stream:
        yield event


async def _token_ids(generator: Generator, body: TokenizeRequest) -> list[int]:
    if body.model is not None:
        generator.adapter_of(body.model)
    if body.messages is not None:
        functions = [tool.function for tool in body.tools or ()]
        text = generator.chat_text(body.messages, functions, add_generation_prompt=body.add_generation_prompt)
        return await generator.encode(text, "messages")
    begin = [generator.begin_token_id] if body.add_special_tokens else []
    return begin + await generator.encode(body.prompt or "", "prompt")


def _model(generator: Generator, name: str) -> dict[str, Any]:
    """`root` is what answers under the name: the base, or an adapter, whose `parent` is the base (as in vLLM)."""
    base, root = generator.settings.served_model_name, generator.aliases.get(name, name)
    return {
        "id": name,
        "object": "model",
        "created": STARTED,
        "owned_by": "altiplano",
        "root": root,
        "parent": None if root == base else base,
        "max_model_len": generator.settings.max_model_len,
    }


def _listed(names: list[str]) -> str:
    """Field names as a header may carry them."""
    return ",".join(quote(name, safe="") for name in names)[:1024]
