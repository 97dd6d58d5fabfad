"""GET /metrics and /v1/engine/steps of one replica on a port of its own.

Through Serve's proxy a scrape meets any replica, and counters of different replicas are not one series. The port is the first free
one from `serve.metrics_port` on: replicas that share a node count up.
"""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from altiplano.serve.gate import Gate
from altiplano.serve.generation import Generator
from altiplano.serve.governance import Governance
from altiplano.serve.observability import add_metrics, add_steps

MOST_REPLICAS_OF_A_NODE = 64


class MetricsServer:
    """Listens from `start` until `stop`. Who may read is decided as on the endpoint's own port."""

    def __init__(self, governance: Governance, find: Callable[[], Generator]) -> None:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.add_middleware(Gate, governance=governance)
        add_metrics(app, governance, find)
        add_steps(app, find)
        self._server = _Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
        self._serving: asyncio.Task[None] | None = None
        self.address: tuple[str, int] | None = None

    async def start(self, host: str, base_port: int) -> tuple[str, int]:
        """Listen on `host`, on the first free port from `base_port` on; returns both.

        Raises:
            OSError: `host` is no address of this machine, or all ports are taken.
        """
        listener = _listen(host, base_port)
        self.address = (host, listener.getsockname()[1])
        self._serving = asyncio.create_task(self._server.serve([listener]))
        return self.address

    async def stop(self) -> None:
        """End it; scrapes that run are answered."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals stay Ray's."""
        yield


def _listen(host: str, base_port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in range(base_port, base_port + MOST_REPLICAS_OF_A_NODE):
        try:
            # The next replica of a node finds the port of the one before free as soon as that one is gone.
            return socket.create_server((host, port), family=family)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    last = base_port + MOST_REPLICAS_OF_A_NODE - 1
    raise OSError(
        errno.EADDRINUSE, f"the ports {base_port} to {last} of {host} are all taken: set serve.metrics_port to a free range"
    )
