"""Routes for who watches: Prometheus's metrics, and what each key has used."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from altiplano.serve.call import current_call
from altiplano.serve.cost import report
from altiplano.serve.engine_client import EngineDiedError
from altiplano.serve.errors import ApiError
from altiplano.serve.generation import Generator
from altiplano.serve.governance import Governance
from altiplano.serve.keys import Scope

# Scrapers give up after ten seconds: an engine that hangs must not take the front end's own numbers with it.
STATS_TIMEOUT_S = 2.0


def add_observability(app: FastAPI, governance: Governance, find: Callable[[], Generator]) -> None:
    """Add /metrics and /v1/usage to `app`. `find` raises ApiError while the engine starts."""
    add_metrics(app, governance, find)

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
        stats, restarts = await _engine(find)
        governance.metrics.set_engine(stats, restarts)
        return Response(governance.metrics.render(), media_type=CONTENT_TYPE_LATEST)


async def _engine(find: Callable[[], Generator]) -> tuple[dict[str, float] | None, int]:
    """(counters or None, restarts) of the engine."""
    try:
        client = find().client
    except ApiError:
        return None, 0
    try:
        return await client.stats(STATS_TIMEOUT_S), client.restarts
    except (TimeoutError, EngineDiedError):
        return None, client.restarts
