"""A request whose arm has another base model: the replica that gets it lets the other Serve application answer, one hop further.

The request goes on as it came, and the other application runs the whole of its own front end for it: keys, limits, prompt, engine,
counting. What comes back is passed on part by part; a client that leaves is gone over there too. Requests of the other arms pay nothing
but the look at their body, and that only while such a test runs.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from altiplano.serve.call import Call, current_call
from altiplano.serve.errors import ApiError

if TYPE_CHECKING:
    from altiplano.serve.experiment import Experiment

# Headers of an answer that are its own. The rest the replica sets that speaks to the client.
KEPT = (b"content-type", b"retry-after", b"x-altiplano-arm", b"x-altiplano-unknown-fields")
STREAM = b"text/event-stream"
SESSION_HEADER, REQUEST_ID = b"x-session-id", b"x-request-id"

# (status, headers) first, then parts of the body. Everything is something that Ray carries without our classes.
Frame = tuple[int, list[tuple[bytes, bytes]]] | bytes


@dataclass(frozen=True)
class Forwarded:
    """One request, whole."""

    method: str
    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes


class _Asked(msgspec.Struct):
    """What of a body chooses the arm."""

    model: str = ""
    user: str | None = None
    safety_identifier: str | None = None


class Forward:
    """The innermost layer of an application. `find` is its experiment; None while the engine starts."""

    def __init__(self, app: ASGIApp, find: "Callable[[], Experiment | None]") -> None:
        self._app, self._find = app, find

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = current_call()
        experiment = None if call is None or call.entry is None or not call.entry.metered else self._find()
        if call is None or experiment is None or experiment.arms is None or not experiment.arms.elsewhere:
            await self._app(scope, receive, send)
            return
        message = await receive()  # the whole body: Connection gives it in one piece
        asked = _asked(message.get("body", b""))
        headers = dict(scope["headers"])
        session = headers.get(SESSION_HEADER, b"").decode("latin-1")
        application = experiment.application_for(call, asked.model, session, asked.user or asked.safety_identifier)
        if application is not None:
            given = [(name, value) for name, value in scope["headers"] if name != REQUEST_ID]
            given.append((REQUEST_ID, call.request_id.encode()))
            wanted = Forwarded(scope["method"], call.route, given, message.get("body", b""))
            await _answer_from(application, wanted, experiment, call, send)
            return

        async def again() -> Message:
            nonlocal message
            known, message = message, {}
            return known or await receive()

        await self._app(scope, again, send)


async def answered(app: ASGIApp, request: Forwarded) -> AsyncIterator[Frame]:
    """The answer of `app` to a request that another application sends on. Ends the request when nobody takes its frames any more."""
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    left, given = asyncio.Event(), False

    async def receive() -> Message:
        nonlocal given
        if given:
            await left.wait()
            return {"type": "http.disconnect"}
        given = True
        return {"type": "http.request", "body": request.body, "more_body": False}

    async def send(message: Message) -> None:
        messages.put_nowait(message)

    async def run() -> None:
        try:
            await app(_scope(request), receive, send)
        finally:
            messages.put_nowait(None)

    running = asyncio.create_task(run())
    try:
        while (message := await messages.get()) is not None:
            if message["type"] == "http.response.start":
                yield message["status"], [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
            elif message.get("body"):
                yield bytes(message["body"])
        await running  # what broke in it breaks here
    finally:
        left.set()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _answer_from(application: str, wanted: Forwarded, experiment: "Experiment", call: Call, send: Send) -> None:
    """Pass the answer of another application on.

    Raises:
        ApiError: 503, it does not answer; 429, it has no room, which is nobody's failure.
    """
    assert experiment.forward is not None, "a replica on Ray Serve has it"
    kind: bytes | None = None
    try:
        async with aclosing(experiment.forward(application, wanted)) as frames:  # type: ignore[type-var]
            async for frame in frames:
                if isinstance(frame, bytes):
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
                    continue
                status, headers = frame
                kept = [(name, value) for name, value in headers if name.lower() in KEPT]
                kind = dict(kept).get(b"content-type", b"")
                await send({"type": "http.response.start", "status": status, "headers": kept})
    except ApiError as busy:
        busy.headers = experiment.marks(call)
        raise
    except Exception as error:
        experiment.lost(call)
        failure = ApiError(
            503,
            f"what answers for this arm is not there ({type(error).__name__}): try again",
            code="arm_unavailable",
            retry_after=2,
        )
        failure.headers = experiment.marks(call)
        if kind is None:
            raise failure from error
        if not kind.startswith(STREAM):
            raise  # the server cuts the answer off, so that nobody takes it for complete
        call.error = failure.code
        end = b"data: " + msgspec.json.encode(failure.body()) + b"\n\ndata: [DONE]\n\n"
        await send({"type": "http.response.body", "body": end, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _asked(body: bytes) -> _Asked:
    try:
        return msgspec.json.decode(body, type=_Asked)
    except (ValueError, RecursionError):
        return _Asked()  # the handler says what is wrong


def _scope(request: Forwarded) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": request.headers,
        "client": None,
        "server": None,
    }
