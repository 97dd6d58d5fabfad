"""Ray's own readers take what the chart writes; one Ray everywhere; the application that Serve imports is ours."""

import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import DeploymentSchema, ServeDeploySchema
from support import charts, crds, pods
from support.charts import ROOT, Object
from support.matrix import MATRIX

from altiplano.serve.application import IMPORT_PATH
from altiplano.serve.deployment import Endpoint


@pytest.fixture(scope="module")
def objects(chart: Path, helm4: charts.Helm4) -> list[Object]:
    """A default release."""
    return helm4.template(chart, {})


def _serve_config(chart: Path, helm4: charts.Helm4, values: charts.Values) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(
        charts.of_kind(helm4.template(chart, values), "RayService")[0]["spec"]["serveConfigV2"]
    )
    return config


def test_the_autoscaler_reads_the_jobs_cluster(objects: list[Object], crd_folder: Path) -> None:
    cluster = crds.kuberay("1.7.0").defaulted(charts.ray_cluster(objects))
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    gigabyte = 2**30
    assert types["headgroup"]["resources"] == {"CPU": 0, "memory": 8 * gigabyte}, "a head runs no tasks"
    assert types["training"]["resources"] == {"CPU": 8, "GPU": 1, "memory": 32 * gigabyte, "training": 1}
    assert types["preprocessing"]["resources"] == {"CPU": 4, "memory": 16 * gigabyte, "preprocessing": 1}
    assert types["inference"]["resources"] == {"CPU": 4, "GPU": 1, "memory": 16 * gigabyte, "inference": 1}
    assert [(types[name]["min_workers"], types[name]["max_workers"]) for name in ("training", "preprocessing", "inference")] == [
        (0, 4),
        (0, 4),
        (0, 2),
    ]


def test_the_autoscaler_reads_what_users_add(chart: Path, helm4: charts.Helm4, crd_folder: Path) -> None:
    cluster = crds.kuberay("1.7.0").defaulted(charts.ray_cluster(helm4.template(chart, MATRIX["placed"])))
    training = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]["training"]
    assert training["resources"]["H200"] == 1
    # numOfHosts 2: Ray counts hosts, the group counts pairs.
    assert training["max_workers"] == 8


@pytest.mark.parametrize("name", [name for name in MATRIX if name not in ("jobs-survive-heads", "jobs-only", "mlflow-only")])
def test_serve_takes_its_config(chart: Path, helm4: charts.Helm4, name: str) -> None:
    """Serve's own schema lets typos pass, so keys are compared with its fields too."""
    config = _serve_config(chart, helm4, MATRIX[name])
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    known = set(DeploymentSchema.model_fields)
    assert {key for deployment in application["deployments"] for key in deployment} <= known
    assert config["proxy_location"] == "EveryNode", "with HeadOnly KubeRay's workers are never ready"


def test_the_deployment_is_the_one_in_the_code(chart: Path, helm4: charts.Helm4) -> None:
    (application,) = _serve_config(chart, helm4, {})["applications"]
    assert [deployment["name"] for deployment in application["deployments"]] == [Endpoint.name]  # type: ignore[attr-defined]  # Serve's decorator


def test_the_import_path_is_the_applications(chart: Path, helm4: charts.Helm4) -> None:
    (application,) = _serve_config(chart, helm4, {})["applications"]
    assert application["import_path"] == IMPORT_PATH
    module, _, name = IMPORT_PATH.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_adapters_change_without_a_restart(chart: Path, helm4: charts.Helm4) -> None:
    """KubeRay rolls the cluster when rayClusterConfig changes, Serve rolls replicas when arguments do: user_config does neither."""
    before, after = (
        charts.of_kind(helm4.template(chart, values), "RayService")[0]["spec"] for values in ({}, MATRIX["adapters"])
    )
    assert before["rayClusterConfig"] == after["rayClusterConfig"]
    old, new = (yaml.safe_load(spec["serveConfigV2"])["applications"][0] for spec in (before, after))
    assert old["args"] == {k: v for k, v in new["args"].items() if k not in ("usd_per_hour", "otlp_endpoint")}
    assert new["deployments"][0].pop("user_config") == {
        "adapters": {"orders-7": "/workspace/adapters/orders-7"},
        "aliases": {"champion": "orders-7"},
    }
    assert old["deployments"][0].pop("user_config") == {"adapters": {}, "aliases": {}}
    assert old | {"args": {}} == new | {"args": {}}


def test_a_replica_finds_room_on_a_worker(chart: Path, helm4: charts.Helm4, crd_folder: Path) -> None:
    for name in ("default", "gpu", "cpu-trial"):
        service = crds.kuberay("1.7.0").defaulted(charts.of_kind(helm4.template(chart, MATRIX[name]), "RayService")[0])
        cluster = {"metadata": {"name": "x", "namespace": "y"}, "spec": service["spec"]["rayClusterConfig"]}
        node = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]["endpoint"]
        (deployment,) = _serve_config(chart, helm4, MATRIX[name])["applications"][0]["deployments"]
        wants = deployment["ray_actor_options"]
        assert wants["num_cpus"] <= node["resources"]["CPU"]
        assert wants["num_gpus"] <= node["resources"].get("GPU", 0)
        scaling = deployment.get("autoscaling_config", {"max_replicas": deployment.get("num_replicas")})
        assert scaling["max_replicas"] <= node["max_workers"], "one replica a pod"


def test_one_ray_everywhere(objects: list[Object]) -> None:
    versions = {
        charts.ray_cluster(objects)["spec"]["rayVersion"],
        charts.of_kind(objects, "RayService")[0]["spec"]["rayClusterConfig"]["rayVersion"],
    }
    dockerfile = (ROOT / "Dockerfile").read_text()
    in_image = set(re.findall(r"^ARG RAY_VERSION=(\S+)$", dockerfile, re.MULTILINE))
    assert len(in_image) == 1
    versions |= in_image
    (version,) = versions
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = [d for d in project["dependencies"] if d.startswith("ray[")]
    assert Version(version) in SpecifierSet(wanted.split("]")[1])
    assert version == ray.__version__, "what the tests ran with"


def test_one_version_of_ours_everywhere(chart: Path, objects: list[Object]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = yaml.safe_load((chart / "Chart.yaml").read_text())
    assert project["version"] == metadata["version"] == metadata["appVersion"]
    images = {
        container["image"] for pod in pods.pods([*objects, charts.ray_cluster(objects)]) for container in pods.containers(pod)
    }
    assert f"altiplano:{project['version']}" in images
