"""The endpoint on Ray Serve: one replica is the HTTP front end and its engine process; tokens take one hop."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.schema import ApplicationStatus
from tokenizers import Tokenizer

from altiplano import spec
from altiplano.data.templates import ChatTemplate
from altiplano.models.manifest import verify_manifest
from altiplano.serve.app import create_app
from altiplano.serve.engine_client import EngineDiedError
from altiplano.serve.errors import ApiError
from altiplano.serve.generation import Generator
from altiplano.serve.governance import Governance
from altiplano.serve.keys import KeyFile, KeyRing
from altiplano.serve.logs import write_json_lines
from altiplano.serve.metering import MeteredEngineClient
from altiplano.serve.settings import ServeSettings

APPLICATION = "altiplano"
HEALTH_TIMEOUT_S = 30.0


class DeployError(RuntimeError):
    """The endpoint cannot be deployed as asked."""


async def make_generator(settings: ServeSettings) -> Generator:
    """An engine process with its adapters loaded, and everything around it.

    Raises:
        DeployError: the adapters were trained with another prompt format than this endpoint writes.
        RuntimeError: the engine did not start.
    """
    template = _checked_template(settings)
    client = MeteredEngineClient(settings)
    await client.start()
    for name, path in settings.adapters.items():
        await client.load_adapter(name, path)
    tokenizer = Tokenizer.from_file(str(Path(settings.model_path) / "tokenizer.json"))
    return Generator(settings, client, tokenizer, template, dict(settings.aliases))


class _Process:
    """The generator of this replica's process. Ray copies the application apart from the class around it, so what they share
    lives in this module."""

    generator: Generator | None = None
    governance: Governance | None = None


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
    return create_app(current, _Process.governance)


@serve.deployment(name="endpoint")
@serve.ingress(build_app)
class Endpoint:
    """One replica. `settings` are those of ServeSettings, `endpoint` those of the pipeline file's `serve`."""

    async def __init__(self, settings: dict[str, Any], endpoint: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        write_json_lines()
        _Process.governance = Governance.of(spec.Serve.model_validate(endpoint))
        _Process.generator = await make_generator(ServeSettings(**settings))

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Adapters and aliases change here, without a restart and without touching running requests."""
        generator = current()
        for name, path in user_config["adapters"].items():
            if name not in generator.client.adapters:
                await generator.client.load_adapter(name, path)
        generator.aliases = dict(user_config["aliases"])
        for name in set(generator.client.adapters) - set(user_config["adapters"]):
            await generator.client.unload_adapter(name)

    async def check_health(self) -> None:
        # An engine that is starting again is not a reason to replace the replica; one that hangs is.
        try:
            await current().client.stats(HEALTH_TIMEOUT_S)
        except EngineDiedError:
            return


def deploy(settings: ServeSettings, endpoint: spec.Serve) -> None:
    """Deploy, or change what is deployed; ray.init has happened. Returns when the endpoint answers.

    Raises:
        ManifestError: an adapter is damaged.
        KeyFileError: the key file is missing, damaged or empty.
        DeployError: the application did not come up; the message is its own.
    """
    for path in settings.adapters.values():
        verify_manifest(Path(path))
    _checked_template(settings)
    if endpoint.api_keys_file is not None:
        KeyRing(KeyFile(Path(endpoint.api_keys_file)))
    # Adapters and aliases go through user_config: a change of those alone needs no new replica where Serve is driven by config.
    fixed = asdict(settings) | {"adapters": {}, "aliases": {}}
    serve.start(http_options={"host": endpoint.host, "port": endpoint.port}, proxy_location="HeadOnly")
    deployment = Endpoint.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=endpoint.max_num_seqs * 4,
        max_queued_requests=endpoint.max_num_seqs * 16,
        user_config={"adapters": settings.adapters, "aliases": settings.aliases},
        graceful_shutdown_timeout_s=60,
        health_check_timeout_s=HEALTH_TIMEOUT_S + 10,
    )
    try:
        serve.run(deployment.bind(fixed, endpoint.model_dump(mode="json")), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        status = serve.status().applications.get(APPLICATION)
        raise DeployError(f"the endpoint did not come up: {_why(status) or error}") from error
    status = serve.status().applications[APPLICATION]
    if status.status != ApplicationStatus.RUNNING:
        raise DeployError(f"the endpoint is {status.status}: {status.message}")


def _checked_template(settings: ServeSettings) -> ChatTemplate:
    template = ChatTemplate(settings.date_string)
    if settings.template_digest is not None and settings.template_digest != template.digest:
        raise DeployError(
            "the adapters were trained with another chat template or date than this endpoint writes (the digests differ): "
            "set data.date_string as in training, or train again"
        )
    return template


def _why(status: Any) -> str:
    """What Serve says about an application and its deployments."""
    return "" if status is None else "; ".join(filter(None, (status.message, *(d.message for d in status.deployments.values()))))


def is_serving() -> bool:
    """Whether this cluster already listens for HTTP: then the port is taken by ourselves."""
    return bool(serve.status().proxies)


def undeploy() -> None:
    """Take the endpoint down."""
    serve.delete(APPLICATION)
