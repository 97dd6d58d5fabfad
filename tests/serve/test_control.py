"""A change of user_config, told apart by what replicas make of it. Ray's dashboard and the replicas are stood in for: see test_ray_serve.py."""

import asyncio
import copy
import json
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from typing import Any

import pytest

from altiplano.serve.changes import REMEMBERED, Changes
from altiplano.serve.control import CHANGE, ControlError, DeployError, RefusedConfigError, ServeControl
from altiplano.serve.errors import ApiError

from ..json_server import JsonHandler, running

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
        self.broken = 0  # questions about the applications that get no answer
        self.now = 0.0  # seconds on the clock of who waits; a question takes one
        self.coming = list[dict[str, Any]]()  # configs that somebody else puts, one before each question

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def status(self) -> dict[str, Any]:
        if self.coming:
            self.put(self.coming.pop(0))
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


class Handler(JsonHandler):
    server: Cluster

    def do_GET(self) -> None:
        self.server.now += 1
        if self.path.startswith("/v1/changes/"):
            self.answer({"object": "change", "replicas": self.server.told(self.path.rsplit("/", 1)[1])})
        elif self.server.broken:
            self.server.broken -= 1
        else:
            self.answer(self.server.status())

    def do_PUT(self) -> None:
        self.server.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.answer({})


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    with running(made):
        yield made


@pytest.fixture
def control(cluster: Cluster) -> ServeControl:
    made = ServeControl(cluster.url, None, poll_s=0, clock=lambda: cluster.now)
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
        control.deploy(config, timeout_s=100)
    assert control.get_user_config() == BEFORE
    assert CHANGE not in json.dumps(config), "what the caller gave is the caller's"


def test_replicas_that_do_not_tell_in_time_are_named(cluster: Cluster, control: ServeControl) -> None:
    cluster.slow = 1 << 30
    with pytest.raises(DeployError, match=r"1 of 2 replicas told http://127\.0\.0\.1"):
        control.set_user_config({"adapters": {}, "aliases": {}}, timeout_s=5)


def put_by_another(change: str, adapter: str = "b") -> dict[str, Any]:
    user_config = {"adapters": {adapter: f"/{adapter}"}, "aliases": {}, CHANGE: change}
    return {"applications": [{"name": "altiplano", "deployments": [{"name": "endpoint", "user_config": user_config}]}]}


def test_a_change_that_another_gives_to_serve_is_waited_for(cluster: Cluster, control: ServeControl) -> None:
    cluster.coming, cluster.slow = [put_by_another("earlier", "c"), put_by_another("mine")], 2
    control.confirm("mine", timeout_s=100)
    assert cluster.slow == 0 and not cluster.coming, "it was asked again until Serve had it and both replicas had told"
    assert control.get_user_config()["adapters"] == {"b": "/b"}


def test_a_change_of_another_that_a_replica_refuses_is_told_and_left_to_its_maker(
    cluster: Cluster, control: ServeControl
) -> None:
    cluster.refusing["b"], cluster.coming = "/b has no manifest", [put_by_another("mine")]
    with pytest.raises(RefusedConfigError, match="goes on with what it had: /b has no manifest"):
        control.confirm("mine", timeout_s=100)
    assert control.get_user_config()["adapters"] == {"b": "/b"}


def test_a_change_that_serve_never_gets_is_not_waited_for_without_end(control: ServeControl) -> None:
    with pytest.raises(DeployError, match="was not given the change"):
        control.confirm("mine", timeout_s=5)


def test_a_question_without_an_answer_does_not_end_the_waiting(cluster: Cluster, control: ServeControl) -> None:
    cluster.broken, cluster.coming = 2, [put_by_another("mine")]
    control.confirm("mine", timeout_s=100)
    assert cluster.broken == 0
    cluster.broken = 1 << 30
    with pytest.raises(ControlError, match="does not answer"):
        control.confirm("mine", timeout_s=5)
    assert cluster.now < 20


def test_an_endpoint_that_stays_as_it_is_keeps_the_name_of_its_change(cluster: Cluster, control: ServeControl) -> None:
    """Who applied it may still ask what became of it."""
    name = cluster.config[CHANGE]
    endpoint = {"name": "altiplano", "deployments": [{"name": "endpoint", "user_config": dict(BEFORE)}]}
    control.set_applications([endpoint])
    assert cluster.puts == 2 and cluster.config == {**BEFORE, CHANGE: name}


def test_where_nothing_runs_nobody_is_asked(cluster: Cluster, control: ServeControl) -> None:
    cluster.running = 0
    control.set_user_config({"adapters": {"b": "/b"}, "aliases": {}})
    assert control.get_user_config()["adapters"] == {"b": "/b"}


def test_an_endpoint_elsewhere_is_asked_where_it_is(cluster: Cluster, control: ServeControl) -> None:
    with pytest.raises(DeployError, match=r"0 of 2 replicas told http://127\.0\.0\.1:9 "):
        ServeControl(cluster.url, None, "http://127.0.0.1:9/v1", 0, lambda: cluster.now).set_user_config(BEFORE, timeout_s=5)


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
