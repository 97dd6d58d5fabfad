"""Sleep of an endpoint's engines, over HTTP under vLLM's paths: all replicas fall asleep and wake up together.

Asleep, an engine has given its memory back and its process lives: health checks succeed, readiness and requests get 503. A replica
that is started meanwhile is awake.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from altiplano.serve.engine_client import EngineClient
from altiplano.serve.engine_errors import EngineDiedError, RefusedError
from altiplano.serve.errors import ApiError
from altiplano.serve.openapi import answers, query_of

LEVELS = ("1", "2")
MODES = ("wait", "abort")
FIELDS = ("is_sleeping", "replicas")


class Sleeping:
    """The sleep of this replica's engine. `replica` names it; `gather` calls a method of this class on all replicas that answer."""

    def __init__(self, replica: str, client: EngineClient) -> None:
        self._replica, self._client = replica, client
        self.gather: Callable[..., Awaitable[list[dict[str, Any]]]] | None = None

    async def told(self) -> dict[str, Any]:
        """{"replica", "is_sleeping", "level"}."""
        level = self._client.sleep.level
        return {"replica": self._replica, "is_sleeping": level > 0, "level": level}

    async def sleep(self, level: int, mode: str | None) -> dict[str, Any]:
        """What `told` says then, and under "error" why it does not sleep, under "fresh" whether it was awake before."""
        fresh = not self._client.sleep.level
        return await self._tried(self._client.sleep.begin(level, mode)) | {"fresh": fresh}

    async def wake_up(self) -> dict[str, Any]:
        """What `told` says then, and under "error" why it does not wake up."""
        return await self._tried(self._client.sleep.end())

    async def everywhere(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """What a method of this class says on each replica."""
        return [await self.turn(method, *args)] if self.gather is None else await self.gather(method, *args)

    async def sleep_everywhere(self, level: int, mode: str | None) -> list[dict[str, Any]]:
        """What `sleep` says on each replica; where it has failed on one, the others are woken up again."""
        told = await self.everywhere("sleep", level, mode)
        if any(replica["error"] for replica in told) and any(replica["fresh"] and not replica["error"] for replica in told):
            # Half an endpoint would be the worst of both.
            await self.everywhere("wake_up")
        return told

    async def turn(self, method: str, *args: Any) -> dict[str, Any]:
        """Call a method of this class by its name: sleep, wake_up or told."""
        methods: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
            "sleep": self.sleep,
            "wake_up": self.wake_up,
            "told": self.told,
        }
        return await methods[method](*args)

    async def _tried(self, change: Awaitable[None]) -> dict[str, Any]:
        error: str | None = None
        try:
            await change
        except (RefusedError, EngineDiedError) as refused:
            error = str(refused)
        except TimeoutError:
            error = "the engine did not get there in time"
        return await self.told() | {"error": error}


def add_sleeping(app: FastAPI, find: Callable[[], Sleeping]) -> None:
    """Add /sleep, /wake_up and /is_sleeping to `app`. `find` raises ApiError while the endpoint starts."""

    query = query_of(level={"enum": list(LEVELS), "default": LEVELS[0]}, mode={"enum": list(MODES)})

    @app.post("/sleep", openapi_extra=query, responses=answers(*FIELDS))
    async def sleep(request: Request) -> Response:
        """Give the engines' memory back until /wake_up. `level`: 1 keeps the weights in host memory, 2 loads them again. `mode`: what
        becomes of answers that are under way, `wait` or `abort`; without it they forbid it."""
        level, mode = _asked(request, "level", LEVELS) or LEVELS[0], _asked(request, "mode", MODES)
        sleeping = find()
        return _answer(await _to_the_end(sleeping.sleep_everywhere(int(level), mode)))

    @app.post("/wake_up", responses=answers(*FIELDS))
    async def wake_up(request: Request) -> Response:
        """Take the memory again, and requests."""
        _asked(request, "tags", ())
        return _answer(await _to_the_end(find().everywhere("wake_up")))

    @app.get("/is_sleeping", responses=answers(*FIELDS))
    async def is_sleeping() -> Response:
        """Whether the engines sleep, all of them, and each."""
        return _answer(await find().everywhere("told"))


# The loop itself would forget tasks that nobody waits for any more.
_CHANGES = set[asyncio.Task[list[dict[str, Any]]]]()


async def _to_the_end(change: Coroutine[Any, Any, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Wait for a change that does not end in the middle when who asked leaves."""
    # In a context of its own: Ray Serve cancels the calls that a request has made to other replicas when it cancels the request.
    task = asyncio.create_task(change, context=Context())
    _CHANGES.add(task)
    task.add_done_callback(_CHANGES.discard)
    return await asyncio.shield(task)


def _answer(told: list[dict[str, Any]]) -> JSONResponse:
    """
    Raises:
        ApiError: 409, the first replica's reason not to do what was asked; 503, nobody has answered.
    """
    if not told:
        raise ApiError(503, "no replica has answered in time: ask /is_sleeping what has become of it", code="no_answer")
    failed = next((replica for replica in told if replica.get("error")), None)
    if failed is not None:
        where = "" if len(told) == 1 else f" (replica {failed['replica']} of {len(told)})"
        raise ApiError(409, f"{failed['error']}{where}", code="sleep_refused")
    replicas = [{name: replica[name] for name in ("replica", "is_sleeping", "level")} for replica in told]
    return JSONResponse({"is_sleeping": all(replica["is_sleeping"] for replica in told), "replicas": replicas})


def _asked(request: Request, name: str, values: tuple[str, ...]) -> str | None:
    """
    Raises:
        ApiError: 400, a value that nobody knows.
    """
    found = request.query_params.get(name)
    if found is None or found in values:
        return found
    use = f"use one of {', '.join(values)}, or leave it out" if values else "leave it out, everything wakes up together"
    raise ApiError(400, f"{name}={found[:20]!r} is not known here: {use}", param=name)
