"""What replicas made of a change of `user_config`, for who made it.

A replica that refuses a change goes on with what it has: Ray Serve would replace it, and the next one could not start at all. So Serve
reports the change as live either way, and the replicas are asked themselves. Who makes a change gives it a random name; who knows the name
may ask what became of it, without a key.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from altiplano.serve.errors import ApiError
from altiplano.serve.openapi import answers

REMEMBERED = 16


class Changes:
    """The latest changes that this replica has seen. `replica` names it."""

    def __init__(self, replica: str) -> None:
        # Asks all replicas; where there is one process only, nobody needs to.
        self.gather: Callable[[str], Awaitable[list[dict[str, Any]]]] | None = None
        self._replica = replica
        self._refusals: OrderedDict[str, str | None] = OrderedDict()

    def note(self, change: str | None, refusal: str | None) -> None:
        """A change was taken, or refused for a reason."""
        if change is not None:
            self._refusals[change] = refusal
            if len(self._refusals) > REMEMBERED:
                self._refusals.popitem(last=False)

    def told(self, change: str) -> dict[str, Any]:
        """{"replica", "taken", "reason"}; `taken` is None while nothing is known."""
        known = change in self._refusals
        reason = self._refusals.get(change)
        return {"replica": self._replica, "taken": reason is None if known else None, "reason": reason}

    async def everywhere(self, change: str) -> list[dict[str, Any]]:
        """What all replicas tell that answer. Nobody is asked about a change that this replica does not know.

        Raises:
            ApiError: 404, an unknown change.
        """
        own = self.told(change)
        if own["taken"] is None:
            raise ApiError(404, "this replica knows no such change of its user_config", code="unknown_change")
        return [own] if self.gather is None else await self.gather(change)


def add_changes(app: FastAPI, find: Callable[[], Changes]) -> None:
    """Add /v1/changes to `app`. `find` raises ApiError while the endpoint starts."""

    @app.get("/v1/changes/{change}", responses=answers("object", "replicas"))
    async def change(change: str) -> Response:
        """Whether each replica has taken a change of the user_config, by the name that its maker gave it."""
        return JSONResponse({"object": "change", "replicas": await find().everywhere(change)})
