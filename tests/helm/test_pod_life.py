"""The life of Ray's pods: they run on a read-only file system, and one that leaves drains first."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.scripts.scripts import drain_node
from support import charts, pods, sandbox
from support.charts import Object
from support.matrix import MATRIX

from altiplano.serve.keys import KeyFile

SCRIPT = charts.CHART / "files" / "drain_node.sh"
TOKEN = "t" * 32
# What one client does: a stream of so many tokens, each event on a line of its own, through the proxy of its node.
CLIENT = """
import json, sys, urllib.request
key, tokens = sys.argv[1], int(sys.argv[2])
body = {"model": "cria", "prompt": "The llama", "stream": True, "max_tokens": tokens, "ignore_eos": True}
headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
with urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:8000/v1/completions", json.dumps(body).encode(), headers)) as answer:
    for line in answer:
        if line.strip():
            print(line.decode().strip(), flush=True)
"""


def _pre_stop(pod: Object) -> list[str]:
    command: list[str] = pods.containers(pod)[0]["lifecycle"]["preStop"]["exec"]["command"]
    return command


@pytest.mark.parametrize("name", ["default", "cpu-trial", "tuned-endpoint"])
def test_the_kubelet_waits_longer_than_the_drain(chart: Path, helm4: charts.Helm4, name: str) -> None:
    objects = helm4.template(chart, MATRIX[name])
    workers = [
        pod
        for pod in pods.pods([*objects, charts.ray_cluster(objects)])
        if pod["metadata"]["labels"].get("ray.io/node-type") == "worker"
    ]
    assert len(workers) >= 2
    for pod in workers:
        *shell, script, _, seconds = _pre_stop(pod)
        assert shell == ["/bin/bash", "-c"]
        assert script == SCRIPT.read_text()
        assert int(seconds) + 30 <= pod["spec"]["terminationGracePeriodSeconds"]
    (service,) = charts.of_kind(objects, "RayService")
    (deployment,) = yaml.load(service["spec"]["serveConfigV2"], yaml.CSafeLoader)["applications"][0]["deployments"]
    (endpoint,) = [pod for pod in workers if pod["metadata"]["labels"]["ray.io/group"] == "endpoint"]
    assert int(_pre_stop(endpoint)[-1]) >= deployment["graceful_shutdown_timeout_s"] + 60, "time for the replica that takes over"


def test_ray_takes_the_options_of_the_drain() -> None:
    """Its command line says that it may change."""
    text = SCRIPT.read_text().replace("\\\n", " ")
    (command,) = re.findall(r"ray drain-node ([^;]+);", text)
    words = shlex.split(command.replace("$node", "0" * 56).replace("$seconds", "90"))
    given = drain_node.make_context("drain-node", words).params
    assert given["node_id"] == "0" * 56
    assert given["deadline_remaining_seconds"] == 90
    assert given["reason"] == "DRAIN_NODE_REASON_PREEMPTION"


def test_a_pod_without_ray_leaves_at_once(tmp_path: Path) -> None:
    """In a namespace of its own, where no process is a raylet."""
    if not sandbox.permitted():
        pytest.skip("namespaces need root and CAP_SYS_ADMIN")
    done = subprocess.run(
        ["unshare", "-pf", "--mount-proc", "bash", "-c", SCRIPT.read_text(), "drain", "600"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@dataclass(frozen=True)
class Running:
    """The endpoint of the CPU trial: its head, its one worker, and a key."""

    head: sandbox.Pod
    worker: sandbox.Pod
    key: str


@pytest.fixture(scope="module")
def endpoint(chart: Path, helm4: charts.Helm4, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Pods of the rendered RayService, without Kubernetes: its environment, its Ray parameters, its Serve config."""
    if not sandbox.permitted():
        pytest.skip("namespaces need root and CAP_SYS_ADMIN")
    (service,) = charts.of_kind(helm4.template(chart, MATRIX["cpu-trial"]), "RayService")
    head_pod, worker_pod = pods.pods([service])
    spec = service["spec"]["rayClusterConfig"]
    head_parameters = spec["headGroupSpec"]["rayStartParams"]
    worker_parameters = spec["workerGroupSpecs"][0]["rayStartParams"] | {"resources": json.dumps({"endpoint": 1})}
    folder = tmp_path_factory.mktemp("pods")
    for place in (folder, *list(folder.parents)[:2]):
        place.chmod(0o755)
    # The image's packages are compiled, and whoever runs them here may not write beside them.
    caches = folder / "head" / "pycache"
    compiling = {"PYTHONPYCACHEPREFIX": str(caches), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", f"import {', '.join(_IMPORTED)}"], env=compiling, check=True, timeout=200)
    shutil.copytree(caches, folder / "worker" / "pycache")
    # A busy machine may need longer than Ray waits for its own processes.
    start = ["bash", "-c", _START, "start", "ray", "start", "--block", "--object-store-memory=100000000"]
    head = sandbox.Pod(
        folder / "head",
        [*start, "--head", "--port=6379", "--node-ip-address=10.77.0.1", *_flags(head_parameters)],
        _environment(head_pod),
    )
    joining = ["--address=10.77.0.1:6379", "--node-ip-address=10.77.0.2", "--num-cpus=2"]
    worker = sandbox.Pod(folder / "worker", [*start, *joining, *_flags(worker_parameters)], _environment(worker_pod))
    try:
        sandbox.connect(head, worker)
        config = yaml.load(service["spec"]["serveConfigV2"], yaml.CSafeLoader)
        keys = worker.tmp / "api-keys.json"
        _, key = KeyFile(keys).create("test")
        keys.chmod(0o644)
        config["applications"][0]["args"]["api_keys_file"] = "/tmp/api-keys.json"
        deployed = head.run("python", "-c", _DEPLOY, text=json.dumps(config), timeout=420)
        assert deployed.returncode == 0, deployed.stdout + head.log() + worker.log()
        yield Running(head, worker, key)
    finally:
        worker.end()
        head.end()


_IMPORTED = (
    "ray.dashboard.agent",
    "ray.dashboard.dashboard",
    "ray._private.runtime_env.agent.main",
    "ray.util.client.server.server",
    "altiplano.serve.application",
    "altiplano.serve.engine_process",
)
# KubeRay's init container waits for the head in the same way.
_START = """
until [[ $* == *--head* ]] || wget -qO- http://10.77.0.1:8265/api/gcs_healthz; do sleep 1; done
for attempt in 1 2 3; do "$@" && exit; done
"""
# `serve deploy` as KubeRay does it: the REST interface of the head, until the application runs.
_DEPLOY = """
import json, sys, time, urllib.error, urllib.request
def ask(method, data=None):
    headers = {"Authorization": "Bearer TOKEN", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:8265/api/serve/applications/", data, headers, method=method)) as answer:
        return json.loads(answer.read() or b"null")
config, sent, status = sys.stdin.read().encode(), False, None
for _ in range(400):
    try:
        if not sent:
            ask("PUT", config)
            sent = True
        (application,) = ask("GET")["applications"].values()
        status = application["status"]
        if status == "RUNNING":
            sys.exit()
        if status == "DEPLOY_FAILED":
            sys.exit(application["message"])
    except (OSError, ValueError) as error:
        status = repr(error)
    time.sleep(1)
sys.exit(f"not running: {status}")
""".replace("TOKEN", TOKEN)


@pytest.mark.slow
def test_ray_and_the_endpoint_run_on_a_read_only_file_system(endpoint: Running) -> None:
    for pod in (endpoint.head, endpoint.worker):
        for place in ("/", "/home", str(charts.ROOT), str(Path(sys.prefix))):
            refused = subprocess.run(
                ["nsenter", "-t", str(pod.pid), "-m", "touch", f"{place}/x"], capture_output=True, text=True, check=False
            )
            assert "Read-only file system" in refused.stderr, "root itself cannot write"
    done = endpoint.worker.run("python", "-c", CLIENT, endpoint.key, "8")
    assert done.stdout.splitlines()[-1] == "data: [DONE]", done.stdout


@pytest.mark.slow
def test_a_worker_that_leaves_ends_its_stream(endpoint: Running) -> None:
    tokens = 400
    client = endpoint.worker.start("python", "-c", CLIENT, endpoint.key, str(tokens))
    assert client.stdout is not None
    first = client.stdout.readline()
    assert first.startswith("data: {"), first
    began = time.monotonic()
    pre_stop = endpoint.worker.run("bash", "-c", SCRIPT.read_text(), "drain", "100", timeout=130)
    assert pre_stop.returncode == 0, pre_stop.stdout
    assert time.monotonic() - began < 100, "Serve says that nothing is left before the time is over"
    rest = client.communicate(timeout=10)[0].splitlines()
    assert rest[-1] == "data: [DONE]", rest[-3:]
    assert sum('"text"' in line for line in [first, *rest]) >= tokens * 0.5, "tokens may share an event, but few do"
    left = endpoint.worker.run("ps", "-eo", "args").stdout
    assert "ray::ServeReplica" not in left


def _environment(pod: Object) -> dict[str, str]:
    """What the chart gives, and what KubeRay adds; Ray's agents are patient, because a busy machine starts them slowly."""
    given = {v["name"]: v.get("value", "unused") for v in pods.containers(pod)[0]["env"]}
    kuberay = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_ADDRESS": "10.77.0.1:6379"}
    return given | kuberay | {"RAY_agent_register_timeout_ms": "180000", "PYTHONPYCACHEPREFIX": "/tmp/pycache"}


def _flags(parameters: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in parameters.items()]
