"""Every pod that a release makes keeps the restricted Pod Security Standard, and the rules that operators ask of a chart."""

from pathlib import Path
from typing import Any

import pytest
from support import charts, pods
from support.charts import Object
from support.matrix import MATRIX

# KubeRay adds commands and probes to Ray's container itself.
BY_KUBERAY = ("ray-head", "ray-worker")
# They end by themselves; nothing waits for them to be ready.
RUNS_ONCE = ("apply", "check", "backup")


@pytest.fixture(scope="module", params=MATRIX)
def rendered(request: pytest.FixtureRequest, chart: Path, helm4: charts.Helm4) -> list[Object]:
    """The pods of one combination of values."""
    objects = helm4.template(chart, MATRIX[request.param])
    hooked = any("raycluster.json" in o["data"] for o in charts.of_kind(objects, "ConfigMap"))
    return pods.pods([*objects, charts.ray_cluster(objects)] if hooked else objects)


def test_pods_are_restricted(rendered: list[Object]) -> None:
    for pod in rendered:
        spec = pod["spec"]
        assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")), _name(pod)
        assert spec["securityContext"]["runAsNonRoot"] is True, _name(pod)
        assert spec["securityContext"]["runAsUser"] > 0, _name(pod)
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, _name(pod)
        allowed = {"configMap", "emptyDir", "secret", "persistentVolumeClaim"}
        assert all(volume.keys() - {"name"} <= allowed for volume in spec.get("volumes", [])), _name(pod)
        for container in pods.containers(pod):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, _name(pod)
            assert context["capabilities"] == {"drop": ["ALL"]}, _name(pod)
            assert context["readOnlyRootFilesystem"] is True, _name(pod)
            assert context["runAsNonRoot"] is True, _name(pod)


def test_our_own_image_runs_as_a_user_that_no_host_has(rendered: list[Object]) -> None:
    for pod in rendered:
        if any("altiplano" in container["image"] for container in pods.containers(pod)):
            assert pod["spec"]["securityContext"]["runAsUser"] >= 10000, _name(pod)


def test_autoscalers_are_restricted_too(chart: Path, helm4: charts.Helm4) -> None:
    """The operator makes that container from autoscalerOptions, so no template of ours shows it."""
    objects = helm4.template(chart, {})
    for spec in (charts.ray_cluster(objects)["spec"], charts.of_kind(objects, "RayService")[0]["spec"]["rayClusterConfig"]):
        options = spec["autoscalerOptions"]
        assert options["securityContext"]["readOnlyRootFilesystem"] is True
        assert options["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        mounted = {mount["name"] for mount in options["volumeMounts"]}
        assert mounted <= {volume["name"] for volume in spec["headGroupSpec"]["template"]["spec"]["volumes"]}


def test_only_autoscaling_heads_and_the_hook_hold_a_token(rendered: list[Object]) -> None:
    for pod in rendered:
        token = pod["spec"]["automountServiceAccountToken"]
        may = (
            pod["metadata"]["labels"]["app.kubernetes.io/component"] == "hook"
            or pod["metadata"]["labels"].get("ray.io/node-type") == "head"
        )
        assert not token or may, _name(pod)
        assert pod["spec"]["serviceAccountName"] != "default", _name(pod)
        assert pod["spec"]["enableServiceLinks"] is False, _name(pod)


def test_resources_are_bounded(rendered: list[Object]) -> None:
    for pod in rendered:
        for container in pods.containers(pod):
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert {"cpu", "memory"} <= requests.keys() & limits.keys(), _name(pod)
            assert requests["memory"] == limits["memory"], _name(pod)


def test_images_are_exact(rendered: list[Object]) -> None:
    for pod in rendered:
        for container in pods.containers(pod):
            reference = container["image"].rsplit("/", 1)[-1]
            assert "@sha256:" in reference or (":" in reference and not reference.endswith(":latest")), container["image"]


def test_a_digest_pins_every_image(chart: Path, helm4: charts.Helm4) -> None:
    objects = helm4.template(chart, MATRIX["air-gap"])
    for pod in pods.pods([*objects, charts.ray_cluster(objects)]):
        for container in pods.containers(pod):
            assert container["image"].startswith("registry.internal:5000/"), container["image"]
            assert "@sha256:" in container["image"], container["image"]


def test_long_running_containers_are_probed(rendered: list[Object]) -> None:
    for pod in rendered:
        for container in pods.containers(pod):
            if container["name"] in RUNS_ONCE:
                continue
            probes = [name for name in ("startupProbe", "readinessProbe", "livenessProbe") if name in container]
            assert probes == ([] if container["name"] in BY_KUBERAY else ["startupProbe", "readinessProbe", "livenessProbe"]), (
                _name(pod)
            )
            ports = {port["name"] for port in container["ports"]}
            for probe in (container[name] for name in probes):
                port = probe.get("httpGet", probe.get("tcpSocket", {})).get("port")
                assert port is None or port in ports, _name(pod)


def test_secrets_come_by_reference(rendered: list[Object]) -> None:
    words = ("PASSWORD", "TOKEN", "SECRET_KEY", "SECRET_ACCESS_KEY")
    for pod in rendered:
        for container in pods.containers(pod):
            for variable in container.get("env", []):
                if any(word in variable["name"] for word in words):
                    assert "secretKeyRef" in variable["valueFrom"], variable["name"]


def test_no_object_is_a_secret(chart: Path, helm4: charts.Helm4) -> None:
    for values in MATRIX.values():
        assert charts.of_kind(helm4.template(chart, values), "Secret") == []


def test_environments_have_no_name_twice(rendered: list[Object]) -> None:
    for pod in rendered:
        for container in pods.containers(pod):
            names = [variable["name"] for variable in container.get("env", [])]
            assert len(names) == len(set(names)), _name(pod)


def test_mounts_have_volumes(rendered: list[Object]) -> None:
    for pod in rendered:
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])} | {"data"}
        for container in pods.containers(pod):
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes, _name(pod)


