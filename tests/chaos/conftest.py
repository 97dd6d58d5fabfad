"""The endpoint on a Ray of its own with two replicas, and clients that keep count of what did not come back whole."""

import asyncio
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx
import psutil
import pytest

from altiplano import spec
from altiplano.cluster import local_ray
from altiplano.cluster.processes import free_port
from altiplano.models.cria import cria_path
from altiplano.serve import ServeControl, ServeSettings, deploy
from altiplano.serve.control import endpoint_of

T = TypeVar("T")
SETTINGS = ServeSettings(
    model_path=str(cria_path()), served_model_name="cria", max_model_len=512, kv_cache_tokens=16384, max_num_seqs=8
)


@dataclass
class Platform:
    """A running endpoint."""

    control: ServeControl
    endpoint: spec.Serve

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.endpoint.port}"

    def wait(self) -> "Platform":
        """Until it answers through its proxy, which learns of replicas a moment after Serve calls them running."""
        eventually(self._answers, 240)
        return self

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=60).is_success
        except httpx.TransportError:  # the proxy does not listen yet
            return False

    def replicas(self) -> list[int]:
        """Process ids of the replicas that take requests."""
        applications = self.control.status()["applications"]
        found = applications[endpoint_of(applications)]["deployments"]["endpoint"]["replicas"]
        return sorted(replica["pid"] for replica in found if replica["state"] == "RUNNING")

    def engine(self, replica: int) -> psutil.Process:
        """The engine's process of one replica."""
        (found,) = [p for p in psutil.Process(replica).children() if "altiplano.serve.engine_process" in p.cmdline()]
        return found

    def gauges(self, name: str) -> list[float]:
        """One gauge of each replica, from its own port behind HAProxy."""
        texts = [httpx.get(f"http://127.0.0.1:{port_of(pid)}/metrics", timeout=60).text for pid in self.replicas()]
        return [float(line.split()[-1]) for text in texts for line in text.splitlines() if line.startswith(f"{name} ")]

    def stats(self) -> dict[str, float]:
        """Sums over the replicas of what must come back to nothing."""
        names = ("altiplano_num_requests_running", "altiplano_num_requests_waiting", "altiplano_kv_cache_usage_perc")
        return {name: sum(self.gauges(name)) for name in names}


def port_of(replica: int) -> int:
    """Where a replica itself listens, behind HAProxy."""
    ports = [
        connection.laddr.port
        for connection in psutil.Process(replica).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and 30000 <= connection.laddr.port <= 31000
    ]
    return int(ports[0])


def eventually(look: Callable[[], T], within_s: float) -> T:
    """The first true answer of `look`; fails after `within_s` seconds. Only for what other processes do."""
    deadline = time.monotonic() + within_s
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {within_s:g} s"
        threading.Event().wait(0.1)


class Broken(NamedTuple):
    """An answer that did not come back whole."""

    begun: float
    ended: float
    text: str


@dataclass
class Traffic:
    """Streams that run until the block ends: `parallel` clients, each asking again as soon as it was answered, or may (Retry-After)."""

    url: str
    parallel: int = 4
    max_tokens: int = 16
    model: str = "cria"
    statuses: list[int] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    arms: list[str | None] = field(default_factory=list)
    """Which arm of a test answered, in the order of the answers."""
    _times: list[tuple[float, float]] = field(default_factory=list)
    """When each of them was asked, and when it had answered."""

    def when(self, arm: str) -> list[float]:
        """The moments at which an arm answered."""
        return [ended for (_, ended), answered in zip(self._times, self.arms, strict=False) if answered == arm]

    def arms_since(self, moment: float) -> list[str | None]:
        """Which arms answered what was asked after a moment. A slow answer to an earlier question may end among these."""
        return [answered for (begun, _), answered in zip(self._times, self.arms, strict=False) if begun > moment]

    def __enter__(self) -> "Traffic":
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        try:
            eventually(lambda: len(self.statuses) >= self.parallel, 240)
        except BaseException:
            self.stop()  # nobody leaves a block that was never entered
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Every client ends its request and asks no more."""
        self._stop.set()
        self._thread.join(300)

    async def _run(self) -> None:
        # Ray's workers run at 15. Real clients are on other machines and take no time from what they ask.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.parallel)
        async with httpx.AsyncClient(timeout=240, limits=limits) as http:
            await asyncio.gather(*(self._client(http) for _ in range(self.parallel)))

    async def _client(self, http: httpx.AsyncClient) -> None:
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                await self._ask(http, begun)
            except httpx.HTTPError as error:
                self.broken.append(Broken(begun, time.monotonic(), repr(error)))

    async def _ask(self, http: httpx.AsyncClient, begun: float) -> None:
        # Each request is a session of its own, so that the shares of a test are those of requests.
        session = {"x-session-id": uuid.uuid4().hex}
        response = await http.post(f"{self.url}/v1/completions", json=body(self.max_tokens, self.model), headers=session)
        self.statuses.append(response.status_code)
        self._times.append((begun, time.monotonic()))
        self.arms.append(response.headers.get("x-altiplano-arm"))
        whole = response.status_code == 429 or (response.status_code == 200 and response.text.endswith("data: [DONE]\n\n"))
        if response.status_code == 429:
            await asyncio.sleep(float(response.headers["retry-after"]))
        if not whole or (response.status_code == 200 and '"error"' in response.text):
            self.broken.append(Broken(begun, time.monotonic(), f"{response.status_code} {response.text[-300:]}"))


def body(max_tokens: int, model: str = "cria") -> dict[str, Any]:
    """A stream of exactly `max_tokens` tokens."""
    return {"model": model, "prompt": "A note", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("chaos")
    yield made
    local_ray.stop(made)


def running_ray(workspace: Path, num_cpus: int = 8) -> ServeControl:
    """A Ray of our own."""
    head = local_ray.start(workspace, num_cpus)
    return ServeControl(head.dashboard, local_ray.token(workspace))


@pytest.fixture(scope="module")
def platform(workspace: Path) -> Platform:
    """Two replicas behind HAProxy."""
    control = running_ray(workspace)
    endpoint = spec.Serve(
        port=free_port(),
        max_num_seqs=8,
        max_model_len=512,
        kv_cache_tokens=16384,
        health_check_timeout_s=5,
        limits=spec.ServeLimits(max_queued_seqs=16),
        autoscaling=spec.ServeAutoscaling(min_replicas=2, max_replicas=2),
    )
    deploy(SETTINGS, endpoint, control)
    return Platform(control, endpoint).wait()
