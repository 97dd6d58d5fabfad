"""A release of the chart in a stand-in for the Kubernetes API, with a real Ray head behind its pods' ports."""

import base64
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "helm"))
sys.path.insert(0, str(Path(__file__).parent))

from stand_in import Answers, FullCluster
from support import charts
from support.charts import NAMESPACE, RELEASE, Object
from support.fake_kubernetes import serving
from support.releases import kubeconfig

from altiplano import cli
from altiplano.cluster import local_ray

# A pipeline file for `altiplano deploy`.
FILE = {
    "model": {"model_name_or_path": "meta-llama/Llama-3.2-1B-Instruct"},
    "data": {"datasets": [{"path": "train.jsonl"}], "eval_datasets": [{"path": "eval.jsonl"}]},
    "run": {"name": "orders"},
    "scaling": {"use_gpu": True},
    "serve": {"max_model_len": 4096, "max_num_seqs": 128},
}
HEAD_POD = "trial-altiplano-jobs-head-abcde"


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """What the chart renders by default, with the RayCluster of the hook."""
    rendered = charts.Helm4().template(charts.working_copy(tmp_path_factory.mktemp("chart")), {})
    return [*rendered, charts.ray_cluster(rendered)]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FullCluster]:
    """A cluster in which nothing is installed, and a kubeconfig that names it."""
    cluster = FullCluster()
    file = tmp_path / "kubeconfig"
    file.touch(mode=0o600)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KUBECONFIG", str(file))
    with serving(cluster, Answers):
        file.write_text(kubeconfig(cluster))
        yield cluster


@pytest.fixture
def installed(empty: FullCluster, objects: list[Object]) -> FullCluster:
    """A release whose jobs cluster is ready; its head's dashboard is nobody's yet."""
    for manifest in objects:
        if manifest["kind"] not in ("Pod", "Job"):
            empty.put(manifest)
    cluster = empty.get("rayclusters", "trial-altiplano-jobs")
    empty.put(cluster, {"state": "ready", "conditions": [{"type": "HeadPodReady", "status": "True"}]})
    empty.put(head_pod(cluster))
    return empty


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[local_ray.RayHead, str]]:
    """A real Ray head that asks for a token, and the token."""
    workspace = tmp_path_factory.mktemp("ray")
    with pytest.MonkeyPatch.context() as patch:
        # Jobs say `python`, which in the image is the one with our packages.
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        head = local_ray.start(workspace, 4)
    yield head, local_ray.token(workspace)
    local_ray.stop(workspace)


@pytest.fixture
def running(installed: FullCluster, ray_head: tuple[local_ray.RayHead, str]) -> FullCluster:
    """A release whose head is the real one: its dashboard behind the pod's port, its token in the Secret."""
    head, token = ray_head
    installed.ports[HEAD_POD, 8265] = int(head.dashboard.rsplit(":", 1)[1])
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "token-of-jobs", "namespace": NAMESPACE}}
    installed.put(secret | {"data": {"auth_token": base64.b64encode(token.encode()).decode()}})
    return installed


def head_pod(cluster: Object, name: str = HEAD_POD) -> Object:
    """The head of a RayCluster as the operator makes it: labels, the token from its Secret, and running."""
    template = cluster["spec"]["headGroupSpec"]["template"]
    (container,) = template["spec"]["containers"]
    token = {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": "token-of-jobs", "key": "auth_token"}}}
    labels = {**template["metadata"]["labels"], "ray.io/cluster": cluster["metadata"]["name"], "ray.io/node-type": "head"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels},
        "spec": {**template["spec"], "containers": [{**container, "env": [*container["env"], token]}]},
        "status": {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{"name": container["name"], "ready": True, "state": {"running": {}}}],
        },
    }


class Ran:
    """How a command ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def altiplano(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command of the CLI as its console script does, for the release of the chart's tests."""

    def run(*arguments: str) -> Ran:
        words = list(arguments)
        if "--dashboard-url" not in words:
            place = words.index("--") if "--" in words else len(words)
            words[place:place] = ["--release", RELEASE]
        monkeypatch.setattr(sys, "argv", ["altiplano", *words])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        return Ran(code, *capsys.readouterr())

    return run