def test_accounts_claims_and_config_maps_exist(chart: Path, helm4: charts.Helm4) -> None:
    for name, values in MATRIX.items():
        objects = helm4.template(chart, values)
        hooked = any("raycluster.json" in o["data"] for o in charts.of_kind(objects, "ConfigMap"))
        accounts, claims, maps = (
            {o["metadata"]["name"] for o in charts.of_kind(objects, kind)}
            for kind in ("ServiceAccount", "PersistentVolumeClaim", "ConfigMap")
        )
        for pod in pods.pods([*objects, charts.ray_cluster(objects)] if hooked else objects):
            assert pod["spec"]["serviceAccountName"] in accounts, (name, _name(pod))
            for volume in pod["spec"].get("volumes", []):
                if "configMap" in volume:
                    assert volume["configMap"]["name"] in maps, (name, _name(pod))
                if "persistentVolumeClaim" in volume:
                    assert volume["persistentVolumeClaim"]["claimName"] in claims | {"backups"}, (name, _name(pod))


def test_services_select_pods_and_ports(chart: Path, helm4: charts.Helm4) -> None:
    for values in MATRIX.values():
        objects = helm4.template(chart, values)
        made = pods.pods(objects)
        for service in charts.of_kind(objects, "Service"):
            selected = [pod for pod in made if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()]
            assert len(selected) == 1, service["metadata"]["name"]
            ports = {port["name"] for container in pods.containers(selected[0]) for port in container["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def test_disruption_budgets_select_pods(chart: Path, helm4: charts.Helm4) -> None:
    objects = helm4.template(chart, MATRIX["monitoring"])
    made = pods.pods([*objects, charts.ray_cluster(objects)])
    budgets = charts.of_kind(objects, "PodDisruptionBudget")
    assert len(budgets) == 2
    for budget in budgets:
        labels = budget["spec"]["selector"]["matchLabels"]
        assert [pod for pod in made if labels.items() <= pod["metadata"]["labels"].items()], budget["metadata"]["name"]
        # A Ray worker without a replica is never ready; it must not stop a drain.
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_ray_pods_leave_kuberays_labels_alone(rendered: list[Object]) -> None:
    """The operator's Services select its own app.kubernetes.io/name and created-by; ours would hide the head."""
    for pod in rendered:
        if "ray.io/node-type" in pod["metadata"]["labels"]:
            assert not {"app.kubernetes.io/name", "app.kubernetes.io/created-by"} & pod["metadata"]["labels"].keys()


def _name(pod: Any) -> str:
    name: str = pod["metadata"]["name"]
    return name
