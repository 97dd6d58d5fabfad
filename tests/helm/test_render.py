"""What the chart renders, for every combination of values: valid for Kubernetes, KubeRay and both Helms."""

import copy
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from support import charts, core, crds, operator_rules, pods
from support.matrix import MATRIX, NEWER

# One set of keys per kind that a release may have; schemas of core types come from the API server's own OpenAPI document.
INFO = 1
CORE = {"v1", "apps/v1", "batch/v1", "policy/v1", "networking.k8s.io/v1", "rbac.authorization.k8s.io/v1"}


@pytest.mark.parametrize("name", MATRIX)
def test_both_helms_render_the_same_objects(chart: Path, helm4: charts.Helm4, helm3: charts.Helm3, name: str) -> None:
    by_helm4, by_helm3 = (sorted(helm.template(chart, MATRIX[name]), key=_key) for helm in (helm4, helm3))
    assert [_key(o) for o in by_helm4] == [_key(o) for o in by_helm3]
    assert by_helm4 == by_helm3


@pytest.fixture(scope="module")
def all_objects(chart: Path, helm4: charts.Helm4) -> list[charts.Object]:
    """Every object of every combination once: most are the same in several."""
    found = {}
    for values in MATRIX.values():
        for manifest in _with_cluster(helm4.template(chart, values)):
            found[json.dumps(manifest, sort_keys=True)] = manifest
    return list(found.values())


@pytest.mark.parametrize("version", core.VERSIONS)
def test_kubernetes_knows_every_field(all_objects: list[charts.Object], version: str) -> None:
    unique = {json.dumps(pod["spec"]): pod for pod in pods.pods(all_objects)}
    ours = [manifest for manifest in all_objects if manifest["apiVersion"] in CORE]
    assert len(ours) > 100
    for manifest in [*ours, *unique.values()]:
        assert core.problems(manifest, version) == [], _key(manifest)


@pytest.mark.parametrize("version", core.VERSIONS)
def test_kubernetes_would_see_a_wrong_field(all_objects: list[charts.Object], version: str) -> None:
    deployment = copy.deepcopy(charts.of_kind(all_objects, "Deployment")[0])
    deployment["spec"]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Always"
    (problem,) = core.problems(deployment, version)
    assert "imagePulPolicy" in problem
    # The same verdict as the schemas' own tool.
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePulPolicy"):
        kubernetes_validate.validate(deployment, version, strict=True)


@pytest.mark.parametrize("version", crds.KUBERAY_VERSIONS)
def test_kuberay_takes_its_objects(all_objects: list[charts.Object], crd_folder: Path, version: str) -> None:
    kuberay, others = crds.kuberay(version), crds.monitoring_and_gateway()
    for manifest in all_objects:
        known = next((k for k in (kuberay, others) if k.knows(manifest)), None)
        if known is None:
            assert manifest["apiVersion"] in CORE, f"no schema of {manifest['apiVersion']} {manifest['kind']}"
            continue
        assert known.problems(manifest) == [], _key(manifest)
        if known is kuberay:
            assert operator_rules.broken(known.defaulted(manifest)) == [], _key(manifest)


@pytest.mark.parametrize("name", NEWER)
def test_newer_fields_are_valid_from_their_version_on(chart: Path, helm4: charts.Helm4, crd_folder: Path, name: str) -> None:
    first, values = NEWER[name]
    objects = _with_cluster(helm4.template(chart, values))
    for version in crds.KUBERAY_VERSIONS[crds.KUBERAY_VERSIONS.index(first) :]:
        kuberay = crds.kuberay(version)
        for manifest in (o for o in objects if kuberay.knows(o)):
            assert kuberay.problems(manifest) == []
            assert operator_rules.broken(kuberay.defaulted(manifest)) == []


@pytest.mark.parametrize("name", MATRIX)
def test_names_are_unique_and_namespaced(chart: Path, helm4: charts.Helm4, name: str) -> None:
    objects = _with_cluster(helm4.template(chart, MATRIX[name]))
    keys = [_key(o) for o in objects]
    assert len(keys) == len(set(keys))
    ours = [o for o in objects if o["metadata"]["name"] not in ("trial-extra", "text")]
    assert {o["metadata"].get("namespace") for o in ours} == {charts.NAMESPACE}
    for manifest in ours:
        assert manifest["metadata"]["labels"]["app.kubernetes.io/instance"] == charts.RELEASE, _key(manifest)
        if name == "placed":
            assert manifest["metadata"]["labels"]["team"] == "llamas", _key(manifest)


