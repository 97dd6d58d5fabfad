"""The HTTP application: routes, limits, errors."""

import json
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from altiplano import __version__
from altiplano.serve.engine_client import EngineDiedError, RefusedError
from altiplano.serve.errors import ApiError
from altiplano.serve.generation import Generator
from altiplano.serve.protocol import ChatRequest, CompletionRequest
from altiplano.serve.responses import as_api_error, events, whole

UNKNOWN_FIELDS = "x-altiplano-unknown-fields"
HEALTH_TIMEOUT_S = 10.0
T = TypeVar("T", bound=BaseModel)


class _Metrics:
    """Prometheus metrics of one front end."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("altiplano_requests", "HTTP requests", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "altiplano_request_seconds", "Time to the last byte of a response's head", ["route"], registry=self.registry
        )
        self.engine = {
            name: Gauge(f"altiplano_{name}", text, registry=self.registry)
            for name, text in {
                "num_running": "Requests in the engine",
                "num_waiting": "Requests waiting for the engine",
                "kv_cache_usage": "Share of KV pages in use",
                "prompt_tokens": "Prompt tokens so far",
                "generation_tokens": "Generated tokens so far",
                "cached_tokens": "Prompt tokens found in the prefix cache so far",
                "preemptions": "Preempted requests so far",
            }.items()
        }


def create_app(make_generator: Callable[[], Generator], max_body_bytes: int = 2 << 20) -> FastAPI:
    """The application. `make_generator` is called per request, because Ray Serve makes the application before the engine."""
    app = FastAPI(title="Altiplano", version=__version__, docs_url=None, redoc_url=None)
    metrics = _Metrics()

    @app.middleware("http")
    async def frame(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        started = time.perf_counter()
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > max_body_bytes:
            response: Response = ApiError(413, f"the body has {length} bytes, more than {max_body_bytes}: shorten it").response()
        else:
            response = await call_next(request)
        response.headers["x-request-id"] = request.headers.get("x-request-id", uuid.uuid4().hex)[:128]
        route = getattr(request.scope.get("route"), "path", "unknown")
        metrics.requests.labels(route, response.status_code).inc()
        metrics.seconds.labels(route).observe(time.perf_counter() - started)
        return response

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return _first_problem(error.errors()).response()

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        generator, body = make_generator(), await _body(request, ChatRequest)
        return await _answer(generator, body, [generator.chat_prompt(body)])

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        generator, body = make_generator(), await _body(request, CompletionRequest)
        return await _answer(generator, body, generator.completion_prompts(body))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        generator = make_generator()
        entries = [{"id": name, "object": "model", "created": 0, "owned_by": "altiplano"} for name in generator.model_names()]
        return {"object": "list", "data": entries}

    @app.get("/health")
    async def health() -> Response:
        """200 while the engine answers within seconds."""
        try:
            await make_generator().client.stats(HEALTH_TIMEOUT_S)
        except (TimeoutError, EngineDiedError) as error:
            return ApiError(503, f"the engine does not answer ({error})", retry_after=2).response()
        return JSONResponse({"status": "ok"})

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics")
    async def prometheus() -> Response:
        try:
            stats = await make_generator().client.stats(HEALTH_TIMEOUT_S)
        except (TimeoutError, EngineDiedError):
            stats = {}
        for name, gauge in metrics.engine.items():
            if name in stats:
                gauge.set(stats[name])
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _answer(generator: Generator, body: ChatRequest | CompletionRequest, prompts: list[list[int]]) -> Response:
    # What would be refused is refused before the first byte, so that the status can say so.
    generator.adapter_of(body.model)
    for prompt in prompts:
        generator.sampling(body, len(prompt))
    headers = {UNKNOWN_FIELDS: ",".join(body.unknown)} if body.unknown else {}
    if body.stream:
        return StreamingResponse(events(generator, body, prompts), media_type="text/event-stream", headers=headers)
    try:
        return JSONResponse(await whole(generator, body, prompts), headers=headers)
    except (RefusedError, EngineDiedError) as error:
        raise as_api_error(error) from error


async def _body(request: Request, kind: type[T]) -> T:
    """The checked body. NaN and Infinity, which Python's JSON would take, are refused."""
    try:
        values = json.loads(await request.body(), parse_constant=_no_constants)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON ({error})") from error
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _first_problem(error.errors()) from error


def _no_constants(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _first_problem(problems: Any) -> ApiError:
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])
    return ApiError(
        400,
        f"{where}: {first['msg'].removeprefix('Value error, ')}" if where else first["msg"].removeprefix("Value error, "),
        param=where or None,
    )
