"""`altiplano deploy` from end to end: a real registry, jobs on a real head, and the RayService in the stand-in."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import FILE, Ran
from stand_in import FullCluster

from altiplano.cluster import processes
from altiplano.cluster.diff import Effect
from altiplano.cluster.rayservice import serve_config, user_config
from altiplano.models.manifest import write_manifest
from altiplano.registry import Lineage, ModelRegistry, Tracker
from altiplano.registry.server import start_server

Altiplano = Callable[..., Ran]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real MLflow with one champion of `orders`, and one version that the gate has rejected."""
    monkeypatch.setenv(processes.MARK, str(tmp_path.resolve()))
    uri = start_server(tmp_path / "mlflow", processes.free_port()).uri
    tracker = Tracker(uri, "orders", str(tmp_path / "spool"))
    run = tracker.start_run("train", "train")
    assert tracker.flush(60)
    known = ModelRegistry(uri)
    for name, verdict in (("good", "promote"), ("bad", "reject")):
        adapter = tmp_path / name
        adapter.mkdir()
        (adapter / "adapter_model.safetensors").write_bytes(name.encode())
        write_manifest(adapter)
        version = known.register(adapter, "orders", run.run_id, _lineage(), tags={"gate": verdict, "summary": name}, params={})
        if verdict == "promote":
            known.promote("orders", version)
    yield uri
    processes.stop(processes.marked(tmp_path))


def _lineage() -> Lineage:
    digests = {"config_digest": "c", "base_digest": "b", "template_digest": "t", "adapter_digest": "a"}
    return Lineage.gather(
        **digests,
        base_model="meta-llama/Llama-3.2-1B-Instruct",
        base_revision=None,
        dataset_digests={"data": "d"},
        date_string="26 Jul 2024",
        mask_policy="assistant_only",
        seed=1,
        world_sizes=[1],
        tokens_seen=10,
        run_ids={"train": "r"},
        verdict="promote",
    )


@pytest.mark.slow
def test_the_champion_goes_from_the_registry_to_the_endpoint(
    running: FullCluster, registry: str, altiplano: Altiplano, tmp_path: Path
) -> None:
    """Jobs on a real head look up the alias and fetch the adapter; the RayService changes in the stand-in."""
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(FILE))
    words = ("deploy", str(file), "--tracking-uri", registry, "--directory", str(tmp_path / "adapters"))
    before = running.get("rayservices", "trial-altiplano-endpoint")["spec"]["serveConfigV2"]
    planned = altiplano(*words, "--keep-settings", "--dry-run", "-o", "json")
    assert planned.code == 0, planned.err
    answer = json.loads(planned.out)
    (changed,) = answer["changes"]
    assert answer["version"] == 1 and {change["effect"] for change in changed["changes"]} == {Effect.in_place}
    assert not (tmp_path / "adapters").exists(), "a dry run fetches nothing"
    assert running.get("rayservices", "trial-altiplano-endpoint")["spec"]["serveConfigV2"] == before
    done = altiplano(*words, "-y")
    assert done.code == 0 and "rolls the replicas" in done.out, done.err
    assert (tmp_path / "adapters" / "orders-1" / "adapter_model.safetensors").read_bytes() == b"good"
    live = running.get("rayservices", "trial-altiplano-endpoint")
    assert user_config(live)["aliases"] == {"champion": "orders-1"}
    assert serve_config(live)["applications"][0]["args"]["max_model_len"] == 4096
    assert "rayClusterConfig" in live["spec"], "the chart's part is untouched"
    rejected = altiplano(*words, "--version", "2", "-y")
    assert rejected.code == 2 and "the gate has rejected version 2" in rejected.err
    nobody = altiplano(*words, "--alias", "challenger", "-y")
    assert nobody.code == 2 and "no version with the alias challenger" in nobody.err
