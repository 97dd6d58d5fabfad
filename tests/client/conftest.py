"""Endpoints to ask: the real one with cria, and a small ASGI server that fails on request."""

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn

from altiplano.client import Backoff, Endpoint, Sender

from ..serve.conftest import adapter, server

__all__ = ["adapter", "server"]

Send = Callable[[dict[str, Any]], Awaitable[None]]
CLOSE = -1


@dataclass
class Seen:
    """One request as the server saw it."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def prompt(self) -> str:
        if "messages" in self.body:
            return str(self.body["messages"][-1]["content"])
        return str(self.body["prompt"])


async def read_body(receive: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    """The JSON body of a request, which may come in parts."""
    data = b""
    while True:
        message = await receive()
        data += message.get("body", b"")
        if not message.get("more_body"):
            return dict(json.loads(data))


@dataclass
class Scripted:
    """A chat endpoint that says "re: PROMPT". `plan(seen)` may return another status, with headers, or CLOSE: half an answer."""

    plan: Callable[[Seen], tuple[int, dict[str, str]]] = lambda seen: (200, {})
    seen: list[Seen] = field(default_factory=list)
    hold: Callable[[Seen], bool] = lambda seen: False
    held: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    """Released once for each request that is held, never to be answered."""
    url: str = ""

    def prompts(self) -> list[str]:
        return [seen.prompt for seen in self.seen]

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Awaitable[dict[str, Any]]], send: Send) -> None:
        assert scope["type"] == "http"
        if scope["method"] == "GET":
            await respond(send, 200, {"data": [{"id": "cria"}, {"id": "champion"}]})
            return
        seen = Seen(scope["path"], await read_body(receive), {name.decode(): value.decode() for name, value in scope["headers"]})
        self.seen.append(seen)
        if self.hold(seen):
            self.held.release()
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        status, headers = self.plan(seen)
        if status == CLOSE:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
            await send({"type": "http.response.body", "body": b'{"choices": [', "more_body": False})
            return
        if status != 200:
            await respond(send, status, {"error": {"message": f"no: {seen.prompt}", "code": "said_no"}}, headers)
            return
        choice = {"message": {"role": "assistant", "content": f"re: {seen.prompt}"}, "finish_reason": "stop"}
        await respond(send, 200, {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}, headers)


async def respond(send: Send, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
    pairs = {"content-type": "application/json", "x-request-id": "served-1"} | (headers or {})
    await send({"type": "http.response.start", "status": status, "headers": [(k.encode(), v.encode()) for k, v in pairs.items()]})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


def serve_app(app: Any) -> Iterator[str]:
    """uvicorn in a thread; yields the address of the API."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(128)  # from here on nobody is turned away, however long the thread takes
        # No connection is closed while it is idle: a request that is just about to use it would fail.
        running = uvicorn.Server(
            uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=5, timeout_keep_alive=600)
        )
        thread = threading.Thread(target=lambda: asyncio.run(running.serve([sock])))
        thread.start()
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
        running.should_exit = True
        thread.join(timeout=60)


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    app = Scripted()
    for url in serve_app(app):
        app.url = url
        yield app


class VirtualTime:
    """A clock that sleeping moves; `naps` holds every sleep in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.naps: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds


@pytest.fixture
def time() -> VirtualTime:
    return VirtualTime()


def with_sender(
    url: str,
    time: VirtualTime,
    use: Callable[[Sender], Awaitable[Any]],
    backoff: Backoff | None = None,
    api_key: str | None = None,
) -> Any:
    """Run `use` with a sender whose waits are virtual."""

    async def main() -> Any:
        endpoint = Endpoint(url, api_key)
        async with endpoint.open() as client:
            return await use(Sender(endpoint, client, backoff or Backoff(), time.sleep, time.clock, lambda: 1.0))

    return asyncio.run(main())
