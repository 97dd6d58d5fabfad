"""What a change does: Serve's options as Ray itself sorts them, and worker groups as the operator compares them."""

import warnings
from typing import Any

import pytest
import yaml

from altiplano.cluster.diff import SERVE_IN_PLACE, Effect, plan


def test_what_serve_takes_in_place_is_what_ray_says() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.serve._private.config import DeploymentConfig
        from ray.serve._private.utils import DeploymentOptionUpdateType
    kinds = {name: (field.json_schema_extra or {}).get("update_type") for name, field in DeploymentConfig.model_fields.items()}
    taken = {name for name, kind in kinds.items() if kind not in (None, DeploymentOptionUpdateType.HeavyWeight)}
    assert taken == SERVE_IN_PLACE


def _service(groups: list[str], **serve: Any) -> dict[str, Any]:
    specs = [{"groupName": name, "replicas": 1, "minReplicas": 1, "maxReplicas": 2} for name in groups]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "endpoint"},
        "spec": {"serveConfigV2": yaml.safe_dump(serve), "rayClusterConfig": {"workerGroupSpecs": specs}},
    }


@pytest.mark.parametrize(
    ("before", "after", "effect"),
    [
        (_service(["a"]), _service(["a", "b"]), Effect.in_place),
        (_service(["a"]), _service(["b", "a"]), Effect.new_cluster),
        (_service(["a", "b"]), _service(["a"]), Effect.new_cluster),
        (_service(["a"], http_options={"port": 8000}), _service(["a"], http_options={"port": 9000}), Effect.not_taken),
        (
            _service(["a"], applications=[{"name": "x"}]),
            _service(["a"], applications=[{"name": "x"}, {"name": "y"}]),
            Effect.created,
        ),
        (_service(["a"], applications=[{"name": "x"}]), _service(["a"], applications=[]), Effect.removed),
    ],
)
def test_a_rayservice(before: dict[str, Any], after: dict[str, Any], effect: Effect) -> None:
    assert plan(before, after).effects == [effect]


def test_counts_of_a_group_change_in_place() -> None:
    before, after = _service(["a"]), _service(["a"])
    after["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplicas"] = 9
    (change,) = plan(before, after).changes
    assert (change.path, change.before, change.after) == ("spec.rayClusterConfig.workerGroupSpecs[a].maxReplicas", 2, 9)
    assert change.effect is Effect.in_place
