"""k8s/ as the chart renders it: a base, and overlays that hold only what differs. `python tests/helm/render_k8s.py` writes what this module says."""

import copy
from pathlib import Path
from typing import Any

import yaml

from .charts import ROOT, Helm4, Object, Values, merged, values_file
from .matrix import MONITORING

FOLDER = ROOT / "k8s"
NAME = NAMESPACE = "altiplano"
# Plain manifests have no hook: the RayCluster is an object like the others, to be applied with --force-conflicts.
PLAIN: Values = {"rayCluster": {"apply": "helm"}, "helmTest": {"enabled": False}, "preflight": False}
OVERLAYS: dict[str, Values] = {
    # Grafana imports the dashboards' files; a second copy of them here would only age.
    "gpu": merged(
        values_file("values-gpu.yaml"),
        MONITORING,
        {"backup": {"enabled": True}, "monitoring": {"dashboards": {"enabled": False}}},
    ),
    "cpu-trial": values_file("values-cpu-trial.yaml"),
}
Files = dict[str, str]


def files(helm: Helm4, chart: Path) -> Files:
    """Every file of k8s/ by its path."""
    base = _objects(helm, chart, {})
    written: Files = {}
    for manifest in base:
        name = _component_file(manifest)
        written[f"base/{name}"] = written.get(f"base/{name}", "") + "---\n" + _yaml(manifest)
    written["base/kustomization.yaml"] = _kustomization(
        resources=sorted(path.removeprefix("base/") for path in written), namespace=NAMESPACE
    )
    for overlay, values in OVERLAYS.items():
        written |= _overlay(overlay, base, _objects(helm, chart, values))
    return written


def build(folder: Path) -> list[Object]:
    """What `kubectl kustomize` makes of a folder: the part of kustomize that we use, namely resources, and patches by target."""
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found: dict[tuple[str, str], Object] = {}
    for resource in settings["resources"]:
        path = folder / resource
        manifests = build(path) if path.is_dir() else [o for o in yaml.safe_load_all(path.read_text()) if o]
        found |= {_key(manifest): manifest for manifest in manifests}
    for patch in settings.get("patches", []):
        key = (patch["target"]["kind"], patch["target"]["name"])
        operations = yaml.safe_load((folder / patch["path"]).read_text())
        if isinstance(operations, dict):
            assert operations["$patch"] == "delete"
            del found[key]
        else:
            found[key] = _patched(found[key], operations)
    return list(found.values())


def rendered(helm: Helm4, chart: Path, values: Values) -> list[Object]:
    """The chart's objects as k8s/ has them."""
    return _objects(helm, chart, values)


def _objects(helm: Helm4, chart: Path, values: Values) -> list[Object]:
    objects = helm.template(chart, merged(values, PLAIN), release=NAME)
    return [_without_helm(manifest) for manifest in objects]


def _without_helm(manifest: Any) -> Any:
    """No labels that only a release has."""
    if isinstance(manifest, dict):
        drop = ("helm.sh/chart", "helm.sh/resource-policy")
        kept = {
            k: _without_helm(v)
            for k, v in manifest.items()
            if k not in drop and (k, v) != ("app.kubernetes.io/managed-by", "Helm")
        }
        if "metadata" in kept and kept["metadata"].get("annotations") == {}:
            del kept["metadata"]["annotations"]
        if "metadata" in kept and kept["metadata"].get("namespace") == "llamas":
            kept["metadata"]["namespace"] = NAMESPACE
        return kept
    return [_without_helm(item) for item in manifest] if isinstance(manifest, list) else manifest


def _overlay(overlay: str, base: list[Object], wanted: list[Object]) -> Files:
    before, after = ({_key(o): o for o in objects} for objects in (base, wanted))
    written: Files = {}
    resources, patches = ["../../base"], []
    for key, manifest in after.items():
        if key not in before:
            name = _component_file(manifest)
            path = f"overlays/{overlay}/{name}"
            written[path] = written.get(path, "") + "---\n" + _yaml(manifest)
            resources += [] if name in resources else [name]
    for key in before:
        target = {"kind": key[0], "name": key[1]}
        file = f"patches/{key[0].lower()}-{key[1]}.yaml"
        if key not in after:
            gone = before[key]
            deletion = {
                "apiVersion": gone["apiVersion"],
                "kind": gone["kind"],
                "metadata": {"name": key[1], "namespace": NAMESPACE},
                "$patch": "delete",
            }
            written[f"overlays/{overlay}/{file}"] = _yaml(deletion)
        elif operations := _difference(before[key], after[key], ""):
            written[f"overlays/{overlay}/{file}"] = _yaml(operations)
        else:
            continue
        patches.append({"path": file, "target": target})
    written[f"overlays/{overlay}/kustomization.yaml"] = _kustomization(resources=resources, patches=patches)
    return written


def _difference(before: Any, after: Any, path: str) -> list[Object]:
    """JSON patch operations from one to the other; lists of another length are replaced as a whole."""
    if before == after:
        return []
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            operation for index in range(len(after)) for operation in _difference(before[index], after[index], f"{path}/{index}")
        ]
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [{"op": "replace", "path": path, "value": after}]
    operations: list[Object] = []
    for name in sorted(before.keys() | after.keys()):
        place = f"{path}/{name.replace('~', '~0').replace('/', '~1')}"
        if name not in after:
            operations.append({"op": "remove", "path": place})
        elif name not in before:
            operations.append({"op": "add", "path": place, "value": after[name]})
        else:
            operations += _difference(before[name], after[name], place)
    return operations


def _patched(manifest: Object, operations: list[Object]) -> Object:
    result = copy.deepcopy(manifest)
    for operation in operations:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        place = result
        for name in parents:
            place = place[int(name) if isinstance(place, list) else name]
        key = int(last) if isinstance(place, list) else last
        if operation["op"] == "remove":
            del place[key]
        else:
            place[key] = operation["value"]
    return result


def _kustomization(**fields: Any) -> str:
    body = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **{k: v for k, v in fields.items() if v}}
    return "# Written by tests/helm/render_k8s.py from the chart; a test holds both equal.\n" + _yaml(body)


def _component_file(manifest: Object) -> str:
    kind = manifest["kind"]
    if kind in (
        "RayCluster",
        "RayService",
        "NetworkPolicy",
        "ServiceAccount",
        "PersistentVolumeClaim",
        "PodDisruptionBudget",
        "PodMonitor",
        "PrometheusRule",
    ):
        return f"{kind.lower()}.yaml"
    return f"{manifest['metadata']['labels']['app.kubernetes.io/component']}.yaml"


def _key(manifest: Object) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _yaml(value: Any) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=140)
    return text
