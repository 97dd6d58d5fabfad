"""RayJobs made from the chart's cluster: what KubeRay takes, of every version that we support."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import HEAD_POD, Ran, head_pod
from stand_in import FullCluster
from support import charts, crds, operator_rules
from support.charts import Object

from altiplano.cluster.rayjob import JobWish, RayJobError, gpus_of, ray_job

Altiplano = Callable[..., Ran]
WISHES = {
    "plain": JobWish("sweep", "python train.py"),
    "sized": JobWish("sweep", "python train.py", {"training": 2}, {"A": "1"}, "https://example.com/code.zip", retries=2),
    "queued": JobWish("sweep", "python train.py", {"training": 4, "preprocessing": 1}, queue="gpus"),
    "bounded": JobWish("sweep", "python train.py", keep_for_s=60, deadline_s=3600),
}


@pytest.fixture(scope="module")
def crd_folder() -> Path:
    found = crds.folder()
    if found is None:
        pytest.skip("no CRD files: set ALTIPLANO_CRDS, or run `make crds` where a network is")
    return found


@pytest.mark.parametrize("version", crds.KUBERAY_VERSIONS)
@pytest.mark.parametrize("wish", WISHES)
def test_kuberay_takes_the_job(objects: list[Object], crd_folder: Path, wish: str, version: str) -> None:
    made = ray_job(charts.ray_cluster(objects[:-1]), WISHES[wish])
    assert crds.kuberay(version).problems(made) == []
    assert operator_rules.broken(made) == []


def test_the_pods_of_a_job_are_those_of_the_release(objects: list[Object]) -> None:
    standing = charts.ray_cluster(objects[:-1])
    made = ray_job(standing, WISHES["sized"])["spec"]["rayClusterSpec"]
    assert made["headGroupSpec"] == standing["spec"]["headGroupSpec"]
    groups = {group["groupName"]: group for group in made["workerGroupSpecs"]}
    assert [(name, group["minReplicas"], group["replicas"], group["maxReplicas"]) for name, group in groups.items()] == [
        ("inference", 0, 0, 2),
        ("preprocessing", 0, 0, 4),
        ("training", 2, 2, 4),
    ]
    assert gpus_of(ray_job(standing, WISHES["sized"])) == (2, 6)


def test_a_queued_job_has_a_fixed_size(objects: list[Object]) -> None:
    made = ray_job(charts.ray_cluster(objects[:-1]), WISHES["queued"])
    assert made["spec"]["suspend"] is True and made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert not made["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]
    assert gpus_of(made) == (4, 4)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"name": "A_job"}, "lower case letters"),
        ({"name": "a" * 48}, "at most 47"),
        ({"workers": {"gpus": 1}}, "this release has"),
        ({"workers": {"training": 5}}, "rayCluster.workerGroups.training.maxReplicas"),
        ({"queue": "gpus"}, "--workers GROUP=COUNT"),
        ({"working_dir": "."}, "--to cluster"),
    ],
)
def test_what_cannot_run_is_refused(objects: list[Object], wish: dict[str, Any], words: str) -> None:
    with pytest.raises(RayJobError, match=words):
        ray_job(charts.ray_cluster(objects[:-1]), JobWish(**{"name": "sweep", "entrypoint": "python x.py"} | wish))


def test_a_plan_comes_before_the_job(installed: FullCluster, altiplano: Altiplano) -> None:
    words = ("jobs", "submit", "--to", "rayjob", "--name", "sweep", "--workers", "training=2", "--deadline", "12h")
    planned = altiplano(*words, "--dry-run", "-o", "json", "--", "python", "x.py")
    assert planned.code == 0 and json.loads(planned.out)["spec"]["activeDeadlineSeconds"] == 12 * 3600
    assert "GPUs 2, at most 6" in planned.err
    assert ("rayjobs", "sweep") not in installed.objects, "a dry run keeps nothing"
    assert altiplano(*words, "--", "python", "x.py").code == 2, "nobody can answer here"
    assert altiplano(*words, "-y", "--", "python", "x.py").out.strip() == "sweep"
    assert installed.get("rayjobs", "sweep")["spec"]["entrypoint"] == "python x.py"
    taken = altiplano(*words, "-y", "--", "python", "x.py")
    assert taken.code == 1 and "already exists" in taken.err
    wrong = altiplano("jobs", "submit", "--to", "rayjob", "--num-gpus", "1", "--", "true")
    assert wrong.code == 2 and "--workers" in wrong.err


def test_a_job_that_waits_is_deleted(installed: FullCluster, altiplano: Altiplano) -> None:
    altiplano("jobs", "submit", "--to", "rayjob", "--name", "sweep", "-y", "--", "python", "x.py")
    early = altiplano("jobs", "logs", "sweep")
    assert early.code == 2 and "has no cluster now" in early.err, early.err
    assert altiplano("jobs", "stop", "sweep", "--dry-run").code == 0 and ("rayjobs", "sweep") in installed.objects
    assert altiplano("jobs", "stop", "sweep", "-y").out.strip() == "deleted sweep"
    assert ("rayjobs", "sweep") not in installed.objects


def test_the_log_of_a_rayjob_comes_from_its_own_cluster(running: FullCluster, altiplano: Altiplano) -> None:
    """The operator's part: a cluster with its own head, and a submission to it."""
    altiplano("jobs", "submit", "--to", "rayjob", "--name", "sweep", "-y", "--", "echo", "found")
    standing = running.get("rayclusters", "trial-altiplano-jobs")
    child = copy.deepcopy(standing)
    child["metadata"] |= {"name": "sweep-x7k2p"}
    child["metadata"]["labels"] = {**standing["metadata"]["labels"], "ray.io/originated-from-crd": "RayJob"}
    running.put(child)
    running.put(head_pod(child, "sweep-x7k2p-head"))
    running.ports["sweep-x7k2p-head", 8265] = running.ports[HEAD_POD, 8265]
    altiplano("jobs", "submit", "--name", "sweep-9qj4d", "--", "echo", "found")
    status = {"jobId": "sweep-9qj4d", "jobStatus": "RUNNING", "rayClusterName": "sweep-x7k2p"}
    running.put(running.get("rayjobs", "sweep"), status)
    del running.ports[HEAD_POD, 8265]
    followed = altiplano("jobs", "logs", "-f", "sweep")
    assert followed.code == 0 and "found" in followed.out
