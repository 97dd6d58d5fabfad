"""The endpoint on Ray Serve: one replica is the HTTP front end and its engine process; tokens take one hop."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from fastapi import FastAPI
from ray import serve
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address
from tokenizers import Tokenizer

from altiplano import spec
from altiplano.data.templates import ChatTemplate
from altiplano.serve import engine_sleep
from altiplano.serve.app import create_app
from altiplano.serve.autoscaling import load_of
from altiplano.serve.control import CHANGE, DEPLOYMENT, DeployError
from altiplano.serve.engine_errors import EngineDiedError
from altiplano.serve.errors import ApiError
from altiplano.serve.feedback import counts_at
from altiplano.serve.forward import Forwarded, Frame, answered
from altiplano.serve.generation import Generator
from altiplano.serve.governance import Governance
from altiplano.serve.logs import write_json_lines
from altiplano.serve.metering import MeteredEngineClient
from altiplano.serve.metrics_server import MetricsServer
from altiplano.serve.settings import ServeSettings
from altiplano.serve.ttft import RecentPercentile, cumulative_buckets

SNAPSHOT_TIMEOUT_S = 3.0

logger = logging.getLogger(__name__)

STATS_TIMEOUT_S = 5.0
# Serve's autoscaler looks at the time to the first token that 95 of 100 answers of the last half minute kept.
TTFT_SHARE, TTFT_WINDOW_S = 0.95, 30.0


async def make_generator(settings: ServeSettings) -> Generator:
    """An engine process with its adapters loaded, and everything around it.

    Raises:
        DeployError: the adapters were trained with another prompt format than this endpoint writes.
        RuntimeError: the engine did not start.
        ValueError: an adapter is damaged or does not fit.
    """
    template = checked_template(settings)
    client = MeteredEngineClient(settings)
    await client.start()
    tokenizer = Tokenizer.from_file(str(Path(settings.model_path) / "tokenizer.json"))
    generator = Generator(settings, client, tokenizer, template)
    try:
        await generator.reconfigure({"adapters": settings.adapters, "aliases": settings.aliases})
    except BaseException:
        await client.stop()
        raise
    return generator


class _Process:
    """The generator of this replica's process. Ray copies the application apart from the class around it, so what they share
    lives in this module."""

    generator: Generator | None = None
    governance: Governance | None = None
    app: FastAPI | None = None
    handles: ClassVar[dict[str, DeploymentHandle[Any]]] = {}


def current() -> Generator:
    """The generator of this process.

    Raises:
        ApiError: 503 while the engine is starting.
    """
    if _Process.generator is None:
        raise ApiError(503, "the engine is starting: try again in a moment", retry_after=2)
    return _Process.generator


def build_app() -> FastAPI:
    """The application of a replica; Ray Serve calls it in the replica's process, after `Endpoint.__init__`."""
    assert _Process.governance is not None
    _Process.app = create_app(current, _Process.governance)
    return _Process.app


