"""Each replica's metrics on a port of its own: which port, who may read, and what there is without an engine."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from altiplano import spec
from altiplano.cluster.processes import free_port
from altiplano.serve.errors import ApiError
from altiplano.serve.generation import Generator
from altiplano.serve.governance import Governance
from altiplano.serve.keys import KeyFile, Scope
from altiplano.serve.metrics_server import MOST_REPLICAS_OF_A_NODE, MetricsServer

LOOPBACK = "127.0.0.1"


def starting() -> Generator:
    raise ApiError(503, "the engine is starting")


@asynccontextmanager
async def shown(governance: Governance, base: int) -> AsyncIterator[str]:
    server = MetricsServer(governance, starting)
    host, port = await server.start(LOOPBACK, base)
    try:
        yield f"http://{host}:{port}"
    finally:
        await server.stop()


@pytest.fixture
def base() -> int:
    """A port from which on some are free, none of which the kernel gives to anybody meanwhile."""
    return free_port()


def run(story: Callable[[], object]) -> None:
    asyncio.run(story())  # type: ignore[arg-type]


def test_replicas_of_a_node_count_up_and_each_shows_its_own(base: int) -> None:
    async def story() -> None:
        one, two = Governance.of(spec.Serve()), Governance.of(spec.Serve())
        one.metrics.rejected.labels("overloaded", "k1").inc()
        async with shown(one, base) as first, shown(two, base) as second, httpx.AsyncClient(timeout=60) as http:
            ports = [int(url.rsplit(":", 1)[1]) for url in (first, second)]
            assert base <= ports[0] < ports[1] < base + MOST_REPLICAS_OF_A_NODE
            texts = [(await http.get(f"{url}/metrics")).text for url in (first, second)]
        assert ['reason="overloaded"' in text for text in texts] == [True, False]

    run(story)


def test_a_port_is_free_again_for_the_next_replica(base: int) -> None:
    async def story() -> None:
        governance = Governance.of(spec.Serve())
        async with shown(governance, base) as before, httpx.AsyncClient(timeout=60) as http:
            await http.get(f"{before}/metrics")
        async with shown(governance, int(before.rsplit(":", 1)[1])) as after:
            assert after == before

    run(story)


def test_without_an_engine_the_front_ends_numbers_are_there(base: int) -> None:
    async def story() -> None:
        async with shown(Governance.of(spec.Serve()), base) as url, httpx.AsyncClient(timeout=60) as http:
            answer = await http.get(f"{url}/metrics")
            assert answer.status_code == 200 and "altiplano_engine_up 0.0" in answer.text
            assert "altiplano_requests_total" in (await http.get(f"{url}/metrics")).text

    run(story)


def test_a_key_for_metrics_where_there_are_keys_and_nothing_else_to_see(base: int, tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    keys = {scope.value: file.create(scope.value, scope)[1] for scope in (Scope.user, Scope.metrics, Scope.admin)}

    async def story() -> None:
        governance = Governance.of(spec.Serve(api_keys_file=str(file.path)))
        async with shown(governance, base) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
            statuses = {
                name: (await http.get("/metrics", headers={"authorization": f"Bearer {key}"})).status_code
                for name, key in keys.items()
            }
            assert statuses == {"user": 403, "metrics": 200, "admin": 200}
            watcher = {"authorization": f"Bearer {keys['metrics']}"}
            assert (await http.get("/v1/engine/steps", headers=watcher)).status_code == 403
            assert (await http.get("/metrics")).status_code == 401
            admin = {"authorization": f"Bearer {keys['admin']}"}
            assert {(await http.get(path, headers=admin)).status_code for path in ("/v1/models", "/openapi.json", "/x")} == {404}

    run(story)


def test_a_full_range_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("altiplano.serve.metrics_server.MOST_REPLICAS_OF_A_NODE", 1)
    with socket.create_server((LOOPBACK, 0)) as taken, pytest.raises(OSError, match=r"serve\.metrics_port"):
        asyncio.run(MetricsServer(Governance.of(spec.Serve()), starting).start(LOOPBACK, taken.getsockname()[1]))
