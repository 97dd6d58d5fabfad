"""OpenAI's response shapes, whole and streamed."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from altiplano.serve.engine_client import EngineDiedError, RefusedError
from altiplano.serve.errors import ApiError
from altiplano.serve.generation import Generator, Piece, Usage
from altiplano.serve.protocol import ChatRequest, CompletionRequest

Request = ChatRequest | CompletionRequest
DONE = "data: [DONE]\n\n"


async def whole(generator: Generator, request: Request, prompts: list[list[int]]) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    usage = Usage()
    count = len(prompts) * request.n
    texts, reasons, pieces = [""] * count, ["stop"] * count, [list[Piece]() for _ in range(count)]
    async for piece in generator.stream(request, prompts, usage):
        texts[piece.index] += piece.text
        pieces[piece.index].append(piece)
        reasons[piece.index] = piece.finish_reason or reasons[piece.index]
    choices = []
    for index in range(count):
        choice: dict[str, Any] = {
            "index": index,
            "finish_reason": reasons[index],
            "logprobs": _logprobs(generator, request, pieces[index]),
        }
        if isinstance(request, ChatRequest):
            choice["message"] = {"role": "assistant", "content": texts[index], "refusal": None}
        else:
            choice["text"] = texts[index]
        choices.append(choice)
    return _frame(request, _kind(request)) | {"choices": choices, "usage": usage.body()}


async def events(generator: Generator, request: Request, prompts: list[list[int]]) -> AsyncIterator[str]:
    """Server-sent events of a streamed answer. A failure on the way is an event of its own, then the end."""
    usage, frame = Usage(), _frame(request, _kind(request) + (".chunk" if isinstance(request, ChatRequest) else ""))
    with_usage = request.stream_options is not None and request.stream_options.include_usage
    empty: dict[str, Any] = {"usage": None} if with_usage else {}
    try:
        if isinstance(request, ChatRequest):
            for index in range(request.n):
                first = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
                yield _event(frame | {"choices": [first]} | empty)
        async for piece in generator.stream(request, prompts, usage):
            if piece.text or piece.finish_reason or (piece.tokens and piece.tokens[0].logprob is not None):
                yield _event(frame | {"choices": [_chunk(generator, request, piece)]} | empty)
        if with_usage:
            yield _event(frame | {"choices": [], "usage": usage.body()})
    except (EngineDiedError, RefusedError, ApiError) as error:
        yield _event(as_api_error(error).body())
    yield DONE


def as_api_error(error: Exception) -> ApiError:
    """What the client is told about a failure of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RefusedError):
        return ApiError(400, str(error))
    return ApiError(503, str(error), code="engine_restarting", retry_after=2)


def _chunk(generator: Generator, request: Request, piece: Piece) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": piece.index,
        "logprobs": _logprobs(generator, request, [piece]),
        "finish_reason": piece.finish_reason,
    }
    if isinstance(request, ChatRequest):
        choice["delta"] = {"content": piece.text} if piece.text else {}
    else:
        choice["text"] = piece.text
    return choice


def _logprobs(generator: Generator, request: Request, pieces: list[Piece]) -> dict[str, Any] | None:
    tokens = [token for piece in pieces for token in piece.tokens if token.logprob is not None]
    wanted = request.logprobs if isinstance(request, ChatRequest) else request.logprobs is not None
    if not wanted:
        return None

    def decode(token_id: int | None) -> str:
        assert token_id is not None
        return generator.tokenizer.decode([token_id], skip_special_tokens=False)

    def entry(token_id: int | None, logprob: float | None) -> dict[str, Any]:
        return {"token": decode(token_id), "logprob": logprob, "bytes": list(decode(token_id).encode())}

    if isinstance(request, ChatRequest):
        content = [entry(t.token_id, t.logprob) | {"top_logprobs": [entry(i, p) for i, p in t.top]} for t in tokens]
        return {"content": content, "refusal": None}
    return {
        "tokens": [decode(t.token_id) for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [{decode(i): p for i, p in t.top} for t in tokens],
        "text_offset": [],
    }


def _frame(request: Request, kind: str) -> dict[str, Any]:
    prefix = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": request.model}


def _kind(request: Request) -> str:
    return "chat.completion" if isinstance(request, ChatRequest) else "text_completion"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"
