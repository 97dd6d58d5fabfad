"""A stand-in for the Kubernetes API server, over HTTP, because no real one can run here. It is a fake: it admits everything.

Faithful in what an upgrade depends on: discovery, resource versions, JSON, merge and server-side-apply patches with field owners and conflicts,
and lists that are atomic for server-side apply (RayCluster's workerGroupSpecs are; the lists of core types are treated so too, which is stricter than
a real server). There are no controllers but one: a Job runs the Python command of its first container, with its ConfigMap volumes as directories.
Objects whose owner is gone are deleted, as the garbage collector does.
"""

import copy
import json
import re
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Object = dict[str, Any]
KINDS = {
    "v1": ["ConfigMap", "PersistentVolumeClaim", "Pod", "Secret", "Service", "ServiceAccount"],
    "apps/v1": ["Deployment", "StatefulSet"],
    "batch/v1": ["CronJob", "Job"],
    "networking.k8s.io/v1": ["Ingress", "NetworkPolicy"],
    "policy/v1": ["PodDisruptionBudget"],
    "rbac.authorization.k8s.io/v1": ["Role", "RoleBinding"],
    "ray.io/v1": ["RayCluster", "RayJob", "RayService"],
}
PATH = re.compile(
    r"/(?:api/v1|apis/(?P<group>[^/]+)/(?P<version>[^/]+))/namespaces/(?P<namespace>[^/]+)/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+))?(?:/status)?"
)
Leaf = tuple[str, ...]


def plural(kind: str) -> str:
    """The resource's name in an address."""
    return kind.lower()[:-1] + "ies" if kind.endswith("y") else kind.lower() + "s"


class Refusal(Exception):
    """An answer that is not 2xx."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.status = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "code": code,
            "reason": reason,
            "message": message,
        }


class Cluster:
    """The objects, and who owns which of their fields."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Object] = {}
        self.owners: dict[tuple[str, str], dict[Leaf, set[str]]] = {}
        self.job_logs: list[str] = []
        self.lock = threading.RLock()
        self.url = ""
        self._version = 0

    def get(self, kind: str, name: str) -> Object:
        """An object by its plural and name. KeyError when there is none."""
        return self.objects[kind, name]

    def create(self, key: tuple[str, str], body: Object, manager: str) -> Object:
        """POST."""
        if key in self.objects:
            raise Refusal(409, "AlreadyExists", f"{key[0]} {key[1]!r} already exists")
        self.owners[key] = {leaf: {manager} for leaf, _ in _leaves(body)}
        return self._store(key, body)

    def update(self, key: tuple[str, str], body: Object, manager: str) -> Object:
        """PUT and every patch but apply: changed fields are the manager's alone."""
        self._check_version(key, body)
        before = dict(_leaves(self.objects[key]))
        owners = self.owners[key]
        after = dict(_leaves(body))
        for leaf in before.keys() - after.keys():
            owners.pop(leaf, None)
        for leaf, value in after.items():
            if before.get(leaf, _leaves) != value:
                owners[leaf] = {manager}
        return self._store(key, body)

    def apply(self, key: tuple[str, str], body: Object, manager: str, force: bool) -> Object:
        """Server-side apply."""
        if key not in self.objects:
            return self.create(key, body, manager)
        self._check_version(key, body)
        live, owners = copy.deepcopy(self.objects[key]), self.owners[key]
        present, wanted = dict(_leaves(live)), dict(_leaves(body))
        others = {
            m: leaf for leaf in wanted for m in owners.get(leaf, set()) - {manager} if present.get(leaf, _leaves) != wanted[leaf]
        }
        if others and not force:
            conflicts = ", ".join(
                f'conflict with "{m}" using {body["apiVersion"]}: .{".".join(leaf)}' for m, leaf in others.items()
            )
            raise Refusal(409, "Conflict", f"Apply failed with {len(others)} conflict: {conflicts}")
        for leaf in [leaf for leaf, names in owners.items() if names == {manager} and leaf not in wanted]:
            _remove(live, leaf)
            del owners[leaf]
        for leaf, value in wanted.items():
            owners[leaf] = {manager} if present.get(leaf, _leaves) != value else owners.get(leaf, set()) | {manager}
            _set(live, leaf, copy.deepcopy(value))
        return self._store(key, live)

    def delete(self, key: tuple[str, str]) -> Object:
        """DELETE, and the garbage collector after it."""
        gone = self.objects.pop(key)
        uid = gone["metadata"]["uid"]
        for other in [
            k for k, o in self.objects.items() if any(r["uid"] == uid for r in o["metadata"].get("ownerReferences", []))
        ]:
            self.delete(other)
        return gone

    def _check_version(self, key: tuple[str, str], body: Object) -> None:
        wanted = body["metadata"].get("resourceVersion")
        if wanted and wanted != self.objects[key]["metadata"]["resourceVersion"]:
            raise Refusal(409, "Conflict", f"the object has been modified: {key[0]} {key[1]!r}")

    def _store(self, key: tuple[str, str], body: Object) -> Object:
        self._version += 1
        before = self.objects.get(key, {"metadata": {"uid": str(uuid.uuid4()), "creationTimestamp": "2026-11-21T00:00:00Z"}})
        kept = {name: before["metadata"][name] for name in ("uid", "creationTimestamp")}
        stored = {**body, "metadata": {**body["metadata"], **kept, "resourceVersion": str(self._version)}}
        self.objects[key] = stored
        return stored

    def run_job(self, key: tuple[str, str]) -> None:
        """The one controller: run the command, then say how it ended."""
        job = self.objects[key]
        spec = job["spec"]["template"]["spec"]
        container = spec["containers"][0]
        with tempfile.TemporaryDirectory() as folder:
            places = {}
            for volume in spec["volumes"]:
                for name, text in self.get("configmaps", volume["configMap"]["name"])["data"].items():
                    (Path(folder) / name).write_text(text)
                places[next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == volume["name"])] = folder
            words = [*container["command"], *container.get("args", [])]
            for mounted, real in places.items():
                words = [word.replace(mounted, real) for word in words]
            done = subprocess.run(
                [sys.executable, *words[1:], "--server", self.url], capture_output=True, text=True, timeout=300, check=False
            )
        self.job_logs.append(done.stdout + done.stderr)
        kind = "Complete" if done.returncode == 0 else "Failed"
        counts = {"succeeded": 1} if done.returncode == 0 else {"failed": 1}
        with self.lock:
            self._store(key, {**job, "status": {**counts, "conditions": [{"type": kind, "status": "True", "reason": kind}]}})


