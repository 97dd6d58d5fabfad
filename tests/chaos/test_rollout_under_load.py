"""Rollouts by `altiplano rollout` on a real Ray Serve behind HAProxy, with MLflow, two replicas and traffic that counts what fails."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from mlflow import MlflowClient
from tests.registry.conftest import lineage
from tests.serve.conftest import make_adapter, make_base

from altiplano import spec
from altiplano.cluster import processes
from altiplano.cluster.processes import free_port
from altiplano.data.templates import ChatTemplate
from altiplano.models.manifest import write_manifest
from altiplano.pipeline import services
from altiplano.pipeline.rollouts import EXPERIMENT
from altiplano.registry import ModelRegistry, Tracker
from altiplano.registry.server import start_server
from altiplano.serve import ServeControl
from altiplano.serve.application import START_TIMEOUT_S, serve_config
from altiplano.serve.control import OURS, RefusedConfigError, endpoint_of
from altiplano.serve.evidence import AbClient
from altiplano.serve.rollout_store import Saved, Store

from .conftest import SETTINGS, Platform, Traffic, eventually, port_of, running_ray

pytestmark = pytest.mark.slow

MODEL, FAULT = "orders", "fault.json"  # what `faulty` reads
PATIENCE_S = 240.0  # where no promise is tested: processes import MLflow first, beside busy replicas
# Both arms share two cores with their clients, so latency budgets are wide; the error budget is the default.
QUICK = ["--steps", "20,50", "--bake", "2", "--min-requests", "50", "--max-ttft-ratio", "1.5", "--min-speed-ratio", "0.5"]


@dataclass
class Site:
    """A platform with a registry, and the command line in front of both."""

    platform: Platform
    workspace: Path
    tracking_uri: str
    folder: Path

    @property
    def registry(self) -> ModelRegistry:
        return ModelRegistry(self.tracking_uri)

    @property
    def store(self) -> Store:
        return Store(self.workspace / "rollout")

    @property
    def saved(self) -> Saved:
        found = self.store.load()
        assert found is not None
        return found

    def ended(self, version: int) -> bool:
        """Whether the rollout of a version is over."""
        found = self.store.load()
        return found is not None and found.plan.version == version and found.state.phase.ended

    def offer(self, fault: dict[str, float] | None = None, base: Path | None = None, verdict: str = "promote") -> int:
        """A new version of the model with the gate's verdict, which goes wrong as `fault` says, on cria or another base."""
        seed = len(self.registry.versions(MODEL)) + 1
        adapter = make_adapter(self.folder / f"{seed}", seed, base)
        if fault is not None:
            (adapter / FAULT).write_text(json.dumps(fault))
            write_manifest(adapter)
        run = Tracker(self.tracking_uri, "training", str(self.folder / "spool")).start_run(f"train-{seed}", "train")
        facts = {"base_model": str(base), "base_digest": str(base), "template_digest": ChatTemplate().digest} if base else {}
        return self.registry.register(adapter, MODEL, run.run_id, lineage(**facts), tags={"gate": verdict}, params={"r": 4})

    def command(self, *words: str) -> list[str]:
        places = ["-w", str(self.workspace), "--url", self.platform.url, "--tracking-uri", self.tracking_uri]
        return [sys.executable, "-m", "altiplano.cli", "rollout", *words, *places]

    def rollout(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`altiplano rollout …` with everything that it needs to know."""
        return subprocess.run(self.command(*words), capture_output=True, text=True, env=processes.mark(self.workspace))

    def controllers(self) -> list[psutil.Process]:
        """Processes of `altiplano rollout control`."""
        return [p for p in processes.marked(self.workspace) if "control" in p.cmdline() and "rollout" in p.cmdline()]


@pytest.fixture(scope="module")
def site(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Two replicas, whose champion is version 1 of a registered model, and an MLflow server."""
    control = running_ray(workspace)
    os.environ[processes.MARK] = str(workspace.resolve())
    tracking_uri = services.find_mlflow(workspace) or start_server(workspace / "mlflow", free_port()).uri
    folder = tmp_path_factory.mktemp("adapters")
    made = Site(Platform(control, endpoint()), workspace, tracking_uri, folder)
    version = made.offer()
    made.registry.promote(MODEL, version)
    champion = made.registry.download(MODEL, version, folder / "champion")
    name = f"{MODEL}-{version}"
    config = serve_config(replace(SETTINGS, adapters={name: str(champion)}, aliases={"champion": name}), made.platform.endpoint)
    (application,) = config["applications"]
    application["import_path"] = "faulty:build"
    application["runtime_env"]["env_vars"]["PYTHONPATH"] = str(Path(__file__).parent)
    control.undeploy()
    control.deploy(config, START_TIMEOUT_S)
    made.platform.wait()
    return made


def endpoint() -> spec.Serve:
    two = spec.ServeAutoscaling(min_replicas=2, max_replicas=2)
    return spec.Serve(port=free_port(), max_num_seqs=8, max_model_len=512, kv_cache_tokens=16384, autoscaling=two)


class Timed(ServeControl):
    """Remembers when Ray took what it was sent last."""

    accepted = 0.0

    def _request(self, method: str, body: Any = None) -> httpx.Response:
        response = super()._request(method, body)
        if method == "PUT":
            self.accepted = time.monotonic()
        return response


def test_weights_are_live_on_all_replicas_within_a_second(site: Site) -> None:
    control = site.platform.control
    timed = Timed(control._url.removesuffix("/api/serve/applications/"), control._headers["authorization"].split()[1])
    before, reader = control.get_user_config(), AbClient(site.platform.url)
    name = before["aliases"]["champion"]
    took = []
    with Traffic(site.platform.url, parallel=4, model="champion") as traffic:
        for share in (10.0, 50.0, 30.0, 100.0, 0.0):
            arms = {"salt": "a salt for tests", "weights": {"champion": 100 - share, "challenger": share}}
            config = before | {"aliases": {"champion": name, "challenger": name}, "arms": arms}
            timed.set_user_config(config)
            wanted = {"champion": 1 - share / 100, "challenger": share / 100}
            eventually(lambda: (seen := reader.read()).is_live(seen.test or "", wanted) and len(seen.snapshots) == 2, 30)  # noqa: B023
            took.append(time.monotonic() - timed.accepted)
    control.set_user_config(before)
    assert statistics.median(took) < 1, took
    assert traffic.broken == []


def test_a_good_challenger_is_promoted_under_load_though_its_controller_is_killed(site: Site) -> None:
    version = site.offer()
    with Traffic(site.platform.url, parallel=6, max_tokens=4, model="champion") as traffic:
        begun = site.rollout("start", "--version", str(version), *QUICK, "-o", "json")
        assert begun.returncode == 0, begun.stderr
        assert json.loads(begun.stdout)["plan"]["version"] == version
        eventually(lambda: site.saved.state.live_since is not None, PATIENCE_S)
        (controller,) = site.controllers()
        controller.send_signal(signal.SIGKILL)
        psutil.wait_procs([controller], timeout=30)
        assert not site.saved.state.phase.ended
        ended = site.rollout("control", "-o", "json")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        eventually(lambda: len(traffic.statuses) >= 2000, PATIENCE_S)
    assert traffic.broken == [] and set(traffic.statuses) == {200}
    assert {"champion", "challenger"} <= set(traffic.arms)
    told = json.loads(ended.stdout)
    assert told["state"]["phase"] == "promoted"
    assert [move["share"] for move in told["history"]] == [20, 50, 50, 100, 100]
    champion = site.registry.get(MODEL, "champion")
    assert champion is not None and champion.version == version
    assert site.platform.control.get_user_config()["aliases"]["champion"] == f"{MODEL}-{version}"
    _is_recorded(site, told["run_id"], "promoted")


@pytest.fixture
def watcher(site: Site) -> Iterator[subprocess.Popen[bytes]]:
    """`altiplano rollout watch`, as an operator leaves it running."""
    with (site.folder / "watch.log").open("w") as log:
        started = subprocess.Popen(
            site.command("watch", MODEL, "--interval", "0.5", *QUICK), stderr=log, env=processes.mark(site.workspace)
        )
    yield started
    started.kill()
    started.wait()


@pytest.mark.parametrize(("fault", "says"), [({"fails": 0.5}, "error rate"), ({"late_s": 2.0}, "TTFT")])
def test_the_alias_moves_a_rollout_begins_and_a_bad_challenger_is_back_at_nothing_within_30_s(
    site: Site, watcher: subprocess.Popen[bytes], fault: dict[str, float], says: str
) -> None:
    champion = site.platform.control.get_user_config()["aliases"]["champion"]
    version = site.offer(fault)
    with Traffic(site.platform.url, parallel=6, max_tokens=4, model="champion") as traffic:
        site.registry.set_alias(MODEL, "challenger", version)
        eventually(lambda: site.ended(version), PATIENCE_S)
        over = time.monotonic()
        eventually(lambda: len(traffic.arms_since(over)) > 100, PATIENCE_S)
    saved = site.saved
    assert saved.state.phase == "rolled_back" and says in saved.state.reason
    met = sorted([*traffic.when("challenger"), *(broken.ended for broken in traffic.broken)])
    assert met and met[-1] - met[0] < 30, "from the first user who met it to the last"
    assert set(traffic.arms_since(over)) == {None}, "nobody is in a test any more"
    assert site.platform.control.get_user_config()["aliases"] == {"champion": champion} | _previous(site)
    assert watcher.poll() is None
    eventually(lambda: site.saved.run_id is not None, 60)
    _is_recorded(site, site.saved.run_id, "rolled_back")


def test_what_the_gate_has_rejected_is_rolled_out_only_with_a_reason_which_is_recorded(site: Site) -> None:
    version = site.offer(verdict="reject")
    refused = site.rollout("start", "--version", str(version), *QUICK)
    assert refused.returncode == 2 and "--override REASON" in refused.stderr
    begun = site.rollout("start", "--version", str(version), *QUICK, "--override", "its guard task is void", "-o", "json")
    assert begun.returncode == 0, begun.stderr
    eventually(lambda: site.saved.run_id is not None, PATIENCE_S)
    assert site.registry.versions(MODEL)[0].tags["gate_override"].endswith(": its guard task is void")
    site.store.ask("rollback")
    eventually(lambda: site.ended(version), PATIENCE_S)
    run_id = site.saved.run_id or ""
    run = eventually(lambda: (r := MlflowClient(site.tracking_uri).get_run(run_id)).info.status == "FINISHED" and r, 60)
    assert run.data.params["override"].endswith(": its guard task is void")


def test_one_replica_of_two_that_refuses_a_change_brings_the_one_before_back_on_both(site: Site) -> None:
    control, adapter = site.platform.control, make_adapter(site.folder / "refused", 99)
    (adapter / FAULT).write_text('{"refused": 1}')
    write_manifest(adapter)
    before = control.get_user_config()
    wanted = before | {"adapters": before["adapters"] | {"new": str(adapter)}, "aliases": before["aliases"] | {"fresh": "new"}}

    def models() -> list[set[str]]:
        urls = [f"http://127.0.0.1:{port_of(pid)}/v1/models" for pid in site.platform.replicas()]
        return [{model["id"] for model in httpx.get(url, timeout=60).json()["data"]} for url in urls]

    known = models()
    with Traffic(site.platform.url, parallel=4, max_tokens=4, model="champion") as traffic:
        with pytest.raises(RefusedConfigError, match="no room"):
            control.set_user_config(wanted)
        assert control.get_user_config() == before and models() == known
        control.set_user_config(wanted)  # now both have room
        assert models() == [names | {"new", "fresh"} for names in known]
        control.set_user_config(before)
    assert traffic.broken == []


def test_a_deployment_that_cannot_start_ends_its_rollout_and_says_why(site: Site) -> None:
    applications = set(site.platform.control.status()["applications"])
    version = site.offer(None, make_base(site.folder / "moved", seed=8))
    begun = site.rollout("start", "--version", str(version), *QUICK, "--base-model", str(site.folder / "nowhere"))
    assert begun.returncode == 0, begun.stderr
    eventually(lambda: site.ended(version), PATIENCE_S)
    assert site.saved.state.phase == "rolled_back" and "nowhere" in site.saved.state.reason, site.saved.history
    eventually(lambda: set(site.platform.control.status()["applications"]) == applications, PATIENCE_S)
    site.platform.wait()


def test_a_challenger_with_another_base_has_a_deployment_of_its_own_and_takes_over_without_a_failed_request(site: Site) -> None:
    base = make_base(site.folder / "base", seed=7)
    control = site.platform.control
    champion, here = control.get_user_config()["aliases"]["champion"], endpoint_of(control.status()["applications"])
    bad = site.offer({"fails": 1.0}, base)
    with Traffic(site.platform.url, parallel=4, max_tokens=4, model="champion") as traffic:
        assert site.rollout("start", "--version", str(bad), *QUICK).returncode == 0
        eventually(lambda: site.ended(bad), 2 * PATIENCE_S)
        assert site.saved.state.phase == "rolled_back" and "error rate" in site.saved.state.reason, site.saved.history
        over = time.monotonic()
        eventually(lambda: len(traffic.arms_since(over)) > 50, PATIENCE_S)
    assert set(traffic.arms_since(over)) == {None}, "nobody is in a test any more"
    assert traffic.broken and all("broken" in broken.text for broken in traffic.broken), traffic.broken[-3:]
    assert max(broken.begun for broken in traffic.broken) < over
    assert control.get_user_config()["aliases"]["champion"] == champion
    eventually(lambda: set(control.status()["applications"]) == {here}, PATIENCE_S)

    good = site.offer(None, base)
    with Traffic(site.platform.url, parallel=4, max_tokens=4, model="champion") as traffic:
        begun = site.rollout("start", "--version", str(good), *QUICK, "-o", "json")
        assert begun.returncode == 0, begun.stderr
        assert json.loads(begun.stdout)["plan"]["apart"]["model"] == str(base)
        eventually(lambda: site.ended(good), 2 * PATIENCE_S)
        seen = len(traffic.arms)
        eventually(lambda: len(traffic.arms) > seen + 100, PATIENCE_S)
    assert site.saved.state.phase == "promoted", site.saved.history
    assert traffic.broken == [] and set(traffic.statuses) == {200}
    assert {"champion", "challenger"} <= set(traffic.arms)
    assert control.get_user_config()["aliases"]["champion"] == f"{MODEL}-{good}"
    eventually(lambda: set(control.status()["applications"]) == {*OURS} - {here}, PATIENCE_S)
    assert httpx.get(f"{site.platform.url}/v1/models", timeout=60).json()["data"][0]["id"] == str(base)
    eventually(lambda: site.saved.run_id is not None, 60)
    _is_recorded(site, site.saved.run_id, "promoted")


def _previous(site: Site) -> dict[str, str]:
    """The alias that an earlier promotion left."""
    aliases = site.platform.control.get_user_config()["aliases"]
    return {name: target for name, target in aliases.items() if name == "previous"}


def _is_recorded(site: Site, run_id: str | None, phase: str) -> None:
    """The run in MLflow ends with the verdict and has the evidence."""
    client = MlflowClient(site.tracking_uri)
    assert run_id is not None
    run = eventually(lambda: (r := client.get_run(run_id)).info.status == "FINISHED" and r, 60)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None and run.info.experiment_id == experiment.experiment_id
    assert run.data.tags["altiplano.phase"] == phase and run.data.tags["altiplano.reason"]
    assert run.data.params["challenger"].startswith(MODEL) and "salt" not in run.data.params
    assert {"share", "challenger/requests", "effect/error_rate"} <= set(run.data.metrics)
    assert [artifact.path for artifact in client.list_artifacts(run_id)] == ["rollout.json"]