@serve.deployment(name=DEPLOYMENT)
@serve.ingress(build_app)
class Endpoint:
    """One replica. `settings` are those of ServeSettings, `endpoint` those of the pipeline file's `serve`."""

    async def __init__(self, settings: dict[str, Any], endpoint: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        write_json_lines()
        wanted = spec.Serve.model_validate(endpoint)
        _Process.governance = Governance.of(wanted)
        await _show_metrics(_Process.governance, wanted.metrics_port)
        _Process.generator = await make_generator(ServeSettings(**settings))
        _Process.generator.experiment.gather = _snapshots
        _Process.generator.experiment.spread = _rate
        _Process.generator.experiment.forward = _forward
        _Process.generator.changes.gather = _changes
        _Process.generator.sleeping.gather = _sleep
        self._patience_s = wanted.health_check_timeout_s
        self._first_token = RecentPercentile(TTFT_SHARE, TTFT_WINDOW_S)
        self._configured = False

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Adapters, aliases and the test of them change here, without a restart and without touching running requests."""
        wanted, generator = dict(user_config), current()
        change, refusal = wanted.pop(CHANGE, None), None
        try:
            await generator.client.wait_until_ready()
            await generator.reconfigure(wanted)
        except (ValueError, EngineDiedError, TimeoutError) as error:
            # Serve replaces a replica that raises here, and the next one would not start at all.
            if not self._configured:
                raise
            refusal = str(error) or type(error).__name__
            logger.error("this user_config is not taken, the one before stays: %s", refusal)
        generator.changes.note(change, refusal)
        self._configured = True

    async def rate(self, answer: str, score: float, at: str | None) -> dict[str, Any]:
        """Count a rating, if this replica is the one `at` which it is counted; says who this is."""
        experiment = current().experiment
        if at == experiment.name:
            experiment.count(answer, score)
        return {"replica": experiment.name}

    async def answer(self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> AsyncIterator[Frame]:
        """Answer a request that the champion's application sends on: its arm is the one of this application."""
        assert _Process.app is not None
        async with aclosing(answered(_Process.app, Forwarded(method, path, headers, body))) as frames:  # type: ignore[type-var]
            async for frame in frames:
                yield frame

    async def told_of_change(self, change: str) -> dict[str, Any]:
        """What this replica made of a change, for the replica that was asked about all."""
        return current().changes.told(change)

    async def turn(self, method: str, *args: Any) -> dict[str, Any]:
        """Call a method of this replica's `Sleeping`, for the replica that was asked to call it everywhere."""
        return await current().sleeping.turn(method, *args)

    async def ab_snapshot(self) -> dict[str, Any]:
        """What became of this replica's requests, for the replica that was asked about all."""
        return current().experiment.snapshot()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The load of this replica for the policy. An engine that does not answer, or sleeps, reports nothing, which holds the number."""
        assert _Process.governance is not None
        if current().client.sleep.level:
            return {}
        stats = await current().client.stats(STATS_TIMEOUT_S)
        buckets = cumulative_buckets(_Process.governance.metrics.first_token.collect())
        return asdict(load_of(stats, self._first_token.update(buckets, _Process.governance.clock())))

    async def check_health(self) -> None:
        """Starts an engine that hangs again; fails, so that Serve replaces this replica, when there is no engine to be had."""
        client = current().client
        if client.sleep.turning:
            return  # it loads or copies weights, within a time of its own
        try:
            await client.stats(self._patience_s)
        except TimeoutError:
            logger.error("the engine said nothing for %g s: it is started again", self._patience_s)
            client.restart()
        except EngineDiedError:
            if client.failure is not None:
                raise


async def _show_metrics(governance: Governance, base_port: int) -> None:
    # Without keys this machine only, as on the endpoint's own port; with keys where Ray reaches this node.
    host = "127.0.0.1" if governance.keys is None else get_node_ip_address()
    try:
        address = await MetricsServer(governance, current).start(host, base_port)
        logger.info("metrics of this replica: http://%s:%d/metrics", *address)
    except OSError as error:
        logger.error("this replica shows no metrics of its own: %s", error)


async def _forward(application: str, request: Forwarded) -> AsyncIterator[Frame]:
    """What another application answers. Closing it ends the request over there.

    Raises:
        ApiError: 429, it has no room.
    """
    asked = _handle(application).options(stream=True).answer.remote(request.method, request.path, request.headers, request.body)
    done = False
    try:
        async for frame in asked:
            yield frame
        done = True
    except BackPressureError as error:
        raise ApiError(429, "the endpoint is busy: try again in a moment", code="overloaded", retry_after=1) from error
    finally:
        if not done:
            asked.cancel()


async def _snapshots() -> list[dict[str, Any]]:
    return await _in_test("ab_snapshot")


async def _rate(answer: str, score: float) -> None:
    own = current().experiment
    present = {told["replica"] for told in await _in_test("rate", answer, score, None)} | {own.name}
    chosen = counts_at(answer, present)
    if chosen == own.name:
        own.count(answer, score)
    else:
        await _in_test("rate", answer, score, chosen)


async def _changes(change: str) -> list[dict[str, Any]]:
    return await _all_replicas("told_of_change", change)


async def _sleep(method: str, *args: Any) -> list[dict[str, Any]]:
    """What all replicas say; nothing if one of them does not, for then nobody knows whether all sleep."""
    wait = 0.0 if method == "told" else engine_sleep.TIMEOUT_S
    try:
        return await _all_replicas("turn", method, *args, timeout_s=wait + SNAPSHOT_TIMEOUT_S, whole=True)
    except (RayServeException, TimeoutError) as error:
        logger.warning("not all replicas have said whether they sleep: %s", error)
        return []


async def _in_test(method: str, *args: Any) -> list[dict[str, Any]]:
    """What a method says on all replicas that answer for an arm of the test, here or in another application."""
    arms = current().experiment.arms
    elsewhere = [] if arms is None else sorted(set(arms.elsewhere.values()))
    found = await asyncio.gather(_all_replicas(method, *args), *(_all_replicas(method, *args, at=name) for name in elsewhere))
    return [told for part in found for told in part]


async def _all_replicas(
    method: str, *args: Any, at: str | None = None, timeout_s: float = SNAPSHOT_TIMEOUT_S, whole: bool = False
) -> list[dict[str, Any]]:
    """What a method says on all replicas of an application, by default this one, that answer in time.

    Raises:
        TimeoutError: the application is this one and does not answer; or, with `whole`, a replica of it does not.
    """
    try:
        handle = _handle(at or serve.get_replica_context().app_name)
        found = await handle.broadcast(method, *args).results_async(timeout_s=timeout_s, return_exceptions=True)
    except (RayServeException, KeyError, TimeoutError):
        if at is None:
            raise
        return []  # it is gone, or not there yet
    answers = [told for told in found if isinstance(told, dict)]
    if whole and len(answers) < len(found):
        raise TimeoutError(f"{len(found) - len(answers)} of {len(found)} replicas have not answered")
    return answers


def _handle(application: str) -> DeploymentHandle[Any]:
    """A handle learns where replicas are in the background, so it is made once."""
    if application not in _Process.handles:
        _Process.handles[application] = serve.get_deployment_handle(DEPLOYMENT, application)
    return _Process.handles[application]


def checked_template(settings: ServeSettings) -> ChatTemplate:
    """The chat format of this endpoint.

    Raises:
        DeployError: the adapters were trained with another one.
    """
    template = ChatTemplate(settings.date_string)
    if settings.template_digest is not None and settings.template_digest != template.digest:
        raise DeployError(
            "the adapters were trained with another chat template or date than this endpoint writes (the digests differ): "
            "set data.date_string as in training, or train again"
        )
    return template