def _leaves(value: Any, path: Leaf = ()) -> Iterator[tuple[Leaf, Any]]:
    """The fields that have an owner each: lists are one, metadata that the server writes is none."""
    if isinstance(value, dict) and value:
        for name, child in value.items():
            if path == () and name in ("apiVersion", "kind", "status"):
                continue
            if path == ("metadata",) and name not in ("labels", "annotations", "ownerReferences"):
                continue
            yield from _leaves(child, (*path, name))
    elif path:
        yield path, value


def _set(target: Object, leaf: Leaf, value: Any) -> None:
    for name in leaf[:-1]:
        target = target.setdefault(name, {})
    target[leaf[-1]] = value


def _remove(target: Object, leaf: Leaf) -> None:
    for name in leaf[:-1]:
        target = target.get(name, {})
    target.pop(leaf[-1], None)


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge_patch(result.get(name), value)
    return result


def json_patch(target: Any, operations: list[Object]) -> Any:
    """The part of RFC 6902 that Ray's autoscaler uses: replace and add at a path."""
    result = copy.deepcopy(target)
    for operation in operations:
        *parents, last = operation["path"].strip("/").split("/")
        place = result
        for name in parents:
            place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
        place[last] = operation["value"]
    return result


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_PUT(self) -> None:
        self._answer(lambda: self.cluster.update(self._key(), self._body(), self._manager()))

    def do_PATCH(self) -> None:
        self._answer(self._patch)

    def do_DELETE(self) -> None:
        self._body()
        self._answer(lambda: self.cluster.delete(self._existing()))

    def _answer(self, act: Any) -> None:
        code, ran = 200, None
        answer: Object = {}
        with self.cluster.lock:
            try:
                answer = act()
                if self.command in ("POST", "PATCH") and answer.get("kind") == "Job" and "status" not in answer:
                    ran = ("jobs", answer["metadata"]["name"])
            except Refusal as refusal:
                code, answer = refusal.code, refusal.status
        if ran:
            # Outside the lock: the job talks to us.
            self.cluster.run_job(ran)
        # An empty document in protobuf: Helm 3 then validates nothing by itself.
        old = self.path.startswith("/openapi/v2")
        data = b"" if old else json.dumps(answer).encode()
        self.send_response(200 if old else code)
        self.send_header("Content-Type", "application/octet-stream" if old else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _get(self) -> Object:
        path, query = self._split()
        if PATH.fullmatch(path) is None:
            return _discovery(path)
        match = self._match()
        if match["name"]:
            return self.cluster.objects[self._existing()]
        if "watch" in query:
            # Clients then list; every change is over before they ask.
            raise Refusal(422, "Invalid", "this server does not watch")
        items = [o for (kind, _), o in self.cluster.objects.items() if kind == match["plural"] and _selected(o, query)]
        api = f"{match['group']}/{match['version']}" if match["group"] else "v1"
        return {"kind": f"{_kind(match['plural'])}List", "apiVersion": api, "metadata": {"resourceVersion": "1"}, "items": items}

    def _post(self) -> Object:
        body = self._body()
        return self.cluster.create((self._match()["plural"], body["metadata"]["name"]), body, self._manager())

    def _patch(self) -> Object:
        body, kind = self._body(), self.headers["Content-Type"]
        if kind.startswith("application/apply-patch"):
            return self.cluster.apply(self._key(), body, self._manager(), self._split()[1].get("force") == ["true"])
        key = self._existing()
        patched = (
            json_patch(self.cluster.objects[key], body)
            if kind == "application/json-patch+json"
            else merge_patch(self.cluster.objects[key], body)
        )
        return self.cluster.update(key, patched, self._manager())

    def _body(self) -> Any:
        length = int(self.headers.get("Content-Length") or 0)
        text = self.rfile.read(length)
        return json.loads(text) if text else {}

    def _manager(self) -> str:
        return self._split()[1].get("fieldManager", [self.headers.get("User-Agent", "unknown").split("/")[0]])[0]

    def _split(self) -> tuple[str, dict[str, list[str]]]:
        parts = urlsplit(self.path)
        return parts.path, parse_qs(parts.query)

    def _match(self) -> re.Match[str]:
        match = PATH.fullmatch(self._split()[0])
        if match is None:
            raise Refusal(404, "NotFound", f"the server could not find the requested resource {self.path}")
        return match

    def _key(self) -> tuple[str, str]:
        match = self._match()
        return match["plural"], match["name"]

    def _existing(self) -> tuple[str, str]:
        key = self._key()
        if key not in self.cluster.objects:
            raise Refusal(404, "NotFound", f'{key[0]} "{key[1]}" not found')
        return key


def _selected(manifest: Object, query: dict[str, list[str]]) -> bool:
    labels = manifest["metadata"].get("labels", {})
    for term in ",".join(query.get("labelSelector", [])).split(","):
        if "=" in term and labels.get(term.split("=")[0]) != term.split("=")[-1]:
            return False
    for term in ",".join(query.get("fieldSelector", [])).split(","):
        if term.startswith("metadata.name=") and manifest["metadata"]["name"] != term.split("=")[1]:
            return False
    return True


def _kind(name: str) -> str:
    return next(kind for kinds in KINDS.values() for kind in kinds if plural(kind) == name)


def _discovery(path: str) -> Object:
    groups = [api.split("/") for api in KINDS if "/" in api]
    if path == "/version":
        return {"major": "1", "minor": "36", "gitVersion": "v1.36.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        listed = [
            {
                "name": g,
                "versions": [{"groupVersion": f"{g}/{v}", "version": v}],
                "preferredVersion": {"groupVersion": f"{g}/{v}", "version": v},
            }
            for g, v in groups
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    if path.startswith("/openapi/v3"):
        return _openapi(path.removeprefix("/openapi/v3").removeprefix("/"))
    api = path.removeprefix("/apis/").removeprefix("/api/")
    if api in KINDS:
        verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
        resources = [
            {"name": plural(kind), "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}
            for kind in KINDS[api]
        ]
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api, "resources": resources}
    raise Refusal(404, "NotFound", f"the server could not find the requested resource {path}")


def _openapi(api: str) -> Object:
    """Just enough for clients to leave the validation of fields to the server."""
    folders = {("apis/" if "/" in name else "api/") + name: name for name in KINDS}
    if not api:
        return {"paths": {folder: {"serverRelativeURL": f"/openapi/v3/{folder}"} for folder in folders}}
    group, version = folders[api].split("/") if "/" in folders[api] else ("", folders[api])
    kinds = [{"group": group, "version": version, "kind": kind} for kind in [*KINDS[folders[api]], "Namespace"]]
    answer = {"200": {"description": "OK"}}
    patch = {"parameters": [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}], "responses": answer}
    return {
        "openapi": "3.0.0",
        "info": {"title": "fake", "version": "1"},
        "paths": {f"/{k['kind']}": {"patch": patch | {"x-kubernetes-group-version-kind": k}} for k in kinds},
    }


@contextmanager
def serving(cluster: Cluster | None = None, answers: type[_Handler] = _Handler) -> Iterator[Cluster]:
    """A cluster on a port of its own. `answers`: a handler that knows more."""
    cluster = cluster or Cluster()
    handler = type("Handler", (answers,), {"cluster": cluster})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    cluster.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield cluster
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
