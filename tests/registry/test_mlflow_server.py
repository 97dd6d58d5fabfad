"""Runs, spool and registry against a real MLflow server, on SQLite and on PostgreSQL."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from altiplano.cluster.processes import free_port
from altiplano.models.manifest import ManifestError, write_manifest
from altiplano.registry import LateSink, MlflowSink, ModelRegistry, RegistryUnavailableError, Tracker, spool
from altiplano.registry.server import MlflowServerError, ServerInfo, start_server

from .conftest import lineage, stop

FLUSH_S = 60.0


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * 100)
    write_manifest(folder)
    return folder


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
        (adapter / "adapter_model.safetensors").write_bytes(name.encode() * 100)
        write_manifest(adapter)
        run_id = tracker.start_run(name, "register").run_id
        versions.append(registry.register(adapter, "orders", run_id, lineage(), tags={"gate": "promote"}, params={"r": 8}))
        assert registry.register(adapter, "orders", run_id, lineage(), tags={}, params={}) == versions[-1]
        registry.promote("orders", versions[-1])
    assert versions == [1, 2]
    other_run = tracker.start_run("third", "register").run_id
    assert registry.register(adapter, "orders", other_run, lineage(), tags={"gate": "again"}, params={}) == 2, "the same bytes"
    registry.promote("orders", 2)
    assert {v.version: v.aliases for v in registry.versions("orders")} == {2: ("champion",), 1: ("previous",)}
    assert registry.rollback("orders") == 1
    assert {v.version: v.aliases for v in registry.versions("orders")} == {1: ("champion",), 2: ("previous",)}


def test_an_absent_server_is_one_clear_error() -> None:
    with pytest.raises(RegistryUnavailableError, match="does not answer"):
        ModelRegistry(f"http://127.0.0.1:{free_port()}").versions("orders")


def test_a_taken_port_is_one_clear_error(server: ServerInfo, tmp_path: Path) -> None:
    with pytest.raises(MlflowServerError, match="choose another port"):
        start_server(tmp_path / "other", int(server.uri.rsplit(":", 1)[1]))


def test_what_a_killed_process_measured_is_sent_by_the_next_one(server: ServerInfo, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    run = Tracker(server.uri, "killed", str(spool)).start_run("train", "train")
    code = (
        "import os, sys\nfrom altiplano.registry import MlflowSink\n"
        "sink = MlflowSink('http://127.0.0.1:9', sys.argv[1], sys.argv[2])\n"
        "for step in range(5): sink.log_metrics({'train/loss': 5.0 - step}, step)\nos.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, run.run_id, str(spool)]).returncode == -9
    (left,) = [path for path in spool.glob("*.jsonl") if path.stat().st_size]
    # The server has moved since: nothing answers at the address that the dead process was given.
    Tracker(server.uri, "killed", str(spool))
    history = MlflowClient(server.uri).get_metric_history(run.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(step, 5.0 - step) for step in range(5)]
    assert not left.exists()


def test_what_another_process_sends_first_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        (tmp_path / f"{name}.jsonl").write_text('{"run_id": "r", "uri": "http://127.0.0.1:9", "tags": {}}\n')

    def send(*_: object) -> bool:
        for path in tmp_path.iterdir():
            path.unlink()
        return True

    monkeypatch.setattr(spool, "_send", send)
    assert spool.replay(tmp_path, "http://127.0.0.1:9") == 1


def test_measurements_wait_while_the_server_is_away(tmp_path: Path) -> None:
    port = free_port()
    info = start_server(tmp_path / "mlflow", port)
    tracker = Tracker(info.uri, "outage", str(tmp_path / "spool"))
    run = tracker.start_run("train", "train")
    run.log_metrics({"train/loss": 3.0}, 1)
    assert tracker.flush(FLUSH_S)
    stop(info)
    run.log_metrics({"train/loss": 2.0}, 2)
    assert not tracker.flush(1.0), "nothing can have been sent"
    late = LateSink(
        lambda: MlflowSink(
            info.uri, Tracker(info.uri, "outage", str(tmp_path / "late")).start_run("trial", "t").run_id, str(tmp_path / "late")
        )
    )
    late.log_metrics({"eval/loss": 7.0}, 1)
    with pytest.raises(RegistryUnavailableError, match="run the same command again"):
        tracker.start_run("deploy", "deploy")
    again = start_server(tmp_path / "mlflow", port)
    try:
        assert tracker.flush(FLUSH_S)
        history = MlflowClient(again.uri).get_metric_history(run.run_id, "train/loss")
        assert [m.value for m in history] == [3.0, 2.0]
        late._next_try = 0.0  # as if the pause between two tries were over
        late.log_metrics({"eval/loss": 6.0}, 2)
        assert late._sink is not None and late._sink._tracked()._spool.flush(FLUSH_S)
        trial = MlflowClient(again.uri).get_metric_history(late._sink.run_id, "eval/loss")
        assert [m.value for m in trial] == [7.0, 6.0], "the first was measured while no server was there"
    finally:
        stop(again)


def test_a_flipped_byte_in_the_registry_is_refused(server: ServerInfo, tmp_path: Path, adapter: Path) -> None:
    run_id = Tracker(server.uri, "bytes", str(tmp_path / "spool")).start_run("register", "register").run_id
    registry = ModelRegistry(server.uri)
    version = registry.register(adapter, "tampered", run_id, lineage(), tags={}, params={})
    good = registry.download("tampered", version, tmp_path / "good")
    weights = "adapter_model.safetensors"
    assert (good / weights).read_bytes() == (adapter / weights).read_bytes()
    stored = MlflowClient(server.uri).get_model_version("tampered", str(version)).source.removeprefix("models:/")
    [kept] = [p for p in (Path(server.log).parent / "artifacts").rglob(weights) if stored in p.parts]
    kept.write_bytes(b"W" + kept.read_bytes()[1:])
    with pytest.raises(ManifestError, match="changed"):
        registry.download("tampered", version, tmp_path / "bad")
