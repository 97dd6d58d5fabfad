"""`altiplano deploy --wait`: through the Kubernetes API to Ray Serve, until every replica has taken the change or one says why not.

Ray's dashboard and the replicas are stood in for, behind ports of a head pod of the stand-in; so is KubeRay, which gives Serve what the
RayService says. What the registry answers is asked for in test_deploy_registry.py.
"""

import base64
import functools
import json
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import FILE, Ran, head_pod
from stand_in import FullCluster
from support.charts import NAMESPACE

from altiplano.cli import deploy
from altiplano.cluster.rayservice import serve_config, user_config, with_user_config
from altiplano.pipeline import kube_serving
from altiplano.serve.changes import Changes
from altiplano.serve.control import CHANGE, ServeControl

from ..json_server import JsonHandler, running

SERVICE, CLUSTER, HEAD = "trial-altiplano-endpoint", "trial-altiplano-endpoint-7xk2p", "trial-altiplano-endpoint-7xk2p-head"
TOKEN = "of-the-endpoint"


class Serve(ThreadingHTTPServer):
    """The dashboard and two replicas. Each question but the first `lag` finds what the RayService says now; the first `silent` get no answer.

    `now`: seconds on the clock of who waits. A question takes one.
    """

    def __init__(self, kubernetes: FullCluster) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.kubernetes, self.replicas = kubernetes, [Changes("r1"), Changes("r2")]
        self.lag, self.status, self.refusal = 0, "RUNNING", ""
        self.token, self.silent, self.now, self.questions, self.interrupted = TOKEN, 0, 0.0, 0, False
        self._config = serve_config(kubernetes.get("rayservices", SERVICE))
        self._offered = set[str | None]()

    def applications(self) -> dict[str, Any]:
        if self.lag == 0:
            self._config = serve_config(self.kubernetes.get("rayservices", SERVICE))
            change = user_config(self.kubernetes.get("rayservices", SERVICE)).get(CHANGE)
            if change not in self._offered:  # a replica looks at a change once
                self._offered.add(change)
                self.replicas[0].note(change, None)
                self.replicas[1].note(change, self.refusal or None)
        self.lag = max(0, self.lag - 1)
        (application,) = self._config["applications"]
        deployment = {"message": "the engine does not start", "replicas": [{"state": "RUNNING"}] * 2}
        told = {"status": self.status, "message": "", "deployed_app_config": application, "deployments": {"endpoint": deployment}}
        return {"applications": {"altiplano": told}, "proxies": {"head": {}}, "http_options": {"host": "0.0.0.0", "port": 8000}}

    def clock(self) -> float:
        """What a waiting command reads; Ctrl-C is pressed while it waits."""
        if self.interrupted and self.questions:
            raise KeyboardInterrupt
        return self.now


class Handler(JsonHandler):
    server: Serve

    def do_GET(self) -> None:
        self.server.now += 1
        self.server.questions += 1
        if self.path.startswith("/v1/changes/"):
            change = self.path.rpartition("/")[2]
            self.answer({"object": "change", "replicas": [replica.told(change) for replica in self.server.replicas]})
        elif self.headers["authorization"] != f"Bearer {self.server.token}":
            self.send_error(401)
        elif self.server.silent:
            self.server.silent -= 1  # the stream breaks before there is an answer
        else:
            self.answer(self.server.applications())


@pytest.fixture
def serve(installed: FullCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """The endpoint's cluster runs."""
    monkeypatch.setattr(kube_serving, "POLL_S", 0.01)
    service = installed.get("rayservices", SERVICE)
    cluster = {**service, "kind": "RayCluster", "metadata": {"name": CLUSTER, "namespace": NAMESPACE}}
    cluster["spec"] = service["spec"]["rayClusterConfig"]
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "token-of-jobs", "namespace": NAMESPACE}}
    installed.put(secret | {"data": {"auth_token": base64.b64encode(TOKEN.encode()).decode()}})
    installed.put(cluster)
    installed.put(head_pod(cluster, HEAD))
    installed.put(service, {"activeServiceStatus": {"rayClusterName": CLUSTER}})
    made = Serve(installed)
    with running(made):
        monkeypatch.setattr(kube_serving, "ServeControl", functools.partial(ServeControl, clock=made.clock))
        for port in (8265, 8000):
            installed.ports[HEAD, port] = made.server_port
        yield made


@pytest.fixture
def deployed(altiplano: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Ran]:
    """`altiplano deploy` of version 3, with more options."""
    found = {"version": 3, "path": "/workspace/adapters/orders-3"}
    monkeypatch.setattr(deploy, "_in_cluster", lambda release, words, tracking_uri: found)
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(FILE))
    return lambda *options: altiplano("deploy", str(file), "-y", "--keep-settings", *options)


def test_it_leaves_when_every_replica_has_taken_the_change(
    installed: FullCluster, serve: Serve, deployed: Callable[..., Ran]
) -> None:
    serve.lag = 3
    done = deployed("--wait")
    assert done.code == 0 and "applied; every replica has taken it" in done.out, done.err
    live = user_config(installed.get("rayservices", SERVICE))
    assert serve.lag == 0 and live["aliases"] == {"champion": "orders-3"}
    assert all(replica.told(live[CHANGE])["taken"] for replica in serve.replicas)
    asked = serve.questions
    again = deployed("--wait")
    assert again.code == 0 and "already like this" in again.err and "every replica has taken it" in again.out
    assert serve.questions > asked and user_config(installed.get("rayservices", SERVICE)) == live, "asked, and nothing applied"
    asked = serve.questions
    assert deployed().code == deployed("--wait", "--dry-run").code == 0 and serve.questions == asked


