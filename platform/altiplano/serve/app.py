"""The HTTP application: routes, limits, errors."""

from collections.abc import Callable
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from altiplano import __version__, spec
from altiplano.serve.api import add_api
from altiplano.serve.call import current_call
from altiplano.serve.changes import add_changes
from altiplano.serve.connection import Connection
from altiplano.serve.engine_errors import EngineDiedError
from altiplano.serve.errors import ApiError
from altiplano.serve.experiment_routes import add_experiment
from altiplano.serve.forward import Forward
from altiplano.serve.gate import Gate
from altiplano.serve.generation import Generator
from altiplano.serve.governance import Governance
from altiplano.serve.observability import add_observability
from altiplano.serve.page import add_page
from altiplano.serve.replay import Replay
from altiplano.serve.routes import undeclared
from altiplano.serve.sleeping import add_sleeping

HEALTH_TIMEOUT_S = 10.0
T = TypeVar("T")


def create_app(make_generator: Callable[[], Generator], governance: Governance | None = None) -> FastAPI:
    """The application. `make_generator` is called per request: while the engine starts it raises ApiError.

    Without a governance of its own it has the defaults of the pipeline file's `serve`: no keys, this machine only.

    Raises:
        RuntimeError: a route that the table of routes does not have.
    """
    governance = governance or Governance.of(spec.Serve())
    app = FastAPI(title="Altiplano", version=__version__, docs_url=None, redoc_url=None)

    def weights_of(model: str) -> str | None:
        generator = make_generator()
        # While a model is tested every request is computed: answers from memory would make an arm look faster than it is.
        return None if generator.experiment.divides(model) else generator.weights_of(model)

    # The last one added is the outermost.
    app.add_middleware(Forward, find=lambda: _unless_refused(lambda: make_generator().experiment))
    app.add_middleware(Replay, governance=governance, weights_of=lambda model: _unless_refused(lambda: weights_of(model)))
    app.add_middleware(Connection, governance=governance)
    app.add_middleware(Gate, governance=governance)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        call = current_call()
        if call is not None:
            call.error = error.code
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
        """200 while the engine answers within seconds, or loads or copies weights to fall asleep or to wake up."""
        client = make_generator().client
        try:
            if not client.sleep.turning:
                await client.stats(HEALTH_TIMEOUT_S)
        except (TimeoutError, EngineDiedError) as error:
            return ApiError(503, f"the engine does not answer ({error})", retry_after=2).response()
        return JSONResponse({"status": "ok"})

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    add_observability(app, governance, make_generator)
    add_experiment(app, lambda: make_generator().experiment)
    add_changes(app, lambda: make_generator().changes)
    add_sleeping(app, lambda: make_generator().sleeping)
    add_page(app)
    missing = undeclared(app.routes)
    if missing:
        raise RuntimeError(f"routes without a scope: add {', '.join(missing)} to TABLE in serve/routes.py")
    return app


def _unless_refused(look: Callable[[], T]) -> T | None:
    """What `look` finds; None while the engine starts, and for what it does not have."""
    try:
        return look()
    except ApiError:
        return None
