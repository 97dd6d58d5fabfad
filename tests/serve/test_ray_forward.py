"""Two applications on a real Ray Serve, one behind the other: answers, clients that leave, and a replica over there that is killed."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from altiplano import spec
from altiplano.cluster import local_ray
from altiplano.cluster.processes import free_port
from altiplano.serve import ServeControl, deploy
from altiplano.serve.arms import Arms
from altiplano.serve.control import SECOND
from altiplano.serve.evidence import AbClient
from altiplano.serve.rollout import Phase, Plan, State
from altiplano.serve.rollout_apart import NotYetError, carry_out

from .conftest import make_adapter, make_base, settings

pytestmark = pytest.mark.slow

WITHIN_S = 120.0
BODY: dict[str, Any] = {"model": "champion", "prompt": "A note", "max_tokens": 8, "ignore_eos": True, "stream": True}
HALF = State(Phase.running, live_since=1.0)


def eventually(look: Callable[[], Any]) -> Any:
    """The first true answer of `look`. Only for what other processes do."""
    deadline = time.monotonic() + WITHIN_S
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {WITHIN_S:g} s"
        threading.Event().wait(0.1)
    return found


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeControl]:
    workspace = tmp_path_factory.mktemp("ray")
    head = local_ray.start(workspace, 6)
    yield ServeControl(head.dashboard, local_ray.token(workspace))
    local_ray.stop(workspace)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    base = make_base(tmp_path_factory.mktemp("base"), seed=7)
    second = make_adapter(tmp_path_factory.mktemp("second"), 2, base)
    apart = {"model": str(base), "served_model_name": "second"}
    return Plan("orders", 2, "orders-1", "orders-2", str(second), "a salt for tests", steps=(50.0,), apart=apart)


def session(plan: Plan, arm: str) -> dict[str, str]:
    """Headers of a session that has an arm."""
    arms = Arms.of({"salt": plan.salt, "weights": {"champion": 50, "challenger": 50}})
    return {"x-session-id": next(f"{i}" for i in range(1000) if arms.assign(f"session:{i}") == arm)}


def replicas(control: ServeControl, application: str) -> list[int]:
    found = control.status()["applications"][application]["deployments"]["endpoint"]["replicas"]
    return [replica["pid"] for replica in found if replica["state"] == "RUNNING"]


@pytest.mark.parametrize("proxy", ["haproxy", "python"])
def test_the_second_application_answers_through_the_first(control: ServeControl, plan: Plan, adapter: Path, proxy: Any) -> None:
    endpoint = spec.Serve(port=free_port(), http_proxy=proxy, max_num_seqs=16, max_model_len=512, kv_cache_tokens=8192)
    deploy(settings(adapter), endpoint, control)
    url = f"http://127.0.0.1:{endpoint.port}"
    reader = AbClient(url)

    def live() -> bool:
        try:
            carry_out(control, plan, HALF)
        except NotYetError:
            return False
        return len(reader.read().snapshots) == 2

    eventually(live)
    test = Arms.of({"salt": plan.salt, "weights": {"champion": 1}}).test_id
    assert reader.read().is_live(test, {"champion": 0.5, "challenger": 0.5}), "both replicas have the test"
    for arm in ("champion", "challenger"):
        answer = httpx.post(f"{url}/v1/completions", json=BODY, headers=session(plan, arm), timeout=60)
        assert answer.status_code == 200 and answer.headers["x-altiplano-arm"] == arm
        assert answer.text.endswith("data: [DONE]\n\n") and '"error"' not in answer.text

    # Clients leave in mid-stream: over there nobody computes for them.
    with httpx.Client(timeout=60) as http:
        for _ in range(8):
            wanted = BODY | {"max_tokens": 480}
            with http.stream("POST", f"{url}/v1/completions", json=wanted, headers=session(plan, "challenger")) as stream:
                next(stream.iter_bytes())

    def counted() -> dict[str, Any]:
        outcomes = reader.read().replicas.values()
        return {arm: sums for found in outcomes for arm, sums in found.items() if arm == "challenger"}

    answer = httpx.post(f"{url}/v1/completions", json=BODY, headers=session(plan, "challenger"), timeout=60)
    assert answer.status_code == 200
    assert counted()["challenger"].errors == 0, "who leaves is no failure"

    # A replica over there dies: its arm fails until there is another one, the champion's does not notice.
    (victim,) = replicas(control, SECOND)
    os.kill(victim, signal.SIGKILL)
    asked = {"champion": 0, "challenger": 0}

    def back() -> bool:
        for arm in asked:
            try:
                found = httpx.post(f"{url}/v1/completions", json=BODY, headers=session(plan, arm), timeout=60)
            except httpx.HTTPError as error:
                pytest.fail(f"{arm}: {error!r}")
            asked[arm] += 1
            assert arm == "challenger" or found.status_code == 200, found.text
            assert found.status_code in (200, 503) and found.headers["x-altiplano-arm"] == arm, found.text
        return found.status_code == 200 and victim not in replicas(control, SECOND)

    eventually(back)
    carry_out(control, plan, State(Phase.rolled_back))
    eventually(lambda: set(control.status()["applications"]) == {"altiplano"})
    assert httpx.post(f"{url}/v1/completions", json=BODY, timeout=60).status_code == 200
    control.undeploy()