def test_each_apply_has_a_name_of_its_own(installed: FullCluster, serve: Serve, deployed: Callable[..., Ran]) -> None:
    """So that who waits for one is not told what became of the next, which somebody else applied."""
    assert deployed("--wait").code == 0
    first = user_config(installed.get("rayservices", SERVICE))
    plain = deployed("--alias", "challenger", "-o", "json")
    assert plain.code == 0 and [
        change["path"].rpartition(".")[2] for change in json.loads(plain.out)["changes"][0]["changes"]
    ] == ["challenger"], "the name is not a part of the plan"
    second = user_config(installed.get("rayservices", SERVICE))
    assert second["aliases"] == {"champion": "orders-3", "challenger": "orders-3"} and second[CHANGE] != first[CHANGE]
    serve.refusal = "it would have been the first one's"
    serve.applications()
    assert serve.replicas[1].told(first[CHANGE])["taken"] and not serve.replicas[1].told(second[CHANGE])["taken"]


def test_repeating_a_refused_change_does_not_make_it_right(serve: Serve, deployed: Callable[..., Ran]) -> None:
    serve.refusal = "/workspace/adapters/orders-3 has no manifest"
    assert deployed("--wait").code == 4
    again = deployed("--wait")
    assert again.code == 4 and "already like this" in again.err and "orders-3 has no manifest" in again.err
    assert "deploy another --version" in again.err


def test_a_refused_change_is_offered_again_and_taken_once_what_it_lacked_is_there(
    installed: FullCluster, serve: Serve, deployed: Callable[..., Ran]
) -> None:
    serve.refusal = "/workspace/adapters/orders-3 has no manifest"
    assert deployed("--wait").code == 4
    refused = user_config(installed.get("rayservices", SERVICE))
    serve.refusal = ""
    asked = serve.questions
    assert deployed("--wait", "--dry-run").code == 0 and serve.questions == asked
    again = deployed("--wait")
    assert again.code == 0 and "applied; every replica has taken it" in again.out, again.err
    assert "when it was applied, a replica does not take this" in again.err and "deploy another --version" not in again.err
    taken = user_config(installed.get("rayservices", SERVICE))
    assert taken.pop(CHANGE) != refused.pop(CHANGE) and taken == refused


def test_what_was_applied_without_a_name_cannot_be_confirmed(
    installed: FullCluster, serve: Serve, deployed: Callable[..., Ran]
) -> None:
    assert deployed().code == 0
    service = installed.get("rayservices", SERVICE)
    unnamed = {key: value for key, value in user_config(service).items() if key != CHANGE}
    installed.put(with_user_config(service, unnamed))
    again = deployed("--wait")
    assert again.code == 0 and "cannot be confirmed" in again.err and "/v1/models" in again.err
    assert serve.questions == 0 and "every replica" not in again.out


def test_questions_without_an_answer_do_not_end_the_waiting(serve: Serve, deployed: Callable[..., Ran]) -> None:
    serve.silent = 2
    done = deployed("--wait")
    assert done.code == 0 and serve.silent == 0, done.err


def test_the_last_error_is_told_when_no_question_is_answered(serve: Serve, deployed: Callable[..., Ran]) -> None:
    serve.silent = 1 << 30
    done = deployed("--wait", "--timeout", "10s")
    assert done.code == 4 and "Ray's dashboard does not answer" in done.err and "it is applied" in done.err
    assert serve.questions == 11


def test_a_refused_token_is_told_at_once(serve: Serve, deployed: Callable[..., Ran]) -> None:
    serve.token = "another"
    done = deployed("--wait")
    assert done.code == 4 and "refuses the token" in done.err and serve.questions == 1


def test_what_ends_the_waiting_says_that_it_is_applied(
    installed: FullCluster, serve: Serve, deployed: Callable[..., Ran]
) -> None:
    serve.interrupted, serve.lag = True, 1
    stopped = deployed("--wait")
    assert stopped.code == 130 and "it is applied" in stopped.err
    del installed.objects["secrets", "token-of-jobs"]
    secret = deployed("--wait", "--alias", "challenger")
    assert secret.code == 2 and "token-of-jobs" in secret.err and "it is applied" in secret.err


def test_a_replica_that_refuses_is_an_error_with_its_reason(serve: Serve, deployed: Callable[..., Ran]) -> None:
    serve.refusal = "/workspace/adapters/orders-3 has no manifest"
    done = deployed("--wait")
    assert done.code == 4 and "orders-3 has no manifest" in done.err and "deploy another --version" in done.err


def test_an_endpoint_that_does_not_come_up_is_an_error_with_what_serve_says(serve: Serve, deployed: Callable[..., Ran]) -> None:
    serve.status = "DEPLOY_FAILED"
    done = deployed("--wait")
    assert done.code == 4 and "DEPLOY_FAILED" in done.err and "the engine does not start" in done.err


def test_time_is_up_when_serve_is_not_given_the_change(serve: Serve, deployed: Callable[..., Ran]) -> None:
    serve.lag = 1 << 30
    done = deployed("--wait", "--timeout", "1s")
    assert done.code == 4 and "was not given the change within 1 s" in done.err
    assert serve.now == 2, "seconds of its own clock"
    assert deployed("--wait", "--timeout", "soon").code == 2


def test_without_a_running_cluster_nobody_is_waited_for(installed: FullCluster, deployed: Callable[..., Ran]) -> None:
    done = deployed("--wait")
    assert done.code == 4 and "no cluster answers for RayService trial-altiplano-endpoint yet" in done.err
