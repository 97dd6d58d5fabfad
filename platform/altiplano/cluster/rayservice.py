"""The endpoint's RayService with another model: what the pipeline file says, in the pods that the chart made."""

import copy
from typing import Any

import yaml

from altiplano.cluster.kube import Object

# Decided by where the endpoint runs and not by what it serves.
_PLACE = ("proxy_location", "http_options", "grpc_options", "logging_config")
_PLACE_OF_DEPLOYMENT = ("ray_actor_options", "max_replicas_per_node", "placement_group_bundles", "placement_group_strategy")
_PLACE_OF_ARGS = ("api_keys_file", "usd_per_hour", "otlp_endpoint", "metrics_port")


class RenderError(ValueError):
    """This RayService cannot serve this; the message says what to change."""


def with_model(service: Object, wanted: dict[str, Any]) -> Object:
    """`service` with the Serve config `wanted` (of one application with one deployment), as far as the place allows.

    Ports, proxies, key file, price, and what a replica asks of its node stay as they are: those are the chart's.

    Raises:
        RenderError: `service` is not one of ours, or has fewer worker pods than `wanted` has replicas.
    """
    current = serve_config(service)
    application, deployment = _application(current)
    new_application, new_deployment = _application(wanted)
    _check_room(service, new_deployment)
    args = new_application["args"] | {
        key: application["args"][key] for key in _PLACE_OF_ARGS if key in application.get("args", {})
    }
    made = {
        "name": application["name"],
        "route_prefix": application.get("route_prefix", "/"),
        "import_path": application["import_path"],
        # Serve's defaults need no line.
        "args": {key: value for key, value in args.items() if value is not None},
        "deployments": [new_deployment | {key: deployment[key] for key in _PLACE_OF_DEPLOYMENT if key in deployment}],
    }
    config = {key: current[key] for key in _PLACE if key in current} | {"applications": [made]}
    return _with_config(service, config)


def with_user_config(service: Object, user_config: dict[str, Any]) -> Object:
    """`service` with other adapters and aliases, which its replicas take while they run.

    Raises:
        RenderError: `service` is not one of ours.
    """
    config = serve_config(service)
    _, deployment = _application(config)
    deployment["user_config"] = user_config
    return _with_config(service, config)


def user_config(service: Object) -> dict[str, Any]:
    """Adapters and aliases of a RayService.

    Raises:
        RenderError: `service` is not one of ours.
    """
    _, deployment = _application(serve_config(service))
    return {"adapters": {}, "aliases": {}} | (deployment.get("user_config") or {})


def patch_of(service: Object) -> Object:
    """The part of a RayService that `with_model` changes, for a server-side apply that owns nothing else."""
    return {
        "apiVersion": service["apiVersion"],
        "kind": service["kind"],
        "metadata": {key: service["metadata"][key] for key in ("name", "namespace")},
        "spec": {"serveConfigV2": service["spec"]["serveConfigV2"]},
    }


def serve_config(service: Object) -> dict[str, Any]:
    """`serveConfigV2` of a RayService.

    Raises:
        RenderError: it is not YAML.
    """
    try:
        config: dict[str, Any] = yaml.safe_load(service["spec"].get("serveConfigV2", "")) or {}
    except yaml.YAMLError as error:
        raise RenderError(f"serveConfigV2 of {service['metadata']['name']} is not YAML: {error}") from error
    return config


def _with_config(service: Object, config: dict[str, Any]) -> Object:
    made = copy.deepcopy(service)
    made["spec"]["serveConfigV2"] = yaml.safe_dump(config, sort_keys=False)
    return made


def _application(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    applications = config.get("applications", [])
    if len(applications) != 1 or len(applications[0].get("deployments", [])) != 1:
        names = ", ".join(entry["name"] for entry in applications) or "none"
        raise RenderError(
            f"the RayService has the applications {names}: this command changes the chart's, one application with one deployment"
        )
    return applications[0], applications[0]["deployments"][0]


def _check_room(service: Object, deployment: dict[str, Any]) -> None:
    """One replica per pod."""
    wanted = deployment.get("autoscaling_config", {}).get("max_replicas") or deployment.get("num_replicas") or 1
    groups = service["spec"]["rayClusterConfig"].get("workerGroupSpecs", [])
    room = sum(group["maxReplicas"] for group in groups)
    if wanted > room:
        raise RenderError(
            f"serve.autoscaling.max_replicas is {wanted}, the endpoint has at most {room} worker pods: lower it, or raise endpoint.replicas.max "
            "of the release"
        )
