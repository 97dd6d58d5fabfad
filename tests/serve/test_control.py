"""A change of user_config, told apart by what replicas make of it. Ray's dashboard and the replicas are stood in for: see test_ray_serve.py."""

import asyncio
import copy
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from altiplano.serve.changes import REMEMBERED, Changes
from altiplano.serve.control import CHANGE, DeployError, RefusedConfigError, ServeControl
from altiplano.serve.errors import ApiError

BEFORE = {"adapters": {"a": "/a"}, "aliases": {"champion": "a"}}


class Cluster(ThreadingHTTPServer):
    """Two replicas that take what `opinion` (user_config to a reason or None, for each replica) does not mind."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.config: dict[str, Any] = {"adapters": {}, "aliases": {}}
        self.replicas = [Changes("r1"), Changes("r2")]
        self.refusing: dict[str, str] = {}  # adapter to the reason of the second replica
        self.slow = 0  # times that the second replica does not know a change yet
        self.running = 2
        self.puts = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def status(self) -> dict[str, Any]:
        states = ["RUNNING"] * self.running
        return {
            "http_options": {"host": "0.0.0.0", "port": self.server_port},
            "proxies": {"head": {}},
            "applications": {
                "altiplano": {
                    "status": "RUNNING",
                    "message": "",
                    "deployed_app_config": {
                        "name": "altiplano",
                        "deployments": [{"name": "endpoint", "user_config": copy.deepcopy(self.config)}],
                    },
                    "deployments": {"endpoint": {"message": "", "replicas": [{"state": state} for state in states]}},
                }
            },
        }

    def put(self, body: dict[str, Any]) -> None:
        self.puts += 1
        self.config = body["applications"][0]["deployments"][0]["user_config"]
        change = self.config[CHANGE]
        self.replicas[0].note(change, None)
        reasons = [reason for name, reason in self.refusing.items() if name in self.config["adapters"]]
        self.replicas[1].note(change, reasons[0] if reasons else None)

    def told(self, change: str) -> list[dict[str, Any]]:
        replicas = self.replicas[: self.running]
        if self.slow:
            self.slow -= 1
            replicas = replicas[:1]
        return [replica.told(change) for replica in replicas]


class Handler(BaseHTTPRequestHandler):
    server: Cluster

    def do_GET(self) -> None:
        if self.path.startswith("/v1/changes/"):
            self._answer({"object": "change", "replicas": self.server.told(self.path.rsplit("/", 1)[1])})
        else:
            self._answer(self.server.status())

    def do_PUT(self) -> None:
        self.server.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self._answer({})

    def _answer(self, body: dict[str, Any]) -> None:
        encoded = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster() as made:
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture
def control(cluster: Cluster) -> ServeControl:
    made = ServeControl(cluster.url, None)
    made.set_user_config(BEFORE)
    return made


def test_a_change_is_live_when_every_replica_says_so(cluster: Cluster, control: ServeControl) -> None:
    cluster.slow = 2
    control.set_user_config({"adapters": {"b": "/b"}, "aliases": {}})
    assert cluster.slow == 0, "it was asked again until both had told"
    assert control.get_user_config() == {"adapters": {"b": "/b"}, "aliases": {}}


def test_one_replica_that_refuses_brings_the_config_before_back(cluster: Cluster, control: ServeControl) -> None:
    cluster.refusing["b"] = "/b has no manifest"
    with pytest.raises(RefusedConfigError, match="/b has no manifest"):
        control.set_user_config({"adapters": {"b": "/b"}, "aliases": {"champion": "b"}})
    assert control.get_user_config() == BEFORE
    assert cluster.puts == 3 and all(replica["taken"] for replica in cluster.told(cluster.config[CHANGE]))


def test_a_redeployment_is_asked_about_too(cluster: Cluster, control: ServeControl) -> None:
    cluster.refusing["b"] = "/b has no manifest"
    wanted = {"name": "altiplano", "deployments": [{"name": "endpoint", "user_config": {"adapters": {"b": "/b"}, "aliases": {}}}]}
    config = {"applications": [wanted]}
    with pytest.raises(RefusedConfigError, match="/b has no manifest"):
        control.deploy(config, timeout_s=10)
    assert control.get_user_config() == BEFORE
    assert CHANGE not in json.dumps(config), "what the caller gave is the caller's"


def test_replicas_that_do_not_tell_in_time_are_named(cluster: Cluster, control: ServeControl) -> None:
    cluster.slow = 1 << 30
    with pytest.raises(DeployError, match=r"1 of 2 replicas told http://127\.0\.0\.1"):
        control.set_user_config({"adapters": {}, "aliases": {}}, timeout_s=0.1)


def test_where_nothing_runs_nobody_is_asked(cluster: Cluster, control: ServeControl) -> None:
    cluster.running = 0
    control.set_user_config({"adapters": {"b": "/b"}, "aliases": {}})
    assert control.get_user_config()["adapters"] == {"b": "/b"}


def test_an_endpoint_elsewhere_is_asked_where_it_is(cluster: Cluster, control: ServeControl) -> None:
    with pytest.raises(DeployError, match=r"0 of 2 replicas told http://127\.0\.0\.1:9 "):
        ServeControl(cluster.url, None, "http://127.0.0.1:9/v1").set_user_config(BEFORE, timeout_s=0.1)


def test_a_replica_remembers_the_latest_changes_and_asks_nobody_about_others() -> None:
    changes, asked = Changes("r1"), list[str]()
    for number in range(REMEMBERED + 1):
        changes.note(f"c{number}", "no" if number % 2 else None)
    assert changes.told("c0")["taken"] is None
    assert asyncio.run(changes.everywhere("c1")) == [{"replica": "r1", "taken": False, "reason": "no"}]

    async def gather(change: str) -> list[dict[str, Any]]:
        asked.append(change)
        return []

    changes.gather = gather
    asyncio.run(changes.everywhere("c2"))
    with pytest.raises(ApiError, match="knows no such change"):
        asyncio.run(changes.everywhere("c0"))
    assert asked == ["c2"], "strangers cannot make every replica work"
