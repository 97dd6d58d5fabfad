"""Apply the RayCluster of a release and keep the replica counts that the Ray autoscaler set.

Runs as a Helm hook inside the cluster, with the standard library only, so that any image with Python can run it. `workerGroupSpecs` is an atomic
list for server-side apply: the autoscaler's patch of one count makes it the owner of all groups, and an apply by Helm is refused or sets the
counts back. This job reads the live counts, puts them into the wanted object, and applies that by force and only onto the version that it read.
"""

import argparse
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIELD_MANAGER = "altiplano-chart"
ATTEMPTS = 10
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
Json = dict[str, Any]


class ApplyError(RuntimeError):
    """The RayCluster cannot be applied; the message says what to change."""


def with_live_counts(wanted: Json, live: Json | None) -> Json:
    """`wanted` with the replica counts, and the pods marked for removal, of the same groups in `live`.

    Counts stay within the wanted bounds. Without in-tree autoscaling nobody else sets counts, and `wanted` is returned as it is.
    """
    if live is None or not wanted["spec"].get("enableInTreeAutoscaling"):
        return wanted
    before = {group["groupName"]: group for group in live["spec"].get("workerGroupSpecs", [])}
    return {
        **wanted,
        "spec": {**wanted["spec"], "workerGroupSpecs": [_group(g, before) for g in wanted["spec"]["workerGroupSpecs"]]},
    }


def _group(wanted: Json, before: Mapping[str, Json]) -> Json:
    old = before.get(wanted["groupName"])
    if old is None or old.get("replicas") is None:
        return wanted
    kept = {**wanted, "replicas": min(max(old["replicas"], wanted["minReplicas"]), wanted["maxReplicas"])}
    return {**kept, "scaleStrategy": old["scaleStrategy"]} if old.get("scaleStrategy") else kept


class Api:
    """The few calls to the Kubernetes API that an apply needs."""

    def __init__(self, base: str, token: str, context: ssl.SSLContext | None) -> None:
        self._base, self._token, self._context = base, token, context

    @classmethod
    def in_cluster(cls) -> "Api":
        """The API server of the pod that we run in."""
        host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT_HTTPS"]
        host = f"[{host}]" if ":" in host else host
        context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
        return cls(f"https://{host}:{port}", (ACCOUNT / "token").read_text(), context)

    def get(self, path: str) -> Json:
        """One object."""
        return self._call("GET", path, None)

    def apply(self, path: str, body: Json) -> Json:
        """Server-side apply by force: fields of other managers become ours."""
        return self._call("PATCH", f"{path}?fieldManager={FIELD_MANAGER}&force=true", body)

    def _call(self, method: str, path: str, body: Json | None) -> Json:
        data = None if body is None else json.dumps(body).encode()
        headers = {
            "Authorization": f"Bearer {self._token}",
            "Accept": "application/json",
            "Content-Type": "application/apply-patch+yaml",
        }
        request = urllib.request.Request(self._base + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=30, context=self._context) as response:
            answer: Json = json.load(response)
        return answer


def apply(api: Api, wanted: Json, owner: str, pause_s: float = 0.05) -> str:
    """Apply `wanted`, owned by the ConfigMap `owner` of its namespace; returns a line that says what happened.

    Raises:
        ApplyError: KubeRay is not installed, a right is missing, the object is refused, or it changes faster than we read.
    """
    name, namespace = wanted["metadata"]["name"], wanted["metadata"]["namespace"]
    path = f"/apis/ray.io/v1/namespaces/{namespace}/rayclusters/{name}"
    config = _explained(lambda: api.get(f"/api/v1/namespaces/{namespace}/configmaps/{owner}"))
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": owner, "uid": config["metadata"]["uid"]}
    for attempt in range(ATTEMPTS):
        live = _live(api, path)
        body = with_live_counts(wanted, live)
        body["metadata"] = {**wanted["metadata"], "ownerReferences": [reference]}
        if live is not None:
            # Refused when the autoscaler was faster; then we read again.
            body["metadata"]["resourceVersion"] = live["metadata"]["resourceVersion"]
        try:
            _explained(lambda body=body: api.apply(path, body))
        except _Changed:
            time.sleep(pause_s * attempt)
            continue
        counts = ", ".join(f"{g['groupName']}={g['replicas']}" for g in body["spec"]["workerGroupSpecs"])
        return f"RayCluster {namespace}/{name} {'created' if live is None else 'updated'}: replicas {counts}"
    raise ApplyError(f"RayCluster {name} changed {ATTEMPTS} times while it was applied: run the upgrade again")


class _Changed(Exception):
    """The object is not the one that was read."""


def _live(api: Api, path: str) -> Json | None:
    try:
        return api.get(path)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 404:
                return None
            raise ApplyError(_reason(error)) from error


def _explained(call: Any) -> Json:
    try:
        answer: Json = call()
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 409:
                raise _Changed from error
            raise ApplyError(_reason(error)) from error
    return answer


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        message = json.load(error)["message"]
    except (ValueError, KeyError):
        message = str(error)
    if error.code == 404:
        return f"{message}: install KubeRay 1.5.1 or newer, its operator and its kinds, then run the upgrade again"
    if error.code == 403:
        return f"{message}: the chart's Role was changed or is missing"
    return f"{message} (HTTP {error.code})"


def main() -> int:
    """Apply the manifest; 1 and one line on standard error when that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--manifest", type=Path, required=True, help="the RayCluster as JSON")
    parser.add_argument("--owner", required=True, help="the ConfigMap that owns the RayCluster")
    parser.add_argument("--server", help="address of the API server; default: the one of this pod")
    arguments = parser.parse_args()
    api = Api(arguments.server, "", None) if arguments.server else Api.in_cluster()
    try:
        print(apply(api, json.loads(arguments.manifest.read_text()), arguments.owner))
    except (ApplyError, urllib.error.URLError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
