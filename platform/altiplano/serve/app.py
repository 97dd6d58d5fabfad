"""The HTTP application: routes, limits, errors."""

import time
import uuid
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from altiplano import __version__
from altiplano.serve.api import add_api
from altiplano.serve.engine_client import EngineDiedError
from altiplano.serve.errors import ApiError
from altiplano.serve.generation import Generator

HEALTH_TIMEOUT_S = 10.0


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
        return ApiError.from_problems(error.errors()).response()

    add_api(app, make_generator)

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
