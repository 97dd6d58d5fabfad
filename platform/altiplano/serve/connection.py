"""The layer between the server and slow or vanished clients: bodies are bounded and timed, and nobody computes for a closed socket.

Memory of one connection: its body (`max_body_bytes`), the text of an answer that it has not taken yet (the engine does not wait for
slow readers, and an answer ends at the model's context), and the server's own buffer.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from altiplano.serve.call import current_call
from altiplano.serve.errors import ApiError
from altiplano.serve.governance import Governance


class _Gone(Exception):
    """The client left before its body was complete."""


class Connection:
    """Reads the body, then runs `app` until it is done, the client is gone, or the client has stopped reading."""

    def __init__(self, app: ASGIApp, governance: Governance) -> None:
        self._app, self._governance = app, governance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._body(scope, receive)
        except _Gone:
            _note("disconnect")
            return
        await _Exchange(self._app, self._governance, body).run(scope, receive, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        limits = self._governance.limits
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not declared.isdigit() or int(declared) > limits.max_body_bytes:
            raise _too_large(limits.max_body_bytes)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    size += len(message.get("body", b""))
                    if size > limits.max_body_bytes:
                        raise _too_large(limits.max_body_bytes)
                    parts.append(message.get("body", b""))
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as error:
            raise ApiError(408, f"the body did not arrive within {limits.body_timeout_s:g} s: send it faster") from error


class _Exchange:
    """One request with its body read, and its answer."""

    def __init__(self, app: ASGIApp, governance: Governance, body: bytes) -> None:
        self._app, self._governance, self._body = app, governance, body
        self._taken = self._complete = False
        self._left = asyncio.Event()
        self._sending_since: float | None = None

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tracked(message: Message) -> None:
            self._sending_since = self._governance.clock()
            await send(message)
            self._sending_since = None
            self._complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        answering = asyncio.create_task(self._answer(scope, tracked))
        leaving = asyncio.create_task(_until_gone(receive))
        try:
            reason = await self._watch(answering, leaving)
            if reason is None:
                answering.result()
            else:
                _note(reason)
        except asyncio.CancelledError:
            # Ray's own proxy cancels when its client leaves, sometimes before it says so.
            if not self._complete:
                _note("cancelled")
            raise
        finally:
            self._left.set()
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
            call = current_call()
            if call is not None:
                call.abort()

    async def _answer(self, scope: Scope, send: Send) -> None:
        await self._app(scope, self._replay, send)

    async def _watch(self, answering: "asyncio.Task[None]", leaving: "asyncio.Task[None]") -> str | None:
        """Why the answer is given up; None when it is not."""
        patience = self._governance.limits.stalled_client_timeout_s
        while True:
            pending = {answering} if leaving.done() else {answering, leaving}
            done, _ = await asyncio.wait(pending, timeout=patience / 2, return_when=asyncio.FIRST_COMPLETED)
            if answering in done:
                return None
            # Servers also report a disconnect once the answer is complete.
            if leaving in done and not self._complete:
                return "disconnect"
            since = self._sending_since
            if since is not None and self._governance.clock() - since > patience:
                return "stalled"

    async def _replay(self) -> Message:
        if self._taken:
            await self._left.wait()
            return {"type": "http.disconnect"}
        self._taken = True
        return {"type": "http.request", "body": self._body, "more_body": False}


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def _note(reason: str) -> None:
    call = current_call()
    if call is not None:
        call.gone = reason


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body has more than {most} bytes: shorten it")
