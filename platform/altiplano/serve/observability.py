"""Routes for who watches: Prometheus's metrics, the engine's last steps, and what each key has used."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from altiplano.engine.steps import REMEMBERED, Histogram
from altiplano.serve.call import current_call
from altiplano.serve.cost import report
from altiplano.serve.engine_errors import EngineDiedError
from altiplano.serve.errors import ApiError
from altiplano.serve.generation import Generator
from altiplano.serve.governance import Governance
from altiplano.serve.keys import Scope
from altiplano.serve.openapi import answers, query_of

# Scrapers give up after ten seconds: an engine that hangs must not take the front end's own numbers with it.
STATS_TIMEOUT_S = 2.0


def add_observability(app: FastAPI, governance: Governance, find: Callable[[], Generator]) -> None:
    """Add /metrics, /v1/engine/steps and /v1/usage to `app`. `find` raises ApiError while the engine starts."""
    add_metrics(app, governance, find)
    add_steps(app, find)

    @app.get("/v1/usage")
    async def usage() -> dict[str, Any]:
        """Tokens and cost by model, arm and key: a user's own, an administrator's everything."""
        call = current_call()
        own = call.key_id if call is not None and call.key is not None and call.key.scope is not Scope.admin else None
        return report(governance.ledger, governance.clock(), own)


def add_metrics(app: FastAPI, governance: Governance, find: Callable[[], Generator]) -> None:
    """Add /metrics to `app`."""

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Everything that is known; without the engine's own numbers while it does not answer."""
        governance.metrics.set_engine(*await _engine(find))
        return Response(governance.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def add_steps(app: FastAPI, find: Callable[[], Generator]) -> None:
    """Add /v1/engine/steps to `app`. `find` raises ApiError while the engine starts."""

    query = query_of(last={"type": "integer", "minimum": 1, "maximum": REMEMBERED, "default": 64})

    @app.get("/v1/engine/steps", openapi_extra=query, responses=answers("object", "data"))
    async def steps(request: Request) -> Response:
        """The last steps of this replica's engine, oldest first, as StepRecord names them; `last` (default 64) says how many."""
        text = request.query_params.get("last", "64")
        if not text.isascii() or not text.isdigit() or len(text) > 4 or not 1 <= int(text) <= REMEMBERED:
            raise ApiError(400, f"last: a number of steps from 1 to {REMEMBERED}, not {text[:20]!r}", param="last")
        try:
            found = await find().client.measure(int(text), STATS_TIMEOUT_S)
        except (TimeoutError, EngineDiedError) as error:
            raise ApiError(503, f"the engine does not answer ({error})", retry_after=2) from error
        return JSONResponse({"object": "list", "data": [asdict(record) for record in found.steps or ()]})


async def _engine(find: Callable[[], Generator]) -> tuple[dict[str, float] | None, int, dict[str, Histogram] | None, int, bool]:
    """(counters or None, restarts, histograms or None, level of sleep, whether it falls asleep or wakes up) of the engine."""
    try:
        client = find().client
    except ApiError:
        return None, 0, None, 0, False
    sleep = client.sleep
    try:
        found = await client.measure(0, STATS_TIMEOUT_S)
        return found.stats, client.restarts, found.histograms, sleep.level, sleep.turning
    except (TimeoutError, EngineDiedError):
        return None, client.restarts, None, sleep.level, sleep.turning