def test_a_long_release_name_is_cut_with_a_digest(chart: Path, helm4: charts.Helm4) -> None:
    """KubeRay takes 47 characters for a RayService; two long names that begin alike must not become one."""
    names = {
        charts.of_kind(helm4.template(chart, {}, release=release), "RayService")[0]["metadata"]["name"]
        for release in ("team-of-the-white-llamas-production-one", "team-of-the-white-llamas-production-two")
    }
    assert len(names) == 2
    assert all(len(name) <= 47 for name in names)


@pytest.mark.parametrize("name", MATRIX)
def test_lint_is_silent(chart: Path, name: str) -> None:
    assert [
        m
        for m in helm_python.lint(chart, MATRIX[name], strict=True, namespace=charts.NAMESPACE)["messages"]
        if m["severity"] > INFO
    ] == []


def test_the_package_holds_what_the_folder_holds(chart: Path, tmp_path: Path) -> None:
    archive = helm_python.package(chart, destination=tmp_path)
    with tarfile.open(archive) as package:
        packed = {Path(name).relative_to("altiplano").as_posix() for name in package.getnames()}
    wanted = {
        path.relative_to(chart).as_posix()
        for path in chart.rglob("*")
        if path.is_file() and "charts/" not in path.relative_to(chart).as_posix()
    }
    assert wanted <= packed
    assert not any(name.startswith("crds/") for name in packed), "the chart must not own KubeRay's kinds"


@pytest.mark.parametrize("file", sorted((Path(__file__).parent / "previous").glob("*.yaml")), ids=lambda path: path.stem)
def test_values_of_former_releases_still_render(chart: Path, helm4: charts.Helm4, file: Path) -> None:
    """Users keep their files: a key that was there once is not taken away, and a new one has a default."""
    assert charts.of_kind(helm4.template(chart, yaml.safe_load(file.read_text())), "RayService")


def test_a_gpu_cluster_needs_five_values() -> None:
    def leaves(value: Any) -> int:
        return sum(leaves(child) for child in value.values()) if isinstance(value, dict) else 1

    assert leaves(charts.values_file("values-gpu.yaml")) == 5


def test_sections_may_be_empty(chart: Path, helm4: charts.Helm4) -> None:
    values = yaml.safe_load((chart / "values.yaml").read_text())
    wanted = helm4.template(chart, {})
    for name, section in values.items():
        if isinstance(section, dict):
            assert helm4.template(chart, {name: {}}) == wanted, name


def test_notes_say_what_to_do_next(chart: Path, helm4: charts.Helm4) -> None:
    notes = helm4.notes(chart, {})
    assert "ray job submit --address" in notes
    assert "svc/trial-altiplano-endpoint-serve-svc 8000" in notes
    assert "WARNING" not in notes
    assert "--server-side=false" in helm4.notes(chart, MATRIX["helm-owned"])
    assert "who reaches port 8265 runs code" in helm4.notes(chart, MATRIX["no-auth"])


def test_the_air_gap_list_names_every_image(chart: Path, helm4: charts.Helm4) -> None:
    used = {
        c["image"]
        for values in ({}, MATRIX["monitoring"])
        for pod in pods.pods(_with_cluster(helm4.template(chart, values)))
        for c in pods.containers(pod)
    }
    listed = {line for line in (chart / "images.txt").read_text().splitlines() if line and not line.startswith("#")}
    assert used == listed


@pytest.mark.parametrize("script", sorted((charts.CHART / "files").glob("*.py")), ids=lambda path: path.name)
def test_scripts_need_nothing_but_python(script: Path) -> None:
    """They run in a pod: `-S -I` hides everything that is installed here."""
    subprocess.run(
        [sys.executable, "-S", "-I", "-c", f"import runpy; runpy.run_path({str(script)!r}, run_name='imported')"],
        check=True,
        timeout=120,
    )


def _with_cluster(objects: list[charts.Object]) -> list[charts.Object]:
    """The objects, and the RayCluster that the hook applies."""
    hooked = any("raycluster.json" in o["data"] for o in charts.of_kind(objects, "ConfigMap"))
    return [*objects, charts.ray_cluster(objects)] if hooked else objects


def _key(manifest: Any) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]
