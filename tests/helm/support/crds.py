"""Check custom resources as an API server does: upstream's schemas made strict, defaults, and CEL rules."""

import copy
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import celpy
import jsonschema
import yaml
from celpy.adapter import json_to_cel

from .charts import ROOT

Schema = dict[str, Any]
KUBERAY_VERSIONS = ("1.5.1", "1.6.2", "1.7.0")


def folder() -> Path | None:
    """Where upstream's CRD files are: ALTIPLANO_CRDS, beside the checkout, or where `make crds` downloads them."""
    candidates = (
        [Path(os.environ["ALTIPLANO_CRDS"])]
        if "ALTIPLANO_CRDS" in os.environ
        else [ROOT.parent / "shared" / "crds", ROOT / ".venv" / "tools" / "crds"]
    )
    return next((path for path in candidates if path.is_dir()), None)


class Crds:
    """The kinds of one set of CRD files."""

    def __init__(self, files: list[Path]) -> None:
        self._kinds: dict[tuple[str, str], Schema] = {}
        for file in files:
            definition = yaml.load(file.read_text(), yaml.CSafeLoader)
            for version in definition["spec"]["versions"]:
                api = f"{definition['spec']['group']}/{version['name']}"
                self._kinds[api, definition["spec"]["names"]["kind"]] = version["schema"]["openAPIV3Schema"]

    def knows(self, manifest: Mapping[str, Any]) -> bool:
        """Whether the object's kind is among them."""
        return (manifest["apiVersion"], manifest["kind"]) in self._kinds

    def defaulted(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """The object with the defaults of its schema, which a server fills in before it validates."""
        result = copy.deepcopy(dict(manifest))
        _fill(result, self._kinds[manifest["apiVersion"], manifest["kind"]])
        return result

    def problems(self, manifest: Mapping[str, Any]) -> list[str]:
        """What a server would say; empty when it takes the object."""
        schema = self._kinds[manifest["apiVersion"], manifest["kind"]]
        full = self.defaulted(manifest)
        found = [
            f"{_path(e.absolute_path)}: {e.message[:200]}"
            for e in _validator(manifest["apiVersion"], manifest["kind"], id(schema), self).iter_errors(full)
        ]
        return found or list(_broken_rules(full, schema, ""))

    def schema(self, api: str, kind: str) -> Schema:
        """The schema of a kind."""
        return self._kinds[api, kind]


def kuberay(version: str) -> Crds:
    """KubeRay's kinds of one version."""
    return _read(f"kuberay/v{version}")


def monitoring_and_gateway() -> Crds:
    """Kinds of the Prometheus operator and of the Gateway API."""
    return _read("prometheus-operator", "gateway-api")


@functools.cache
def _read(*names: str) -> Crds:
    base = folder()
    assert base is not None, "the tests skip before"
    return Crds([file for name in names for file in sorted((base / name).glob("*.yaml"))])


@functools.cache
def _validator(api: str, kind: str, identity: int, crds: Crds) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(_strict(crds.schema(api, kind), root=True))


def _strict(schema: Schema, *, root: bool = False) -> Schema:
    """The structural schema as JSON Schema: unknown fields are errors, int-or-string and nullable have their meaning."""
    result = {
        key: value
        for key, value in schema.items()
        if not key.startswith("x-kubernetes-") and key not in ("nullable", "format", "default")
    }
    if "properties" in result:
        result["properties"] = {name: _strict(child) for name, child in result["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in result:
            result["additionalProperties"] = False
    if isinstance(result.get("additionalProperties"), dict):
        result["additionalProperties"] = _strict(result["additionalProperties"])
    if "items" in result:
        result["items"] = _strict(result["items"])
    for key in ("allOf", "anyOf", "oneOf"):
        if key in result:
            result[key] = [_loose(child) for child in result[key]]
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") and "type" in result:
        result["type"] = [result["type"], "null"]
    if root:
        # A server checks metadata by rules of its own.
        result["properties"] = {**result["properties"], "metadata": {"type": "object"}}
    return result


def _loose(schema: Schema) -> Schema:
    """A branch of a combination adds conditions, not fields."""
    return {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-") and key != "default"}


def _fill(value: Any, schema: Schema) -> None:
    if isinstance(value, dict):
        for name, child in schema.get("properties", {}).items():
            if name not in value and "default" in child:
                value[name] = copy.deepcopy(child["default"])
            if name in value:
                _fill(value[name], child)
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict):
            for name in value.keys() - schema.get("properties", {}).keys():
                _fill(value[name], extra)
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for item in value:
            _fill(item, schema["items"])


def _broken_rules(value: Any, schema: Schema, path: str) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", []):
        # Rules about the former object need an update.
        if "oldSelf" not in rule["rule"] and not _holds(rule["rule"], value):
            yield f"{path or '.'}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        for name, child in schema.get("properties", {}).items():
            if name in value:
                yield from _broken_rules(value[name], child, f"{path}.{name}")
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, item in enumerate(value):
            yield from _broken_rules(item, schema["items"], f"{path}[{index}]")


@functools.cache
def _program(rule: str) -> celpy.Runner:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def _holds(rule: str, value: Any) -> bool:
    return bool(_program(rule).evaluate({"self": json_to_cel(value)}))


def _path(parts: Any) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts) or "."
