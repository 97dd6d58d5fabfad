"""Render the chart with real Helms: 4 by its Go library, 3 by its command line."""

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import helm_python
import yaml

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "helm" / "altiplano"
RELEASE, NAMESPACE = "trial", "llamas"
KUBERNETES = "1.36.0"
Object = dict[str, Any]
Values = dict[str, Any]


class RefusedError(Exception):
    """Helm refused the values; the message is Helm's."""


class Helm(Protocol):
    """One major version of Helm."""

    name: str

    def template(self, chart: Path, values: Values, release: str = RELEASE) -> list[Object]:
        """Render offline. Raises RefusedError."""


class Helm4:
    """The Go library of Helm 4, inside a wheel."""

    name = "helm4"

    def template(self, chart: Path, values: Values, release: str = RELEASE) -> list[Object]:
        """As Helm."""
        return _copies(_rendered4(chart, json.dumps(values), release))

    def notes(self, chart: Path, values: Values) -> str:
        """NOTES.txt as a user reads it."""
        files = helm_python.Chart.load(chart).render(values, name=RELEASE, namespace=NAMESPACE)
        return next(text for name, text in files.items() if name.endswith("NOTES.txt"))


class Helm3:
    """The command line of Helm 3, from HELM3 or where `make test-helm` puts it."""

    name = "helm3"

    def __init__(self, binary: Path) -> None:
        self.binary = binary

    @classmethod
    def find(cls) -> "Helm3 | None":
        """The binary, or None when it is nowhere."""
        binary = Path(os.environ.get("HELM3", ROOT / ".venv" / "tools" / "helm3" / "package" / "bin" / "helm"))
        return cls(binary) if binary.is_file() else None

    def template(self, chart: Path, values: Values, release: str = RELEASE) -> list[Object]:
        """As Helm."""
        words = ("template", release, str(chart), "-n", NAMESPACE, "--kube-version", KUBERNETES, "-f", "-")
        return _copies(tuple(_objects(self.run(*words, values=values))))

    def run(self, *arguments: str, values: Values | None = None) -> str:
        """The output of a command; `values` go to its standard input."""
        text = None if values is None else json.dumps(values)
        done = subprocess.run([self.binary, *arguments], input=text, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise RefusedError(done.stderr)
        return done.stdout


@functools.cache
def _rendered4(chart: Path, values: str, release: str) -> tuple[str, ...]:
    """Objects as JSON, rendered once in a session: the same values are looked at from many sides."""
    try:
        files = helm_python.Chart.load(chart).render(json.loads(values), name=release, namespace=NAMESPACE)
    except helm_python.HelmError as error:
        raise RefusedError(str(error)) from error
    return tuple(made for name, text in sorted(files.items()) if not name.endswith("NOTES.txt") for made in _objects(text))


def _copies(objects: tuple[str, ...]) -> list[Object]:
    """Fresh ones: a test may change what it was given."""
    return [json.loads(made) for made in objects]


def _objects(text: str) -> Iterator[str]:
    for document in re.split(r"^---\n", text, flags=re.MULTILINE):
        made = _as_json(document)
        if made != "null":
            yield made


@functools.cache
def _as_json(document: str) -> str:
    """Most documents are the same in many renders, and JSON is read ten times as fast as YAML."""
    return json.dumps(yaml.load(document, yaml.CSafeLoader))


def working_copy(directory: Path) -> Path:
    """The chart with its subchart: KubeRay's own chart cannot be fetched offline, so an empty one of that name and version stands in."""
    copy = directory / "altiplano"
    shutil.copytree(CHART, copy)
    metadata = yaml.safe_load((copy / "Chart.yaml").read_text())
    for dependency in metadata["dependencies"]:
        stand_in = copy / "charts" / dependency["name"]
        stand_in.mkdir(parents=True)
        (stand_in / "Chart.yaml").write_text(f"apiVersion: v2\nname: {dependency['name']}\nversion: {dependency['version']}\n")
    return copy


def merged(*layers: Values) -> Values:
    """Values files laid over one another, as `-f a -f b` does."""
    result: Values = {}
    for layer in layers:
        result = _merge(result, layer)
    return result


def _merge(below: Values, above: Values) -> Values:
    both = {
        key: _merge(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
        for key, value in above.items()
    }
    return {**below, **both}


def values_file(name: str) -> Values:
    """A values file of the chart."""
    values: Values = yaml.safe_load((CHART / name).read_text())
    return values


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    """The objects of one kind."""
    return [o for o in objects if o["kind"] == kind]


def ray_cluster(objects: list[Object]) -> Object:
    """The jobs cluster: an object of the release, or what the hook applies."""
    found = of_kind(objects, "RayCluster")
    for config in of_kind(objects, "ConfigMap"):
        if "raycluster.json" in config["data"]:
            found.append(json.loads(config["data"]["raycluster.json"]))
    (cluster,) = found
    return cluster
