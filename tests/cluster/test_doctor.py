"""`cluster status`, `doctor` and `logs`: what is wrong with a release, and what to do about it."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import HEAD_POD, Ran
from stand_in import FullCluster
from support.charts import NAMESPACE, Object

from altiplano.cluster.doctor_pods import trouble

Altiplano = Callable[..., Ran]
OPERATOR = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "kuberay-operator", "namespace": "kuberay", "labels": {"app.kubernetes.io/name": "kuberay-operator"}},
    "spec": {
        "replicas": 1,
        "template": {"spec": {"containers": [{"name": "manager", "image": "quay.io/kuberay/operator:v1.7.0"}]}},
    },
}


def _node(name: str, gpus: int) -> Object:
    allocatable = {"cpu": "8", "nvidia.com/gpu": str(gpus)} if gpus else {"cpu": "8"}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {}, "status": {"allocatable": allocatable}}


@pytest.fixture
def healthy(running: FullCluster) -> FullCluster:
    """A release in which everything runs."""
    running.put(OPERATOR, {"readyReplicas": 1})
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "altiplano-secrets", "namespace": NAMESPACE}}
    running.put({**secret, "data": {"mlflow-admin-password": "aGVsbG8="}})
    running.put(_node("a", 0))
    running.put(_node("b", 4))
    for kind in ("deployments", "statefulsets"):
        for manifest in [o for (plural, _), o in running.objects.items() if plural == kind]:
            running.put(manifest, {"readyReplicas": manifest["spec"]["replicas"]})
    for claim in [o for (plural, _), o in running.objects.items() if plural == "persistentvolumeclaims"]:
        running.put(claim, {"phase": "Bound", "capacity": {"storage": "100Gi"}})
    service = running.get("rayservices", "trial-altiplano-endpoint")
    told = {"altiplano": {"status": "RUNNING"}}
    running.put(
        service,
        {
            "conditions": [{"type": "Ready", "status": "True"}],
            "activeServiceStatus": {"rayClusterName": "trial-altiplano-endpoint-7xk2p", "applicationStatuses": told},
        },
    )
    head = running.get("pods", HEAD_POD)
    status = head["status"]
    ready = [*status["containerStatuses"], {"name": "autoscaler", "ready": True, "state": {"running": {}}}]
    running.put(head, {**status, "containerStatuses": ready})
    return running


def _verdicts(ran: Ran) -> dict[str, str]:
    return {check["name"]: check["verdict"] for check in json.loads(ran.out)}


def test_a_healthy_release_has_no_complaints(healthy: FullCluster, altiplano: Altiplano) -> None:
    ran = altiplano("cluster", "doctor", "-o", "json")
    assert set(_verdicts(ran).values()) == {"ok"}, ran.out
    assert ran.code == 0
    lines = {
        line["part"].strip(): (line["state"], line["detail"])
        for line in json.loads(altiplano("cluster", "status", "-o", "json").out)
    }
    assert lines["KubeRay"] == ("ready", "v1.7.0 in namespace kuberay")
    assert lines["RayCluster trial-altiplano-jobs"] == ("ready", f"head {HEAD_POD}, autoscaler runs")
    assert lines["training"] == ("0/0", "0 to 4")
    assert lines["RayService trial-altiplano-endpoint"] == ("ready", "altiplano RUNNING")
    assert lines["GPUs"] == ("4", "0 held, 1 nodes with GPUs")
    assert lines["mlflow"][0] == "1/1"
    assert "volume trial-altiplano-models" in altiplano("cluster", "status").out


def test_nothing_installed_says_what_comes_first(empty: FullCluster, altiplano: Altiplano) -> None:
    ran = altiplano("cluster", "doctor")
    assert ran.code == 1
    assert "KubeRay's operator is not installed" in ran.out and "step 1 of docs/install.md" in ran.out
    assert "has nothing of a release trial" in ran.out
    missing = altiplano("jobs", "submit", "--", "true")
    assert missing.code == 2 and "altiplano cluster install" in missing.err


def test_each_broken_part_is_named_with_what_to_do(healthy: FullCluster, altiplano: Altiplano) -> None:
    healthy.put({**OPERATOR, "spec": json.loads(json.dumps(OPERATOR["spec"]).replace("v1.7.0", "v1.4.2"))}, {"readyReplicas": 1})
    claim = next(o for (plural, _), o in healthy.objects.items() if plural == "persistentvolumeclaims")
    healthy.put(claim, {"phase": "Pending"})
    service = healthy.get("rayservices", "trial-altiplano-endpoint")
    broken = copy.deepcopy(service["status"])
    broken["activeServiceStatus"]["applicationStatuses"]["altiplano"] = {
        "status": "DEPLOY_FAILED",
        "message": "no such model: llama",
    }
    healthy.put(service, broken)
    cluster = healthy.get("rayclusters", "trial-altiplano-jobs")
    healthy.put(cluster, {"conditions": [{"type": "HeadPodReady", "status": "False"}]})
    healthy.events.append(
        {
            "involvedObject": {"name": "trial-altiplano-jobs"},
            "type": "Warning",
            "reason": "InvalidRayClusterSpec",
            "message": "authOptions needs rayVersion",
            "lastTimestamp": "2026-11-21T11:00:00Z",
        }
    )
    healthy.delete(("secrets", "token-of-jobs"))
    ran = altiplano("cluster", "doctor", "-o", "json")
    failed = {
        check["name"]: f"{check['detail']} -> {check['advice']}" for check in json.loads(ran.out) if check["verdict"] == "fail"
    }
    assert ran.code == 1
    assert "v1.4.2 is older than 1.5.1" in failed["operator"]
    assert (
        "not bound" in failed[f"volume {claim['metadata']['name']}"]
        and "storageclass" in failed[f"volume {claim['metadata']['name']}"]
    )
    assert "no such model: llama" in failed["RayService trial-altiplano-endpoint"]
    assert "InvalidRayClusterSpec: authOptions needs rayVersion" in failed["RayCluster trial-altiplano-jobs"]
    assert "step 3 of docs/install.md" in failed["Secret token-of-jobs"]
    assert "token-of-jobs" in failed["Ray of trial-altiplano-jobs"]


def test_what_an_account_may_not_see_is_said_and_the_rest_goes_on(healthy: FullCluster, altiplano: Altiplano) -> None:
    healthy.refusals["nodes"] = 403
    checks = {check["name"]: check for check in json.loads(altiplano("cluster", "doctor", "-o", "json").out)}
    assert checks["gpus"]["verdict"] == "warn" and "nodes is forbidden" in checks["gpus"]["detail"]
    assert checks["Ray of trial-altiplano-jobs"]["verdict"] == "ok"
    assert ["GPUs", "unknown"] in [
        [line["part"], line["state"]] for line in json.loads(altiplano("cluster", "status", "-o", "json").out)
    ]


def test_logs_of_a_component(healthy: FullCluster, altiplano: Altiplano) -> None:
    healthy.logs[HEAD_POD] = "one\ntwo\nthree\n"
    ran = altiplano("cluster", "logs", "jobs", "--tail", "2")
    assert ran.out == "two\nthree\n" and HEAD_POD in ran.err
    assert altiplano("cluster", "logs", "jobs", "--follow", "--tail", "1").out == "three\n"
    wrong = altiplano("cluster", "logs", "cache")
    assert wrong.code == 2 and "choose one of" in wrong.err
    none = altiplano("cluster", "logs", "mlflow")
    assert none.code == 2 and "cluster status" in none.err


def _pod(status: Object, **metadata: Any) -> Object:
    return {"metadata": {"name": "worker", **metadata}, "spec": {"containers": [{"name": "ray-worker"}]}, "status": status}


def _container(state: Object, **fields: Any) -> Object:
    return {"name": "ray-worker", "ready": False, "state": state, **fields}


UNSCHEDULED = {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False"}]}


@pytest.mark.parametrize(
    ("status", "reason", "advice"),
    [
        (
            {
                **UNSCHEDULED,
                "conditions": [
                    {
                        **UNSCHEDULED["conditions"][0],
                        "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: 0/3",
                    }
                ],
            },
            "0/3 nodes are available: 3 Insufficient nvidia.com/gpu",
            "no node has that many GPUs free",
        ),
        (
            {
                **UNSCHEDULED,
                "conditions": [
                    {**UNSCHEDULED["conditions"][0], "message": "1 node(s) had untolerated taint {nvidia.com/gpu: present}"}
                ],
            },
            "untolerated taint",
            "add tolerations",
        ),
        (
            {
                "phase": "Pending",
                "containerStatuses": [_container({"waiting": {"reason": "ImagePullBackOff", "message": "not found"}})],
            },
            "ImagePullBackOff",
            "push the image",
        ),
        (
            {
                "phase": "Pending",
                "containerStatuses": [
                    _container({"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "x" not found'}})
                ],
            },
            'secret "x" not found',
            "step 3",
        ),
        (
            {
                "phase": "Running",
                "containerStatuses": [
                    _container(
                        {"waiting": {"reason": "CrashLoopBackOff"}},
                        lastState={"terminated": {"reason": "OOMKilled", "exitCode": 137}},
                        restartCount=3,
                    )
                ],
            },
            "out of memory",
            "resources.limits.memory",
        ),
        (
            {
                "phase": "Running",
                "containerStatuses": [
                    _container(
                        {"waiting": {"reason": "CrashLoopBackOff"}}, lastState={"terminated": {"exitCode": 1}}, restartCount=1
                    )
                ],
            },
            "ended with code 1, 1 restart",
            "--previous",
        ),
        ({"phase": "Failed", "reason": "Evicted", "message": "low on memory"}, "Evicted: low on memory", "the node ended it"),
        (
            {"phase": "Pending", "initContainerStatuses": [{"name": "wait-gcs-ready", "ready": False, "state": {"running": {}}}]},
            "still in wait-gcs-ready",
            "wait for their head",
        ),
    ],
)
def test_why_a_pod_does_not_start(status: Object, reason: str, advice: str) -> None:
    found = trouble(_pod(status), [], 600)
    assert found is not None and reason in found.reason and advice in found.advice


def test_pods_that_run_end_or_have_just_begun_are_left_alone() -> None:
    ready = {
        "phase": "Running",
        "conditions": [{"type": "Ready", "status": "True"}],
        "containerStatuses": [_container({"running": {}})],
    }
    assert trouble(_pod(ready), [], 600) is None
    assert trouble(_pod({"phase": "Succeeded"}), [], 600) is None
    assert trouble(_pod({"phase": "Pending"}), [], 30) is None
    assert trouble(_pod({"phase": "Pending"}, deletionTimestamp="2026-11-21T00:00:00Z"), [], 600) is None
    mount = {"reason": "FailedMount", "message": "references non-existent secret key: auth_token"}
    stuck = trouble(_pod({"phase": "Pending"}), [mount], 600)
    assert stuck is not None and "auth_token" in stuck.reason
