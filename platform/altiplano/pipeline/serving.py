"""The way from a pipeline to Ray Serve: which dashboard, which token, and an adapter for an endpoint that is already there."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from altiplano import spec
from altiplano.cluster import local_ray
from altiplano.cluster.ray_token import token_of_environment
from altiplano.pipeline.services import Services
from altiplano.serve import ServeControl
from altiplano.serve.control import DeployError, endpoint_of, unnamed

REMOTE_TOKEN = "ALTIPLANO_SERVE_RAY_TOKEN"
REMOTE_KEY = "ALTIPLANO_API_KEY"


def serve_control(services: Services, root: Path) -> ServeControl:
    """Serve of the workspace's own head, or of the cluster in which this process runs as a job."""
    if services.ray is not None:
        return ServeControl(services.ray.dashboard, local_ray.token(root))
    address = ray.init(ignore_reinit_error=True).dashboard_url
    return ServeControl(f"http://{address}", token_of_environment() if os.environ.get("RAY_AUTH_MODE") == "token" else None)


def remote_control(remote: spec.ServeRemote) -> ServeControl:
    """Serve of the cluster that the pipeline file names, with that cluster's token: never the one of the cluster that we run in.

    Raises:
        DeployError: the token's file cannot be read.
    """
    if remote.token_file is None:
        return ServeControl(remote.dashboard_url, os.environ.get(REMOTE_TOKEN), remote.url)
    try:
        return ServeControl(remote.dashboard_url, Path(remote.token_file).read_text().strip(), remote.url)
    except OSError as error:
        raise DeployError(f"serve.remote.token_file {remote.token_file} cannot be read ({error.strerror})") from error


def remote_headers() -> dict[str, str]:
    """What opens the endpoint of another cluster: its key file is not ours to lend from."""
    key = os.environ.get(REMOTE_KEY)
    return {"authorization": f"Bearer {key}"} if key else {}


def hand_over(control: ServeControl, model: str, served: str, adapter: str, alias: str) -> None:
    """Give the endpoint behind `control` an adapter and point `alias` to it. No replica restarts.

    `model`: what the adapter was trained on; `adapter`: a
    directory that the endpoint's replicas see under the same path.

    Raises:
        DeployError: the endpoint serves another model, or does not take the adapter.
        ControlError: there is no endpoint, or its dashboard does not answer.
    """
    found = control.get_user_config()
    if not is_served(control, model):
        raise DeployError(
            f"the endpoint serves {_served_models(control)[0]}, the adapter was trained on {model}: change the endpoint's model, or serve.remote"
        )
    control.set_user_config(with_adapter(found, served, adapter, alias))


def with_adapter(user_config: Mapping[str, Any], served: str, adapter: str, alias: str) -> dict[str, Any]:
    """A `user_config` with one adapter more and `alias` on it. Older versions of the same model leave, unless an alias names them.

    It has no name: the one it came with is that of other contents.
    """
    aliases = user_config["aliases"] | {alias: served}
    family = served.rpartition("-")[0]
    kept = {
        name: path
        for name, path in user_config["adapters"].items()
        if name in aliases.values() or name.rpartition("-")[0] != family
    }
    return unnamed(user_config) | {"adapters": kept | {served: adapter}, "aliases": aliases}


def is_served(control: ServeControl, model: str) -> bool:
    """Whether a base model is the one of the endpoint, as far as names can tell.

    Raises:
        ControlError: its dashboard does not answer.
    """
    return _short(model) in {_short(name) for name in _served_models(control)}


def _served_models(control: ServeControl) -> list[str]:
    """The base model as the endpoint's config names it: a directory or a hub id, and what clients call it."""
    applications = control.status()["applications"]
    args: dict[str, Any] = applications[endpoint_of(applications)]["deployed_app_config"]["args"]
    return [args[key] for key in ("model", "served_model_name") if args.get(key)]


def _short(model: str) -> str:
    """meta-llama/Llama-3.2-1B, /models/Llama-3.2-1B and llama-3.2-1b are one."""
    return Path(model).name.lower()
