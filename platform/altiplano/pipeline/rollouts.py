"""Rollouts with everything around them: the registry's aliases, MLflow as the journal, the cluster that serves."""

import json
import os
import secrets
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from altiplano.cluster import local_ray
from altiplano.pipeline.services import find_mlflow
from altiplano.pipeline.serving import is_served
from altiplano.pipeline.workspace import write_json
from altiplano.registry import ModelRegistry, TrackedRun, Tracker
from altiplano.registry.models import CHALLENGER, CHAMPION
from altiplano.registry.tracking import KEY
from altiplano.serve.ab import compare, report
from altiplano.serve.arms import Arms
from altiplano.serve.control import ServeControl
from altiplano.serve.evidence import AbClient
from altiplano.serve.outcomes import Outcomes
from altiplano.serve.rollout import Plan, share, told
from altiplano.serve.rollout_controller import Controller
from altiplano.serve.rollout_store import Saved, Store

EXPERIMENT = "rollouts"
OVERRIDE = "gate_override"
SPOOL_TIMEOUT_S = 30.0
START_WITHIN_S = 900.0  # a deployment of its own may have to wait for a node, and loads a model


@dataclass(frozen=True)
class Site:
    """Where one endpoint is. `directory` is a folder that its replicas see too: adapters are put there."""

    directory: Path
    url: str
    api_key: str | None
    dashboard_url: str
    ray_token: str | None
    tracking_uri: str

    @classmethod
    def find(
        cls,
        workspace: Path,
        url: str,
        *,
        api_key: str | None = None,
        dashboard_url: str | None = None,
        tracking_uri: str | None = None,
    ) -> "Site":
        """The site of a workspace, or what the arguments name instead. Ray's token comes from RAY_AUTH_TOKEN or the workspace.

        Raises:
            ConnectionError: Ray or MLflow is not to be found.
        """
        head = local_ray.find(workspace) if dashboard_url is None else None
        dashboard = dashboard_url or (head.dashboard if head else None)
        if dashboard is None:
            raise ConnectionError(f"no Ray runs for {workspace}: start it with `altiplano up`, or give --dashboard-url")
        tracking = tracking_uri or find_mlflow(workspace)
        if tracking is None:
            raise ConnectionError(f"no MLflow runs for {workspace}: start it with `altiplano up`, or give --tracking-uri")
        token = os.environ.get("RAY_AUTH_TOKEN") or (local_ray.token(workspace) if head else None)
        return cls(workspace / "rollout", url, api_key, dashboard, token, tracking)

    @property
    def control(self) -> ServeControl:
        return ServeControl(self.dashboard_url, self.ray_token, self.url)

    @property
    def registry(self) -> ModelRegistry:
        return ModelRegistry(self.tracking_uri)

    @property
    def store(self) -> Store:
        return Store(self.directory)


def plan(
    site: Site,
    model: str | None,
    version: int | None,
    settings: Mapping[str, Any],
    base_model: str | None = None,
    override: str | None = None,
) -> Plan:
    """What to roll out: a version, by default the one behind the alias `challenger`, with its adapter downloaded and checked.

    A version that was trained on another base gets a deployment of its own; `base_model` says where its replicas find that base when
    it is not where it was in training. `override`, who and why, lets a version through that the gate has rejected, and stays in the
    registry as a tag of it.

    Raises:
        ValueError: there is nothing to roll out, or the gate has rejected it.
        ManifestError: the registry's copy of the adapter is damaged.
        RegistryUnavailableError: MLflow does not answer.
        ControlError: Ray Serve does not answer, or there is no endpoint.
    """
    champion = site.control.get_user_config()["aliases"].get(CHAMPION)
    if champion is None:
        raise ValueError("the endpoint has no champion yet: deploy one with `altiplano run`")
    name = model or champion.rpartition("-")[0]
    registry = site.registry
    if version is None:
        found = registry.get(name, CHALLENGER)
        if found is None:
            raise ValueError(
                f"{name} has no version with the alias {CHALLENGER}: give one with --version (`altiplano models {name}`)"
            )
        version = found.version
    known = {v.version: v for v in registry.versions(name)}
    if version not in known:
        raise ValueError(f"{name} has no version {version}: choose one of {', '.join(map(str, sorted(known))) or 'none'}")
    rejected = known[version].tags.get("gate") == "reject"
    if rejected and override is None:
        raise ValueError(
            f"the gate has rejected version {version} of {name} (`altiplano models {name}`): choose another one, or say why it has to "
            "be rolled out with --override REASON"
        )
    if override is not None and not rejected:
        raise ValueError(f"the gate has not rejected version {version} of {name}: leave --override out")
    challenger = f"{name}-{version}"
    apart = _apart(site, name, champion, version, known, base_model)
    if apart is not None:
        settings = {"live_within_s": START_WITHIN_S, **settings}
    path = site.directory / "adapters" / challenger
    registry.download(name, version, path)
    if override is not None:
        registry.tag(name, version, OVERRIDE, override)
    return Plan(
        name,
        version,
        champion,
        challenger,
        str(path.resolve()),
        salt=secrets.token_hex(16),
        apart=apart,
        override=override,
        **settings,
    )


