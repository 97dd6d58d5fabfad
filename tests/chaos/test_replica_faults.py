"""One endpoint, two replicas, traffic all the time: what breaks, how much of it, and how long until it is whole again."""

import asyncio
import json
import os
import signal
import socket
import time
from contextlib import ExitStack

import httpx
import psutil
import pytest

from altiplano import spec
from altiplano.serve import deploy

from .conftest import SETTINGS, Platform, Traffic, body, eventually, port_of

pytestmark = pytest.mark.slow

RECOVERY_S = 120.0  # on two cores that others use too; replicas import torch


def whole_again(platform: Platform, gone: set[int]) -> None:
    """Two replicas that answer, none of them one of `gone`."""
    eventually(lambda: len(now := platform.replicas()) == 2 and not gone & set(now), RECOVERY_S)


def test_a_killed_replica_costs_only_its_own_streams(platform: Platform) -> None:
    """What has no byte of its answer yet, and what comes while the replica dies, is answered by the other one."""
    victim, survivor = platform.replicas()
    with Traffic(platform.url, parallel=4) as traffic:
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        whole_again(platform, {victim})
        answered = len(traffic.statuses)
        eventually(lambda: len(traffic.statuses) > answered + 8, 60)
    assert survivor in platform.replicas()
    assert all(broken.begun < killed for broken in traffic.broken), (killed, traffic.broken)
    assert len(traffic.broken) <= traffic.parallel, "nobody loses two"
    assert set(traffic.statuses) == {200}, "what breaks is a stream that had begun"


def test_a_killed_engine_ends_its_streams_with_an_error_and_comes_back_in_the_same_replica(platform: Platform) -> None:
    replicas = platform.replicas()
    engine = platform.engine(replicas[0])
    with Traffic(platform.url, parallel=4, max_tokens=64) as traffic:
        engine.kill()
        psutil.wait_procs([engine], timeout=10)
        eventually(lambda: _engine_runs(platform, replicas[0], engine.pid), RECOVERY_S)
        answered = len(traffic.statuses)
        eventually(lambda: len(traffic.statuses) > answered + 8, 60)
    assert platform.replicas() == replicas, "the replica stays"
    assert all("its process ended" in text or "is starting" in text for *_, text in traffic.broken), traffic.broken[:3]


def test_a_stopped_engine_is_noticed_and_started_again(platform: Platform) -> None:
    replicas = platform.replicas()
    engine = platform.engine(replicas[0])
    engine.suspend()
    stopped = time.monotonic()
    # Whoever is in it is told, instead of waiting for ever.
    answer = httpx.post(f"http://127.0.0.1:{port_of(replicas[0])}/v1/completions", json=body(400), timeout=60)
    assert '"error"' in answer.text
    # One period, the engine's time to say something, one step of Serve's own loop.
    assert time.monotonic() - stopped < 5 + platform.endpoint.health_check_timeout_s + 5
    eventually(lambda: _engine_runs(platform, replicas[0], engine.pid), RECOVERY_S)
    assert platform.replicas() == replicas


def test_a_thousand_clients_leave_in_mid_stream(platform: Platform) -> None:
    eventually(lambda: not any(platform.stats().values()), 60)
    memory = [psutil.Process(pid).memory_info().rss for pid in platform.replicas()]

    async def leave(limit: asyncio.Semaphore, http: httpx.AsyncClient) -> int:
        async with limit, http.stream("POST", f"{platform.url}/v1/completions", json=body(400)) as stream:
            async for _ in stream.aiter_bytes():
                break
            return stream.status_code

    async def leave_all() -> list[int]:
        limit = asyncio.Semaphore(40)
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_keepalive_connections=0)) as http:
            return await asyncio.gather(*(leave(limit, http) for _ in range(1000)))

    statuses = asyncio.run(leave_all())
    assert set(statuses) <= {200, 429} and statuses.count(200) >= 100
    eventually(lambda: not any(platform.stats().values()), 30)
    grown = [psutil.Process(pid).memory_info().rss - before for pid, before in zip(platform.replicas(), memory, strict=True)]
    assert max(grown) < 100 << 20


def test_clients_that_do_not_read_hold_up_nobody(platform: Platform) -> None:
    """A dozen of them have more to take than their sockets hold; the engines are done with them long before they are cut off."""
    eventually(lambda: not any(platform.stats().values()), 60)
    memory = [psutil.Process(pid).memory_info().rss for pid in platform.replicas()]
    address = ("127.0.0.1", platform.endpoint.port)
    with ExitStack() as stack, Traffic(platform.url, parallel=2) as traffic:
        for _ in range(12):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(address)
            content = json.dumps(body(450) | {"logprobs": 5})
            head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
            client.sendall(f"{head}\r\n\r\n{content}".encode())
            begun = client.recv(512)
            assert begun.startswith(b"HTTP/1.1 200"), begun
        answered = len(traffic.statuses)
        eventually(lambda: len(traffic.statuses) > answered + 20, 120)
        traffic.stop()
        eventually(lambda: not any(platform.stats().values()), 120)
        grown = [psutil.Process(pid).memory_info().rss - before for pid, before in zip(platform.replicas(), memory, strict=True)]
    assert traffic.broken == []
    assert max(grown) < 100 << 20


def test_ten_times_the_load_is_shed_and_the_rest_answered(platform: Platform) -> None:
    """16 slots and 32 places to wait: 480 clients at once, who ask again when they are told to. What is taken is answered, nobody gets a 5xx."""
    most = list[float]()

    def answered(wanted: int) -> bool:
        busy = platform.stats()
        most.append(busy["altiplano_num_requests_running"] + busy["altiplano_num_requests_waiting"])
        return traffic.statuses.count(200) >= wanted

    with Traffic(platform.url, parallel=480, max_tokens=32) as traffic:
        eventually(lambda: answered(256), 240)
    assert traffic.broken == []
    assert set(traffic.statuses) == {200, 429}
    assert 16 <= max(most) <= 16 + 32, "slots are in use, and the line is bounded"


def test_a_replica_that_leaves_finishes_its_streams(platform: Platform) -> None:
    """Scaling down sends SIGTERM's equivalent: no stream breaks, though each one outlasts the order to leave."""
    leaving = set(platform.replicas())
    with Traffic(platform.url, parallel=4, max_tokens=300) as traffic:
        one = platform.endpoint.model_copy(update={"autoscaling": spec.ServeAutoscaling()})
        deploy(SETTINGS, one, platform.control)
        eventually(lambda: len(platform.replicas()) == 1, RECOVERY_S)
        (gone,) = leaving - set(platform.replicas())
        eventually(lambda: not psutil.pid_exists(gone), RECOVERY_S)
        answered = len(traffic.statuses)
        eventually(lambda: len(traffic.statuses) > answered + 4, 60)
    assert traffic.broken == []


def _engine_runs(platform: Platform, replica: int, instead_of: int) -> bool:
    """Asked of the replica itself: HAProxy would let the other one answer."""
    try:
        health = f"http://127.0.0.1:{port_of(replica)}/health"
        return platform.engine(replica).pid != instead_of and httpx.get(health, timeout=30).is_success
    except (ValueError, psutil.Error, httpx.HTTPError):  # the old one may be about to go
        return False
