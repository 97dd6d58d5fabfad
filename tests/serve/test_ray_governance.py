"""Keys, limits and leaving clients where Ray Serve stands between the client and the application."""

import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from altiplano import spec
from altiplano.cluster.processes import free_port
from altiplano.serve.deployment import Endpoint
from altiplano.serve.keys import KeyFile, Scope

from .conftest import settings, start_ray

# Ray's own sockets and files, closed when its processes are collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
MOST = 60_000  # tokens, which take minutes: whoever leaves has left before the end
LONG: dict[str, Any] = {"model": "champion", "prompt": "A note", "max_tokens": MOST, "temperature": 2, "ignore_eos": True}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    start_ray(4)
    yield
    serve.shutdown()
    ray.shutdown()


def test_keys_limits_and_leaving_clients_through_ray_serve(cluster: None, adapter: Path, tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    (_, user), (own, admin) = file.create("user", requests_per_minute=1), file.create("admin", scope=Scope.admin)
    # An engine that is slow because the machine is busy is not started again.
    endpoint = spec.Serve(port=free_port(), api_keys_file=str(file.path), health_check_timeout_s=300)
    served = replace(settings(adapter), max_model_len=1 << 16, kv_cache_tokens=1 << 16)
    serve.start(http_options={"host": "127.0.0.1", "port": endpoint.port})
    replica = Endpoint.bind(asdict(served), endpoint.model_dump(mode="json"))  # type: ignore[attr-defined]
    serve.run(replica, name="governed", route_prefix="/")
    with httpx.Client(base_url=f"http://127.0.0.1:{endpoint.port}", timeout=60) as http:

        def ask(key: str, **more: object) -> httpx.Response:
            return http.post("/v1/completions", json=LONG | more, headers={"authorization": f"Bearer {key}"})

        def value(name: str) -> float:
            text = http.get("/metrics", headers={"authorization": f"Bearer {admin}"}).text
            return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

        assert http.get("/health").status_code == 200
        assert http.get("/v1/models").status_code == 401
        answers = [ask(user, max_tokens=2) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 429]
        assert 1 <= int(answers[1].headers["retry-after"]) <= 60
        with http.stream(
            "POST", "/v1/completions", json=LONG | {"stream": True}, headers={"authorization": f"Bearer {admin}"}
        ) as stream:
            next(stream.iter_lines())
        pause, deadline = threading.Event(), time.monotonic() + 300
        while not value("altiplano_clients_gone_total") or value("altiplano_num_requests_running"):
            if time.monotonic() > deadline:
                pytest.fail("the client that has left is still being answered")
            pause.wait(0.05)
        generated = f'altiplano_generation_tokens_total{{arm="orders-1",key="{own.id}"'
        assert 0 < value(generated) < MOST
        assert value("altiplano_clients_gone_total") == 1
    serve.delete("governed")