def _apart(
    site: Site, name: str, champion: str, version: int, known: Container[int], base_model: str | None
) -> dict[str, Any] | None:
    """The arguments of a deployment for the base that a version was trained on; None when it is the champion's.

    Raises:
        ValueError: a base is named, and nobody needs it.
    """
    wanted = site.registry.lineage(name, version)
    number = champion.removeprefix(f"{name}-")
    if number.isdigit() and int(number) in known:
        same = wanted["base_digest"] == site.registry.lineage(name, int(number))["base_digest"]
    else:
        same = is_served(site.control, wanted["base_model"])
    if same:
        if base_model is not None:
            raise ValueError(f"version {version} of {name} was trained on the champion's base: leave --base-model out")
        return None
    where = base_model or wanted["base_model"]
    return {
        "model": str(Path(where).resolve()) if Path(where).is_dir() else where,
        "served_model_name": wanted["base_model"],
        "date_string": wanted["date_string"],
        "template_digest": wanted["template_digest"],
    }


def controller(site: Site) -> Controller:
    """The controller of the rollout that a site's store holds.

    Raises:
        NoRolloutError: there is none.
    """
    return Controller(site.control, AbClient(site.url, site.api_key), site.registry, MlflowJournal(site), site.store)


class MlflowJournal:
    """A rollout as a run of the experiment `rollouts`: the plan as params, the evidence as metrics, the verdict as a report."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._run: TrackedRun | None = None
        self._tracker: Tracker | None = None

    def open(self, saved: Saved) -> str:
        """
        Raises:
            RegistryUnavailableError: MLflow does not answer; the rollout goes on, and asks again.
        """
        return self._tracked(saved).run_id

    def note(self, saved: Saved, outcomes: Outcomes, *, moved: bool) -> None:
        """The present evidence; after a move also where the rollout is now."""
        run = self._tracked(saved)
        seconds = int(saved.seen - saved.started)
        run.log_metrics({"share": share(saved.plan, saved.state), **measured(outcomes, saved.plan.alpha)}, step=seconds)
        if moved:
            run.set_tags({"altiplano.phase": saved.state.phase, "altiplano.reason": saved.state.reason})

    def close(self, saved: Saved) -> None:
        """The report, and the end of the run."""
        run = self._tracked(saved)
        found = report(saved.notebook.outcomes(), CHAMPION, saved.plan.alpha)
        run.log_dict(saved.to_json() | {"report": found}, "rollout.json")
        run.end("FINISHED")
        assert self._tracker is not None
        self._tracker.flush(SPOOL_TIMEOUT_S)

    def _tracked(self, saved: Saved) -> TrackedRun:
        if self._run is None:
            self._tracker = Tracker(self._site.tracking_uri, EXPERIMENT, str(self._site.directory / "spool"))
            test = Arms.of({"salt": saved.plan.salt, "weights": {CHAMPION: 1}}).test_id
            self._run = self._tracker.start_run(
                f"rollout-{saved.plan.challenger}",
                "rollout",
                run_id=saved.run_id,
                params=told(saved.plan),
                tags={KEY: f"rollout-{test}", "altiplano.model": saved.plan.model, "altiplano.version": str(saved.plan.version)},
            )
        return self._run


def measured(outcomes: Outcomes, alpha: float) -> dict[str, float]:
    """Metrics for MLflow: values of both arms, and the effect with its interval."""
    found: dict[str, float] = {f"{arm}/requests": float(sums.requests) for arm, sums in outcomes.items()}
    for name, metric in compare(outcomes, CHAMPION, CHALLENGER, alpha).items():
        values = {
            f"{CHAMPION}/{name}": metric.baseline,
            f"{CHALLENGER}/{name}": metric.candidate,
            f"effect/{name}": metric.effect,
        }
        if metric.interval is not None:
            values |= {f"effect/{name}/low": metric.interval.low, f"effect/{name}/high": metric.interval.high}
        found |= {key: value for key, value in values.items() if value is not None}
    return found


class Watcher:
    """Starts a rollout whenever the alias `challenger` of a model moves to another version. What it has started is on disk."""

    def __init__(self, site: Site, model: str, settings: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._site, self._model, self._settings, self._say = site, model, settings, say
        self._file = site.directory / f"watched-{model}.json"

    def run(self, interval_s: float, stop: Event) -> None:
        """Look every `interval_s` seconds until `stop` is set; control what is on its way, whoever began it."""
        while not stop.is_set():
            try:
                made = self.poll(time.time())
                if made is not None:
                    self._say(f"{made.challenger} is rolled out against {made.champion}")
                saved = self._site.store.load()
                if saved is not None and not saved.state.phase.ended:
                    with self._site.store.controlled() as alone:
                        ended = controller(self._site).run(stop) if alone else None
                    if ended is not None:
                        self._say(f"{ended.phase.replace('_', ' ')}: {ended.reason}")
            except (RuntimeError, ValueError, OSError) as error:
                self._say(f"{error}")
            stop.wait(interval_s)

    def poll(self, now: float) -> Plan | None:
        """Look once; the plan that was begun, if any. While a rollout is on its way nothing else begins.

        Raises:
            RegistryUnavailableError, ControlError, ValueError: see `plan`; the next look tries again.
        """
        saved = self._site.store.load()
        if saved is not None and not saved.state.phase.ended:
            return None
        found = self._site.registry.get(self._model, CHALLENGER)
        if found is None or found.version == self._seen():
            return None
        made = plan(self._site, self._model, found.version, self._settings)
        self._site.store.begin(made, now)
        write_json(self._file, {"version": found.version})
        return made

    def _seen(self) -> int | None:
        try:
            values = json.loads(self._file.read_text())
        except FileNotFoundError:
            return None
        return int(values["version"])
