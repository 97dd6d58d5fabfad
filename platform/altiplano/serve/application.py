"""The endpoint as a Serve application: built by Ray from the arguments of a config, and the config itself.

`altiplano.serve.application:build` is the import path that `serveConfigV2`, `serve run` and `deploy` name.
"""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ray.serve import Application

from altiplano import spec
from altiplano.models.loading import resolve_model_path
from altiplano.models.manifest import verify_manifest
from altiplano.serve.autoscaling import autoscaling_config
from altiplano.serve.control import APPLICATION, DEPLOYMENT, OURS, DeployError, ServeControl, endpoint_of
from altiplano.serve.deployment import Endpoint, checked_template
from altiplano.serve.keys import KeyFile, KeyRing
from altiplano.serve.proxy import proxy_environment, proxy_of
from altiplano.serve.routing import routing_options
from altiplano.serve.settings import ServeSettings

IMPORT_PATH = "altiplano.serve.application:build"
START_TIMEOUT_S = 900.0
# Requests beside the answers of the engine: metrics, health, lists of models.
LIGHT_REQUESTS = 32
HEALTH_CHECK_PERIOD_S = 5.0

# What a replica reads of the pipeline file's `serve`, beside the settings of the engine. A change of anything else replaces nothing.
_OF_ENDPOINT = (
    "api_keys_file",
    "limits",
    "response_cache_bytes",
    "usd_per_hour",
    "otlp_endpoint",
    "metrics_port",
    "health_check_timeout_s",
)
# These change while replicas run, so they are user_config.
_OF_USER_CONFIG = ("adapters", "aliases")


def build(args: dict[str, Any]) -> Application:
    """The application. `args`: `model` (cria, a directory or a hub id), the fields of ServeSettings, and those of the pipeline
    file's `serve` that a replica reads. Adapters and aliases come in the deployment's `user_config`.

    Raises:
        ValueError: an argument that nobody knows or that is wrong.
    """
    settings, endpoint = parse(args)
    return Endpoint.bind(asdict(settings), endpoint.model_dump(mode="json"))  # type: ignore[attr-defined]


def parse(args: dict[str, Any]) -> tuple[ServeSettings, spec.Serve]:
    """
    Raises:
        ValueError: an argument that nobody knows or that is wrong.
    """
    of_engine = {field.name for field in fields(ServeSettings)} - {"model_path", *_OF_USER_CONFIG}
    known = {"model"} | of_engine | set(_OF_ENDPOINT)
    if unknown := sorted(set(args) - known):
        raise ValueError(f"unknown arguments {', '.join(unknown)}: the endpoint takes {', '.join(sorted(known))}")
    if "model" not in args:
        raise ValueError("the argument model is missing: name cria, a directory or a hub id")
    model = resolve_model_path(spec.Model(model_name_or_path=args["model"]))
    engine = {"served_model_name": str(args["model"])} | {name: args[name] for name in of_engine & set(args)}
    if engine.get("engine", "altiplano") not in ("altiplano", "vllm"):
        raise ValueError(f"engine must be altiplano or vllm, not {engine['engine']!r}")
    if engine.get("speculative_model") is not None:
        engine["speculative_model"] = str(resolve_model_path(spec.Model(model_name_or_path=engine["speculative_model"])))
    # Governance counts in the engine's sequences.
    shared = {name: args[name] for name in ("max_num_seqs",) if name in args}
    endpoint = spec.Serve.model_validate({name: args[name] for name in _OF_ENDPOINT if name in args} | shared)
    return ServeSettings(model_path=str(model), **engine), endpoint


def serve_config(settings: ServeSettings, endpoint: spec.Serve) -> dict[str, Any]:
    """The Serve config of the endpoint, as `serve deploy` and Ray's REST interface take it."""
    args = {name: value for name, value in asdict(settings).items() if name not in ("model_path", *_OF_USER_CONFIG)}
    environment = {"env_vars": proxy_environment(endpoint)}
    args |= {"model": settings.model_path} | endpoint.model_dump(mode="json", include=set(_OF_ENDPOINT))
    return {
        "proxy_location": "HeadOnly" if spec.is_loopback(endpoint.host) else "EveryNode",
        "http_options": {"host": endpoint.host, "port": endpoint.port},
        "controller_options": {"runtime_env": environment},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "runtime_env": environment,
                "args": args,
                "deployments": [deployment_config(settings, endpoint)],
            }
        ],
    }


def deployment_config(settings: ServeSettings, endpoint: spec.Serve) -> dict[str, Any]:
    """The deployment's options.

    Our own queue refuses first, with OpenAI's error and a Retry-After made from what it knows; Serve's bounds stand behind it.
    Serve counts a request as queued until its task first runs, so both bounds hold a burst that comes at once.
    """
    most = endpoint.max_num_seqs + endpoint.limits.max_queued_seqs + LIGHT_REQUESTS
    return {
        "name": DEPLOYMENT,
        **autoscaling_config(endpoint),
        **routing_options(endpoint),
        "max_ongoing_requests": most,
        "max_queued_requests": most,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "graceful_shutdown_timeout_s": endpoint.graceful_shutdown_timeout_s,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        # The replica's own look at its engine ends before Serve gives up waiting for it.
        "health_check_timeout_s": endpoint.health_check_timeout_s + 10,
        "ray_actor_options": {"num_cpus": 1, "num_gpus": 1 if settings.device == "cuda" else 0},
        "user_config": {"adapters": settings.adapters, "aliases": settings.aliases},
    }


def deploy(settings: ServeSettings, endpoint: spec.Serve, control: ServeControl) -> None:
    """Deploy, or change what is deployed. Returns when the endpoint answers as asked.

    Raises:
        ManifestError: an adapter is damaged.
        KeyFileError: the key file is missing, damaged or empty.
        DeployError: the application did not come up; the message is its own.
        ControlError: Ray's dashboard does not answer.
    """
    for path in settings.adapters.values():
        verify_manifest(Path(path))
    checked_template(settings)
    if endpoint.api_keys_file is not None:
        KeyRing(KeyFile(Path(endpoint.api_keys_file)))
    config = serve_config(settings, endpoint)
    _make_way(control, config)
    control.deploy(config, START_TIMEOUT_S)


def _make_way(control: ServeControl, config: dict[str, Any]) -> None:
    """Take Serve down when it listens elsewhere or through another proxy: it reads both only when it starts."""
    status = control.status()
    listening = control.listening(status)
    (wanted,) = config["applications"]
    present = (status["applications"].get(endpoint_of(status["applications"])) or {}).get("deployed_app_config") or wanted
    same_place = listening in (None, (config["http_options"]["host"], config["http_options"]["port"]))
    if same_place and proxy_of(present) == proxy_of(wanted):
        # HAProxy keeps the places that it was started with.
        wanted["runtime_env"] = present["runtime_env"]
        return
    if set(status["applications"]) - set(OURS):
        raise DeployError(
            "Ray Serve already serves other applications with another host, port or proxy: set serve.host, serve.port and "
            "serve.http_proxy to theirs, or take them down"
        )
    control.undeploy()
