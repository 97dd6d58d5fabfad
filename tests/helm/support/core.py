"""Check objects of Kubernetes' own kinds against the strict schemas of several versions, each schema read once."""

import functools
import importlib.resources
import json
import re
from typing import Any

import jsonschema
from referencing import Registry, Resource

from .charts import Object

VERSIONS = ("1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")


def problems(manifest: Object, version: str) -> list[str]:
    """What is wrong with the fields of an object; unknown ones are."""
    validator = _validator(manifest["apiVersion"], manifest["kind"], version)
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(manifest)]


@functools.cache
def _validator(api: str, kind: str, version: str) -> jsonschema.Draft202012Validator:
    # rbac.authorization.k8s.io/v1 is rbac-v1, v1 is v1.
    name = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api)
    return jsonschema.Draft202012Validator(_file(version, f"{kind.lower()}-{name}.json"), registry=_definitions(version))


@functools.cache
def _definitions(version: str) -> Registry[Any]:
    return Resource.from_contents(_file(version, "_definitions.json")) @ Registry()


def _file(version: str, name: str) -> Any:
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"
    (newest,) = [entry for entry in folder.iterdir() if re.fullmatch(rf"v{re.escape(version)}\.\d+-local-strict", entry.name)]
    return json.loads((newest / name).read_text())
