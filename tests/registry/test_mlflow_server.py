"""Runs, spool and registry against a real MLflow server on SQLite."""

import os
import pickle
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from altiplano.models.manifest import write_manifest
from altiplano.registry import Lineage, MlflowSink, ModelRegistry, RegistryUnavailableError, Tracker
from altiplano.registry.server import MlflowServerError, ServerInfo, start_server

FLUSH_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop(info: ServerInfo) -> None:
    """End the server that this test started, and its workers; wait until they are gone."""
    server = psutil.Process(info.pid)
    family = [server, *server.children(recursive=True)]
    os.killpg(info.pid, signal.SIGKILL)
    psutil.wait_procs(family, timeout=30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerInfo]:
    info = start_server(tmp_path_factory.mktemp("mlflow"), free_port())
    yield info
    stop(info)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * 100)
    write_manifest(folder)
    return folder


def lineage() -> Lineage:
    return Lineage.gather(
        config_digest="c",
        base_model="cria",
        base_digest="b",
        base_revision=None,
        dataset_digests={"data": "d"},
        template_digest="t",
        date_string="26 Jul 2024",
        mask_policy="assistant_only",
        seed=1,
        world_sizes=[2],
        tokens_seen=10,
        adapter_digest="a",
        run_ids={"train": "r"},
        verdict="promote",
    )


def test_run_tree_is_found_again_with_its_metrics(server: ServerInfo, tmp_path: Path) -> None:
    tracker = Tracker(server.uri, "tree", str(tmp_path / "spool"))
    parent = tracker.start_run("pipeline-demo", "pipeline")
    child = tracker.start_run("trial-003 lr=4.2e-4 r=32", "trial", parent_run_id=parent.run_id, params={"learning_rate": 4.2e-4})
    child.log_metrics({"train/loss": 1.5}, 1)
    child.log_metrics({"train/loss": 0.5}, 2)
    child.end("FINISHED")
    assert tracker.flush(FLUSH_S)
    run = MlflowClient(server.uri).get_run(child.run_id)
    assert run.info.run_name == "trial-003 lr=4.2e-4 r=32"
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.data.metrics == {"train/loss": 0.5}
    assert run.data.params == {"learning_rate": "0.00042"}


def test_a_pickled_sink_reports_into_the_same_run(server: ServerInfo, tmp_path: Path) -> None:
    tracker = Tracker(server.uri, "sink", str(tmp_path / "spool"))
    run = tracker.start_run("train", "train")
    sink = pickle.loads(pickle.dumps(MlflowSink(server.uri, run.run_id, str(tmp_path / "spool"))))
    sink.log_metrics({"train/loss": 2.0}, 1)
    assert sink._tracked()._spool.flush(FLUSH_S)
    assert MlflowClient(server.uri).get_run(run.run_id).data.metrics == {"train/loss": 2.0}


def test_promote_and_roll_back_move_the_aliases(server: ServerInfo, tmp_path: Path, adapter: Path) -> None:
    tracker = Tracker(server.uri, "aliases", str(tmp_path / "spool"))
    registry = ModelRegistry(server.uri)
    assert registry.get("orders", "champion") is None
    versions = []
    for name in ("first", "second"):
        run_id = tracker.start_run(name, "register").run_id
        versions.append(registry.register(adapter, "orders", run_id, lineage(), tags={"gate": "promote"}, params={"r": 8}))
        assert registry.register(adapter, "orders", run_id, lineage(), tags={}, params={}) == versions[-1]
        registry.promote("orders", versions[-1])
    assert versions == [1, 2]
    assert {v.version: v.aliases for v in registry.versions("orders")} == {2: ("champion",), 1: ("previous",)}
    assert registry.rollback("orders") == 1
    assert {v.version: v.aliases for v in registry.versions("orders")} == {1: ("champion",), 2: ("previous",)}


def test_an_absent_server_is_one_clear_error() -> None:
    with pytest.raises(RegistryUnavailableError, match="does not answer"):
        ModelRegistry(f"http://127.0.0.1:{free_port()}").versions("orders")


def test_a_taken_port_is_one_clear_error(server: ServerInfo, tmp_path: Path) -> None:
    with pytest.raises(MlflowServerError, match="choose another port"):
        start_server(tmp_path / "other", int(server.uri.rsplit(":", 1)[1]))
