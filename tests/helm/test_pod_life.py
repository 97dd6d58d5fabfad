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
from datetime import datetime
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
# What one client does: stream after stream through the proxy of its node, until nobody takes the next one. Lines of JSON for each: one
# when it has begun, one when it has ended.
CLIENT = """
import json, sys, time, urllib.error, urllib.request
key, streams = sys.argv[1], int(sys.argv[2])
body = {"model": "cria", "prompt": "The llama", "stream": True, "max_tokens": 1500, "ignore_eos": True}
headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
for _ in range(streams):
    request = urllib.request.Request("http://127.0.0.1:8000/v1/completions", json.dumps(body).encode(), headers)
    began = time.time()
    try:
        answer = urllib.request.urlopen(request)
    except OSError:
        break
    with answer:
        lines = [answer.readline().strip()]
        print(json.dumps({"began": began}), flush=True)
        lines += [line.strip() for line in answer if line.strip()]
    print(json.dumps({"began": began, "ended": time.time(), "whole": lines[-1] == b"data: [DONE]"}), flush=True)
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
        capture_output=True, text=True, timeout=300, check=False,
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
    # A proxy stays for half a minute after its node's last replica, so answers get longer than that.
    values = charts.merged(MATRIX["cpu-trial"], {"endpoint": {"gracefulShutdownTimeoutSeconds": 60}})
    (service,) = charts.of_kind(helm4.template(chart, values), "RayService")
    head_pod, worker_pod = pods.pods([service])
    spec = service["spec"]["rayClusterConfig"]
    head_parameters = spec["headGroupSpec"]["rayStartParams"]
    worker_parameters = spec["workerGroupSpecs"][0]["rayStartParams"] | {"resources": json.dumps({"endpoint": 1})}
    folder = tmp_path_factory.mktemp("pods")
    for place in (folder, *list(folder.parents)[:2]):
        place.chmod(0o755)
    _compile(folder / "head", folder / "worker")
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


def _compile(*folders: Path) -> None:
    """The image's packages are compiled, and whoever runs them in these pods may not write beside them."""
    first, *others = [folder / "pycache" for folder in folders]
    environment = {"PYTHONPYCACHEPREFIX": str(first), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", f"import {', '.join(_IMPORTED)}"], env=environment, check=True, timeout=200)
    for other in others:
        shutil.copytree(first, other)


@pytest.mark.slow
def test_ray_and_the_endpoint_run_on_a_read_only_file_system(endpoint: Running) -> None:
    for pod in (endpoint.head, endpoint.worker):
        for place in ("/", "/home", str(charts.ROOT), str(Path(sys.prefix))):
            refused = subprocess.run(
                ["nsenter", "-t", str(pod.pid), "-m", "touch", f"{place}/x"], capture_output=True, text=True, check=False
            )
            assert "Read-only file system" in refused.stderr, "root itself cannot write"
    done = endpoint.worker.run("python", "-c", CLIENT, endpoint.key, "1")
    assert _ended(done.stdout)[0]["whole"], done.stdout


@pytest.mark.slow
def test_a_worker_that_leaves_ends_its_stream(endpoint: Running) -> None:
    client = endpoint.worker.start("python", "-c", CLIENT, endpoint.key, "1")
    assert client.stdout is not None
    assert "began" in client.stdout.readline(), "there is a stream before anybody leaves"
    began = time.monotonic()
    pre_stop = endpoint.worker.run("bash", "-c", SCRIPT.read_text(), "drain", "80", timeout=110)
    assert pre_stop.returncode == 0, pre_stop.stdout
    assert time.monotonic() - began < 80, "Serve says that nothing is left before the time is over"
    assert _ended(_rest(client))[0]["whole"]
    (log,) = endpoint.head.tmp.glob("ray/session_2*/logs/serve/controller_[0-9]*.log")
    assert "Migrating Replica" in log.read_text(), "Serve has learned of the drain"
    assert "ray::ServeReplica" not in endpoint.worker.run("ps", "-eo", "args").stdout


def _rest(client: subprocess.Popen[str]) -> str:
    """What a client says until it ends; `communicate` would lose lines that `readline` has buffered."""
    assert client.stdout is not None
    with client.stdout as stream:
        said = stream.read()
    client.wait(120)
    return said


def _ended(said: str) -> list[dict[str, Any]]:
    """What a client has said of streams that have ended."""
    return [told for told in map(json.loads, said.splitlines()) if "ended" in told]


def _check_streams(said: str, head: Path) -> None:
    """All are whole, and one of them ran when Serve began to stop the replica."""
    streams = _ended(said)
    assert all(stream["whole"] for stream in streams)
    (log,) = head.glob("ray/session_2*/logs/serve/controller_[0-9]*.log")
    (stopping,) = re.findall(r"^INFO (\S+ \S+) .*Stopping Replica\(.* \(currently", log.read_text(), re.MULTILINE)
    at = datetime.strptime(stopping, "%Y-%m-%d %H:%M:%S,%f").timestamp()
    assert any(stream["began"] < at < stream["ended"] for stream in streams), "the client streamed all the time"


@pytest.mark.slow
def test_a_machine_without_kubernetes_ends_its_streams_before_it_stops(tmp_path: Path) -> None:
    """compose.yaml's command and environment, for cria on the CPU."""
    if not sandbox.permitted():
        pytest.skip("namespaces need root and CAP_SYS_ADMIN")
    compose = yaml.safe_load((charts.ROOT / "compose.yaml").read_text())["services"]["endpoint"]
    config = yaml.safe_load((charts.ROOT / "k8s" / "compose-serve.yaml").read_text())
    (application,) = config["applications"]
    folder = tmp_path / "machine"
    for place in (tmp_path, *list(tmp_path.parents)[:2]):
        place.chmod(0o755)
    _compile(folder)
    _, key = KeyFile(folder / "api-keys.json").create("test")
    (folder / "api-keys.json").chmod(0o644)
    application["args"] = {"model": "cria", "served_model_name": "cria", "api_keys_file": "/tmp/api-keys.json"}
    application["deployments"][0]["ray_actor_options"] = {"num_cpus": 1}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert compose["command"] == ["/bin/bash", "/etc/altiplano/endpoint.sh", "/etc/altiplano/serve.yaml"]
    command = ["bash", str(charts.ROOT / "k8s" / "compose-endpoint.sh"), "/tmp/serve.yaml"]
    given = {name: value for name, value in compose["environment"].items() if name.startswith("RAY_SERVE_")}
    environment = given | _of_this_machine() | {"ALTIPLANO_GPUS": "0"}
    (tmp_path / "other").mkdir()
    machine, other = sandbox.Pod(folder, command, environment), sandbox.Pod(tmp_path / "other", ["sleep", "900"], {})
    try:
        sandbox.connect(machine, other)
        ready = machine.run("python", "-c", _UNTIL_READY, timeout=420)
        assert ready.returncode == 0, ready.stdout + machine.log()
        client = machine.start("python", "-c", CLIENT, key, "10000")
        assert client.stdout is not None
        assert "began" in client.stdout.readline()
        machine.run("kill", "-TERM", "1")
        _check_streams(_rest(client), folder)
        assert machine.wait(timeout=240) == 0, machine.log()
    finally:
        machine.end()
        other.end()


_UNTIL_READY = """
import sys, time, urllib.request
for _ in range(400):
    try:
        with urllib.request.urlopen("http://127.0.0.1:8000/health") as answer:
            sys.exit()
    except OSError as error:
        last = error
    time.sleep(1)
sys.exit(f"not ready: {last}")
"""


def _of_this_machine() -> dict[str, str]:
    """A token, and patience: a busy machine starts Ray's agents slowly."""
    patience = {
        "RAY_agent_register_timeout_ms": "180000",
        "PYTHONPYCACHEPREFIX": "/tmp/pycache",
    }
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN} | patience


def _environment(pod: Object) -> dict[str, str]:
    """What the chart gives, and what KubeRay adds."""
    given = {v["name"]: v.get("value", "unused") for v in pods.containers(pod)[0]["env"]}
    return given | _of_this_machine() | {"RAY_ADDRESS": "10.77.0.1:6379"}


def _flags(parameters: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in parameters.items()]
