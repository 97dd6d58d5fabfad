"""The layer that answers identical greedy requests from memory. See `response_cache` for what counts as identical."""

from collections.abc import Callable

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from altiplano.serve.call import Call, current_call
from altiplano.serve.governance import Governance
from altiplano.serve.response_cache import ResponseCache, Stored, digest_of

HEADER = b"x-altiplano-cache"


class Replay:
    """`weights_of` names what answers for a model name; None for a name that nobody serves. Inside of `Connection`."""

    def __init__(self, app: ASGIApp, governance: Governance, weights_of: Callable[[str], str | None]) -> None:
        self._app, self._governance, self._weights_of = app, governance, weights_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call, cache = current_call(), self._governance.cache
        if scope["type"] != "http" or cache is None or call is None or call.entry is None or not call.entry.metered:
            await self._app(scope, receive, send)
            return
        message = await receive()  # the whole body: Connection gives it in one piece

        async def again() -> Message:
            nonlocal message
            given, message = message, {}
            return given or await receive()

        key = self._key(call, message["body"])
        if key is None:
            await self._app(scope, again, send)
            return
        weights, digest = key
        found = cache.get(digest)
        call.cache = "miss" if found is None else "hit"
        self._governance.metrics.response_cache.labels(call.cache).inc()
        if found is None:
            await self._app(scope, again, _Recorder(send, cache, digest, lambda: call.weights == weights))
            return
        await send({"type": "http.response.start", "status": 200, "headers": [*found.headers, (HEADER, b"hit")]})
        await send({"type": "http.response.body", "body": found.body})

    def _key(self, call: Call, body: bytes) -> tuple[str, bytes] | None:
        """(weights, digest) of a request; None for one that is computed each time."""
        try:
            values = msgspec.json.decode(body)
        except (ValueError, RecursionError):
            return None  # the handler says what is wrong
        if not isinstance(values, dict) or not isinstance(values.get("model"), str):
            return None
        weights = self._weights_of(values["model"])
        digest = None if weights is None else digest_of(call.route, values, weights, call.key_id)
        return None if weights is None or digest is None else (weights, digest)


class _Recorder:
    """Passes an answer on and keeps it once it is complete, unless the weights were changed before it began (`valid`)."""

    def __init__(self, send: Send, cache: ResponseCache, digest: bytes, valid: Callable[[], bool]) -> None:
        self._send, self._cache, self._digest, self._valid = send, cache, digest, valid
        self._headers: tuple[tuple[bytes, bytes], ...] | None = None
        self._parts: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] == 200:
                self._headers = tuple((bytes(name), bytes(value)) for name, value in message.get("headers", ()))
            message["headers"] = [*message.get("headers", ()), (HEADER, b"miss")]
        elif message["type"] == "http.response.body" and self._headers is not None:
            self._parts.append(message.get("body", b""))
            if not message.get("more_body", False) and self._valid():
                self._cache.put(self._digest, Stored(self._headers, b"".join(self._parts)))
        await self._send(message)
