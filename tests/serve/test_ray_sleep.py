"""Two replicas on a real Ray Serve fall asleep and wake up together, whichever is asked."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from altiplano import spec
from altiplano.cluster.processes import free_port
from altiplano.serve.deployment import Endpoint

from .conftest import settings, start_ray

# Ray's own sockets and files, closed when its processes are collected.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
    ),
]
SHORT: dict[str, Any] = {"model": "champion", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
ENOUGH = 12  # requests, until both replicas have surely had one


@pytest.fixture(scope="module")
def http(adapter: Path) -> Iterator[httpx.Client]:
    start_ray(4)
    endpoint = spec.Serve(port=free_port(), max_num_seqs=16)
    serve.start(http_options={"host": "127.0.0.1", "port": endpoint.port})
    replica = Endpoint.options(num_replicas=2, health_check_period_s=1)  # type: ignore[attr-defined]
    serve.run(replica.bind(asdict(settings(adapter)), endpoint.model_dump(mode="json")), name="sleepy", route_prefix="/")
    with httpx.Client(base_url=f"http://127.0.0.1:{endpoint.port}", timeout=60) as made:
        yield made
    serve.shutdown()
    ray.shutdown()


def statuses(http: httpx.Client) -> set[int]:
    return {http.post("/v1/completions", json=SHORT).status_code for _ in range(ENOUGH)}


def levels(http: httpx.Client) -> list[int]:
    return [replica["level"] for replica in http.get("/is_sleeping").json()["replicas"]]


def test_all_replicas_sleep_and_wake_up(http: httpx.Client) -> None:
    words = http.post("/v1/completions", json=SHORT).json()["choices"]
    assert levels(http) == [0, 0]
    slept = http.post("/sleep", params={"level": 2})
    assert slept.status_code == 200 and slept.json()["is_sleeping"] is True, slept.text
    assert len({replica["replica"] for replica in slept.json()["replicas"]}) == 2
    assert statuses(http) == {503} and levels(http) == [2, 2]
    assert {http.get("/health").status_code for _ in range(ENOUGH)} == {200}
    assert http.post("/wake_up").json()["is_sleeping"] is False
    assert statuses(http) == {200} and http.post("/v1/completions", json=SHORT).json()["choices"] == words
