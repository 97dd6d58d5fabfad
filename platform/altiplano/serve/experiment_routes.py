"""The routes of a test: what users think, and what became of the requests of each arm."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from altiplano.serve.api import read_body
from altiplano.serve.experiment import Experiment, read_snapshots
from altiplano.serve.feedback import FeedbackRequest, accepted
from altiplano.serve.openapi import answers, body_of
from altiplano.serve.outcomes import merged


def add_experiment(app: FastAPI, find: Callable[[], Experiment]) -> None:
    """Add /v1/feedback and /v1/ab to `app`. `find` raises ApiError while the endpoint starts."""

    @app.post("/v1/feedback", openapi_extra=body_of(FeedbackRequest), responses=answers("object", "id", "score"))
    async def feedback(request: Request) -> Response:
        """Rate an answer by its id. Rating it again replaces the rating."""
        body = await read_body(request, FeedbackRequest)
        await find().rate(body)
        return JSONResponse(accepted(body))

    @app.get("/v1/ab", responses=answers("object", "test", "weights", "arms", "replicas"))
    async def ab() -> Response:
        """Sums of each arm, together and by replica; `altiplano ab report` compares them."""
        experiment = find()
        return JSONResponse(summary(experiment, await experiment.snapshots()))


def summary(experiment: Experiment, snapshots: list[dict[str, Any]]) -> dict[str, Any]:
    """The body of GET /v1/ab."""
    test, replicas = read_snapshots(snapshots)
    arms = experiment.arms
    return {
        "object": "ab",
        "test": test,
        "weights": None if arms is None else {arm: arms.share(arm) for arm in arms.weights},
        "arms": {arm: sums.to_json() for arm, sums in merged(replicas.values()).items()},
        "replicas": snapshots,
    }
