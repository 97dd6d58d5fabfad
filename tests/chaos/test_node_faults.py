"""A cluster of two nodes on this machine: nodes that die or are told to leave, a GCS that dies, load that comes and goes."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from altiplano import spec
from altiplano.cluster import local_ray, processes
from altiplano.cluster.processes import free_port
from altiplano.serve import ServeControl, deploy

from .conftest import SETTINGS, Platform, Traffic, eventually, running_ray

pytestmark = pytest.mark.slow

RECOVERY_S = 240.0  # a node starts three processes that import Ray, a replica imports torch
ENVIRONMENT = {
    # A dead node is noticed after seconds, not after half a minute.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}


class Cluster:
    """A head with room for one replica whose GCS keeps its tables on disk, and further nodes as `ray start` makes them."""

    def __init__(self, workspace: Path) -> None:
        self.workspace, self._nodes = workspace, list[psutil.Popen]()
        self._gcs: psutil.Popen | None = None
        self.control: ServeControl = running_ray(workspace, num_cpus=1)
        self.add()

    def add(self) -> psutil.Popen:
        """One more node with room for one replica."""
        head = local_ray.find(self.workspace)
        assert head is not None
        # As in `local_ray`: a raylet waits only so long for its agents to choose.
        ports = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port", "runtime-env-agent-port")
        options = ["--num-cpus=1", "--node-ip-address=127.0.0.1", *(f"--{port}={free_port()}" for port in ports)]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={head.address}", "--block", *options]
        environment = processes.mark(self.workspace) | local_ray.environment(self.workspace)
        # On a busy machine Ray's own half minute for a start may be too short: then it leaves, and the next attempt follows.
        for _ in range(local_ray.ATTEMPTS):
            node = psutil.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
            if any("Ray runtime started" in line for line in node.stdout):
                self._nodes.append(node)
                return node
            _gone(node)
        pytest.fail("no node could be started")

    def kill(self, node: psutil.Popen) -> None:
        """Everything on a node at once, as when its power goes."""
        everything = [*node.children(recursive=True), node]
        # Stopped first: else one that is still alive could answer for those that are dead already.
        for end in (psutil.Process.suspend, psutil.Process.kill):
            for process in everything:
                with contextlib.suppress(psutil.NoSuchProcess):
                    end(process)
        psutil.wait_procs(everything, timeout=30)
        _gone(node)
        self._nodes.remove(node)

    def terminate(self, node: psutil.Popen) -> None:
        """SIGTERM to `ray start --block`, as a kubelet ends a pod; returns when the node is gone."""
        node.terminate()
        _gone(node)
        self._nodes.remove(node)

    def close(self) -> None:
        """End every process."""
        local_ray.stop(self.workspace)
        for node in self._nodes:
            _gone(node)
        if self._gcs is not None:
            _gone(self._gcs)

    @property
    def node(self) -> psutil.Popen:
        """The node that joined last."""
        return self._nodes[-1]

    def start_gcs(self, command: list[str], environment: dict[str, str]) -> None:
        """Another GCS where the dead one was."""
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._gcs = psutil.Popen(command, env=environment, start_new_session=True, **quiet)

    def gcs(self) -> psutil.Process:
        (found,) = [p for p in processes.marked(self.workspace) if p.name() == "gcs_server"]
        return found


def _gone(node: psutil.Popen) -> None:
    node.wait(timeout=RECOVERY_S)
    node.poll()  # so that subprocess knows it too
    if node.stdout is not None:
        node.stdout.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    workspace = tmp_path_factory.mktemp("nodes")
    with pytest.MonkeyPatch.context() as patch:
        store = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(workspace / "gcs")}
        for name, value in (ENVIRONMENT | store).items():
            patch.setenv(name, value)
        made = Cluster(workspace)
        yield made
        made.close()


@pytest.fixture
def two(cluster: Cluster) -> Platform:
    """A replica on each of two nodes."""
    return endpoint(cluster, min_replicas=2, max_replicas=2)


def endpoint(cluster: Cluster, **scaling: Any) -> Platform:
    """The endpoint with so many replicas; the port stays, so nothing restarts that can stay."""
    listening = cluster.control.listening()
    port = free_port() if listening is None else listening[1]
    wanted = spec.Serve(
        port=port,
        max_num_seqs=8,
        max_model_len=512,
        kv_cache_tokens=16384,
        graceful_shutdown_timeout_s=60,
        limits=spec.ServeLimits(max_queued_seqs=32),
        autoscaling=spec.ServeAutoscaling.model_validate(scaling),
    )
    deploy(SETTINGS, wanted, cluster.control)
    platform = Platform(cluster.control, wanted)
    eventually(lambda: len(platform.replicas()) == wanted.autoscaling.min_replicas, RECOVERY_S)
    return platform.wait()


def more_answers(traffic: Traffic, count: int) -> None:
    answered = traffic.statuses.count(200)
    eventually(lambda: traffic.statuses.count(200) >= answered + count, 120)


def test_the_endpoint_stays_up_while_the_gcs_is_dead(cluster: Cluster, two: Platform) -> None:
    replicas, gcs = two.replicas(), cluster.gcs()
    command, environment = gcs.cmdline(), gcs.environ()
    with Traffic(two.url, parallel=4, max_tokens=8) as traffic:
        gcs.kill()
        psutil.wait_procs([gcs], timeout=30)
        more_answers(traffic, 200)
        cluster.start_gcs(command, environment)
        eventually(lambda: two.replicas() == replicas, RECOVERY_S)
        more_answers(traffic, 50)
    assert traffic.broken == []
    # The tables are there again: what is asked for now is done.
    config = two.control.get_user_config()
    two.control.set_user_config(config | {"late_after_s": 20.0})
    assert two.control.get_user_config()["late_after_s"] == 20.0 and two.replicas() == replicas


def test_a_killed_node_costs_only_its_own_streams_and_capacity_comes_back(cluster: Cluster, two: Platform) -> None:
    victim = cluster.node
    (lost,) = set(two.replicas()) & {p.pid for p in victim.children(recursive=True)}
    with Traffic(two.url, parallel=4, max_tokens=16) as traffic:
        cluster.kill(victim)
        killed = time.monotonic()
        more_answers(traffic, 50)
        eventually(lambda: lost not in two.replicas(), RECOVERY_S)
        assert len(two.replicas()) == 1
        cluster.add()
        eventually(lambda: len(two.replicas()) == 2, RECOVERY_S)
        more_answers(traffic, 20)
    assert all(broken.begun < killed for broken in traffic.broken), (killed, traffic.broken)
    assert len(traffic.broken) <= traffic.parallel, "nobody loses two"


def test_a_node_that_is_told_to_leave_breaks_no_stream(cluster: Cluster, two: Platform) -> None:
    leaving = cluster.node
    (its,) = set(two.replicas()) & {p.pid for p in leaving.children(recursive=True)}
    cluster.add()
    with Traffic(two.url, parallel=4, max_tokens=64) as traffic:
        cluster.terminate(leaving)
        eventually(lambda: its not in (now := two.replicas()) and len(now) == 2, RECOVERY_S)
        more_answers(traffic, 20)
    assert traffic.broken == []


def test_load_makes_a_replica_appear_on_the_other_node_and_go_again(cluster: Cluster) -> None:
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_num_seqs": 4, "upscale_delay_s": 2, "downscale_delay_s": 5}
    platform = endpoint(cluster, **scaling)
    (first,) = platform.replicas()
    with Traffic(platform.url, parallel=16, max_tokens=64) as traffic:
        eventually(lambda: len(platform.replicas()) == 2, RECOVERY_S)
        (second,) = set(platform.replicas()) - {first}
        on_the_node = {p.pid for p in cluster.node.children(recursive=True)}
        assert len({first, second} & on_the_node) == 1, "one replica each"
        more_answers(traffic, 50)
    with Traffic(platform.url, parallel=1, max_tokens=8) as quiet:
        eventually(lambda: len(platform.replicas()) == 1, RECOVERY_S)
        more_answers(quiet, 10)
    assert traffic.broken == [] and quiet.broken == []
