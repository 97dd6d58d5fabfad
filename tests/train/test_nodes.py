"""Nodes that go: one that is killed and one that is given notice. The run ends as an undisturbed one does."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import ray
from ray._private.node import Node
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray.train.v2._internal.execution.context import get_train_context

from altiplano import spec
from altiplano.data import Prepared
from altiplano.train import TrainResult, fit
from altiplano.train.report import PREEMPTION_CHECK_STEPS

from .conftest import RAY, Held, Nowhere, node_arguments, pipeline, whole_steps

pytestmark = [
    pytest.mark.filterwarnings(*RAY),
    pytest.mark.timeout(1200),
]
PreparedData = tuple[Path, Prepared]
SAVE_STEPS = 7
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # A dead node is noticed after seconds, not after half a minute.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head without CPUs and two nodes of one CPU: each worker has a node of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args=node_arguments(0))
        try:
            for _ in range(2):
                cluster.add_node(wait=False, **node_arguments(1))
            cluster.wait_for_nodes(timeout=240)
            ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False, runtime_env={"env_vars": ENVIRONMENT})
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def replace(nodes: Cluster, node: Node) -> None:
    """Kill a node; another comes when it does: Ray's own patience with a new one is 30 s."""
    nodes.remove_node(node, allow_graceful=False)
    nodes.add_node(wait=False, **node_arguments(1))


class Noticed(Held):
    """Stopped after the first checkpoint until the run has been given notice, and again after the checkpoint that it makes then."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        super().log_metrics(metrics, step)
        if step == SAVE_STEPS + 1:
            # Rank 0's own: to ask as the product does takes all ranks.
            self.hold(lambda: get_train_context().preemption_context.preemption_info is not None)


def settings(rows: Path) -> spec.Pipeline:
    return pipeline(rows, scaling={"num_workers": 2}, training={"num_train_epochs": 5, "save_steps": SAVE_STEPS})


def wait_for_checkpoint(run_dir: Path, alive: Callable[[], bool], *, regular: bool) -> bool:
    """Until there is a whole checkpoint that was (not) made on schedule; False when the run ends without one."""
    pause = threading.Event()
    while alive():
        if any((step % SAVE_STEPS == 0) is regular for step in whole_steps(run_dir)):
            return True
        pause.wait(0.05)
    return False


class Run:
    """A run of two workers in a thread: Ray wants nodes to be added from the main one."""

    def __init__(self, rows: Path, prepared: PreparedData, out: Path, sink: Nowhere | None = None) -> None:
        self.checkpoints = out / "test"
        self.result: TrainResult | BaseException | None = None

        def work() -> None:
            try:
                self.result = fit(settings(rows), prepared[0], out, sink=sink or Nowhere(), name="test")
            except BaseException as error:
                self.result = error

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def wait_for_checkpoint(self, *, regular: bool) -> None:
        if not wait_for_checkpoint(self.checkpoints, self._thread.is_alive, regular=regular):
            pytest.fail(f"the run ended without such a checkpoint: {self.result}")

    def finish(self) -> TrainResult:
        self._thread.join()
        if not isinstance(self.result, TrainResult):
            pytest.fail(f"the run failed: {self.result!r}")
        return self.result


@pytest.fixture(scope="module")
def undisturbed(nodes: Cluster, rows: Path, prepared: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return Run(rows, prepared, tmp_path_factory.mktemp("undisturbed")).finish()


DRIVER = """
import sys
from pathlib import Path
import ray
from tests.train.conftest import Held
from tests.train.test_nodes import ENVIRONMENT, SAVE_STEPS, settings
from altiplano.train import fit
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False, runtime_env={"env_vars": ENVIRONMENT})
out = Path(sys.argv[4])
fit(settings(Path(sys.argv[2])), Path(sys.argv[3]), out, sink=Held(out / "never", SAVE_STEPS), name="test")
"""


def check_equal(result: TrainResult, expected: TrainResult) -> None:
    assert result.resumed_from > 0 and expected.resumed_from == 0, "it went on from a checkpoint"
    assert result.last_loss == pytest.approx(expected.last_loss, abs=1e-4)
    assert result.eval_loss == pytest.approx(expected.eval_loss, abs=1e-4)
    assert dict(result.loss_curve) == pytest.approx(dict(expected.loss_curve), abs=1e-4)
    assert result.tokens_seen == expected.tokens_seen


def test_a_killed_node_is_replaced_and_nothing_is_lost(
    nodes: Cluster, rows: Path, prepared: PreparedData, undisturbed: TrainResult, tmp_path: Path
) -> None:
    free = tmp_path / "free"
    run = Run(rows, prepared, tmp_path, Held(free, SAVE_STEPS))
    run.wait_for_checkpoint(regular=True)
    replace(nodes, sorted(nodes.worker_nodes, key=lambda node: node.unique_id)[0])
    free.touch()
    check_equal(run.finish(), undisturbed)


def test_a_node_that_is_given_notice_leaves_a_checkpoint_first(
    nodes: Cluster, rows: Path, prepared: PreparedData, undisturbed: TrainResult, tmp_path: Path
) -> None:
    free = tmp_path / "free"
    run = Run(rows, prepared, tmp_path, Noticed(free, PREEMPTION_CHECK_STEPS))
    run.wait_for_checkpoint(regular=True)
    leaving = sorted(nodes.worker_nodes, key=lambda node: node.unique_id)[0]
    accepted, reason = GcsClient(address=nodes.address).drain_node(
        leaving.node_id, autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "the spot market", 2**62
    )
    assert accepted, reason
    run.wait_for_checkpoint(regular=False)
    replace(nodes, leaving)
    free.touch()
    check_equal(run.finish(), undisturbed)


def test_a_killed_driver_is_followed_by_another(
    nodes: Cluster, rows: Path, prepared: PreparedData, undisturbed: TrainResult, tmp_path: Path
) -> None:
    arguments = [nodes.address, str(rows), str(prepared[0]), str(tmp_path)]
    root = Path(__file__).parents[2]
    first = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], env=os.environ | {"PYTHONPATH": str(root)}, cwd=root)
    assert wait_for_checkpoint(tmp_path / "test", lambda: first.poll() is None, regular=True)
    first.kill()
    first.wait()
    check_equal(Run(rows, prepared, tmp_path).finish(), undisturbed)
