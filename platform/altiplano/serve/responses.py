"""OpenAI's response shapes, whole and streamed."""

import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from altiplano import __version__
from altiplano.serve.call import current_call
from altiplano.serve.choices import ChatChoice, CompletionChoice
from altiplano.serve.engine_errors import EngineDiedError, RefusedError
from altiplano.serve.errors import ApiError
from altiplano.serve.generation import Generator
from altiplano.serve.protocol import ChatRequest, CompletionRequest
from altiplano.serve.usage import Usage

Request = ChatRequest | CompletionRequest
DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


async def whole(generator: Generator, request: Request, prompts: list[list[int]]) -> dict[str, Any]:
    """The body of an answer that is not streamed.

    Raises:
        RefusedError, EngineDiedError: see EngineClient.generate.
    """
    usage, choices = Usage(), _choices(generator, request, prompts)
    chunks: list[list[dict[str, Any]]] = [[] for _ in choices]
    async for piece in generator.stream(request, prompts, usage):
        chunk = choices[piece.index].chunk(piece)
        if chunk is not None:
            chunks[piece.index].append(chunk)
    done = [choice.whole(said) for choice, said in zip(choices, chunks, strict=True)]
    return _frame(generator, request, _kind(request)) | {"choices": done, "usage": usage.body()}


async def events(generator: Generator, request: Request, prompts: list[list[int]]) -> AsyncIterator[bytes]:
    """Server-sent events of a streamed answer. A failure on the way is an event of its own, then the end.

    Raises:
        RefusedError, EngineDiedError: nothing was said yet, so the status can still say it.
    """
    usage, choices = Usage(), _choices(generator, request, prompts)
    frame = _frame(generator, request, _kind(request) + (".chunk" if isinstance(request, ChatRequest) else ""))
    with_usage = request.stream_options is not None and request.stream_options.include_usage
    empty: dict[str, Any] = {"usage": None} if with_usage else {}
    begun = False
    try:
        async for piece in generator.stream(request, prompts, usage):
            if not begun:
                begun = True
                for opening in filter(None, [choice.opening() for choice in choices]):
                    yield _event(frame | {"choices": [opening]} | empty)
            chunk = choices[piece.index].chunk(piece)
            if chunk is not None:
                yield _event(frame | {"choices": [chunk]} | empty)
        last = _event(frame | {"choices": [], "usage": usage.body()}) if with_usage else b""
    except (EngineDiedError, RefusedError, ApiError) as error:
        if not begun:
            raise
        failure, call = as_api_error(error), current_call()
        if call is not None:
            call.error = failure.code or "stream_failed"  # the status was sent long ago: the log has to say it
        last = _event(failure.body())
    yield last + DONE


class EventStream(Response):
    """Server-sent events as they come. The last one closes the answer, so that it costs no message of its own.

    Nothing here looks whether the client is still there: `Connection` does, and cancels.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        self._events = events
        self.status_code, self.background = 200, None
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = b""
        async for event in self._events:
            if event.endswith(DONE):
                last = event
            else:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": last, "more_body": False})


def as_api_error(error: Exception) -> ApiError:
    """What the client is told about a failure of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RefusedError):
        return ApiError(400, str(error))
    return ApiError(503, str(error), code="engine_restarting", retry_after=2)


def _choices(generator: Generator, request: Request, prompts: list[list[int]]) -> list[ChatChoice | CompletionChoice]:
    """One per answer, in the order of their indices."""
    if isinstance(request, ChatRequest):
        return [ChatChoice(generator, request, index) for index in range(request.n)]
    return [CompletionChoice(generator, request, index, prompts[index // request.n]) for index in range(len(prompts) * request.n)]


def _frame(generator: Generator, request: Request, kind: str) -> dict[str, Any]:
    prefix = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
    return {
        "id": generator.experiment.answer_id(prefix),
        "object": kind,
        "created": int(time.time()),
        "model": request.model,
        "system_fingerprint": f"altiplano-{__version__}",
    }


def _kind(request: Request) -> str:
    return "chat.completion" if isinstance(request, ChatRequest) else "text_completion"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + _encode(body) + b"\n\n"
