"""The Kubernetes API through its own client, objects as the JSON that the server speaks.

A server that cannot be reached is told within seconds; one that was reached has a minute to answer. What goes wrong becomes one sentence
that says what to do: a server that does not answer is a ClusterUnreachableError, an answer that is no is a RefusedError.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

Object = dict[str, Any]

FIELD_MANAGER = "altiplano"
CONNECT_TIMEOUT_S = 4.0
READ_TIMEOUT_S = 60.0  # the server itself gives a request no longer
# A followed log may be silent for long.
FOLLOW_TIMEOUT_S = 24 * 3600.0


class ClusterUnreachableError(ConnectionError):
    """The API server, or something behind it, does not answer in time."""


class KubeconfigError(ValueError):
    """There is no cluster to talk to: no kubeconfig, or not the context that was asked for."""


class RefusedError(RuntimeError):
    """The API server answered no. `code`: its HTTP status."""

    exit_code = 1

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Kind:
    """A kind of objects and where the API server has them."""

    api: str  # v1, apps/v1, ray.io/v1
    plural: str

    def path(self, namespace: str | None, name: str | None = None) -> str:
        """The address of one object, or of all; `namespace` None: of the whole cluster."""
        parts = ["", "api" if "/" not in self.api else "apis", self.api]
        parts += ["namespaces", namespace] if namespace else []
        return "/".join([*parts, self.plural, *([name] if name else [])])


CONFIG_MAP = Kind("v1", "configmaps")
EVENT = Kind("v1", "events")
NAMESPACE = Kind("v1", "namespaces")
NODE = Kind("v1", "nodes")
POD = Kind("v1", "pods")
SECRET = Kind("v1", "secrets")
CLAIM = Kind("v1", "persistentvolumeclaims")
DEPLOYMENT = Kind("apps/v1", "deployments")
STATEFUL_SET = Kind("apps/v1", "statefulsets")
BATCH_JOB = Kind("batch/v1", "jobs")
RAY_CLUSTER = Kind("ray.io/v1", "rayclusters")
RAY_JOB = Kind("ray.io/v1", "rayjobs")
RAY_SERVICE = Kind("ray.io/v1", "rayservices")


class Kube:
    """One namespace of one cluster."""

    def __init__(self, api: Any, namespace: str) -> None:
        self.api = api
        self.namespace = namespace
        self.server: str = api.configuration.host

    @classmethod
    def connect(cls, context: str | None = None, namespace: str | None = None) -> "Kube":
        """The cluster of a kubeconfig's context, or the one that this pod runs in. Nothing is asked yet.

        Raises:
            KubeconfigError: there is none, or it does not have the context.
        """
        client, config = _client_library()
        settings = client.Configuration()
        # Named, because the library reads the variable once, when it is imported.
        file = os.environ.get("KUBECONFIG") or None
        try:
            if "KUBERNETES_SERVICE_HOST" in os.environ and context is None and not _kubeconfig_there():
                config.load_incluster_config(client_configuration=settings)
                default = _pod_namespace()
            else:
                config.load_kube_config(file, context, settings)
                default = _context_namespace(config, file, context)
        except config.ConfigException as error:
            raise KubeconfigError(
                f"no cluster to talk to ({error}): set KUBECONFIG, or choose one of `kubectl config get-contexts` with --context"
            ) from error
        # urllib3 would try a dead address four times.
        settings.retries = False
        return cls(client.ApiClient(settings), namespace or default)

    def get(self, kind: Kind, name: str) -> Object | None:
        """One object, or None."""
        try:
            return self._json("GET", kind.path(self.namespace, name))
        except RefusedError as error:
            if error.code == 404:
                return None
            raise

    def find(self, kind: Kind, labels: Mapping[str, str] | None = None, *, everywhere: bool = False) -> list[Object]:
        """The objects with all of `labels`, in this namespace or `everywhere`; empty when the cluster does not know the kind."""
        query = {"labelSelector": ",".join(f"{key}={value}" for key, value in labels.items())} if labels else {}
        try:
            found = self._json("GET", kind.path(None if everywhere else self.namespace), query)
        except RefusedError as error:
            if error.code == 404:
                return []
            raise
        # The server leaves the kind of built-in objects to the list.
        named = {"apiVersion": kind.api, "kind": found["kind"].removesuffix("List")}
        return [named | item for item in found["items"]]

    def kinds(self, api: str) -> set[str]:
        """Names of the kinds of `api` (group/version) that this cluster knows."""
        try:
            found = self._json("GET", f"/apis/{api}")
        except RefusedError as error:
            if error.code == 404:
                return set()
            raise
        return {resource["kind"] for resource in found["resources"]}

    def version(self) -> str:
        """The server's own, as in v1.36.0."""
        found: str = self._json("GET", "/version")["gitVersion"]
        return found

    def has_namespace(self) -> bool:
        """Whether the namespace is there; an account that may not look is taken to work in one that is."""
        try:
            self._json("GET", NAMESPACE.path(None, self.namespace))
        except RefusedError as error:
            return error.code != 404
        return True

    def apply(self, kind: Kind, manifest: Object, *, dry_run: bool = False) -> Object:
        """Server-side apply: the fields of `manifest` become ours, whoever wrote them before. Returns the object as it is then.

        With `dry_run` the server checks and computes everything and keeps nothing.
        """
        query = {"fieldManager": FIELD_MANAGER, "force": "true", **({"dryRun": "All"} if dry_run else {})}
        path = kind.path(self.namespace, manifest["metadata"]["name"])
        return self._json("PATCH", path, query, manifest, "application/apply-patch+yaml")

    def create(self, kind: Kind, manifest: Object, *, dry_run: bool = False) -> Object:
        """A new object; `dry_run` as in `apply`. Raises RefusedError (409) when the name is taken."""
        query = {"fieldManager": FIELD_MANAGER, **({"dryRun": "All"} if dry_run else {})}
        return self._json("POST", kind.path(self.namespace), query, manifest)

    def delete(self, kind: Kind, name: str) -> None:
        """Delete an object and, in the background, what it owns."""
        self._json("DELETE", kind.path(self.namespace, name), {"propagationPolicy": "Background"})

    def merge(self, kind: Kind, name: str, patch: Object) -> Object:
        """A merge patch (RFC 7386)."""
        return self._json(
            "PATCH", kind.path(self.namespace, name), {"fieldManager": FIELD_MANAGER}, patch, "application/merge-patch+json"
        )

    def events_of(self, name: str) -> list[Object]:
        """What happened to the object of that name, the newest first."""
        found = self._json("GET", EVENT.path(self.namespace), {"fieldSelector": f"involvedObject.name={name}"})["items"]
        return sorted(found, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "", reverse=True)

    def pod_log(self, pod: str, container: str, tail: int) -> str:
        """The last `tail` lines of a container."""
        query = {"container": container, "tailLines": str(tail)}
        data: bytes = self._call("GET", f"{POD.path(self.namespace, pod)}/log", query).data
        return data.decode(errors="replace")

    def follow_pod_log(self, pod: str, container: str, tail: int) -> Iterator[str]:
        """The last `tail` lines of a container and then each new piece, until the container ends."""
        query = {"container": container, "tailLines": str(tail), "follow": "true"}
        response = self._call("GET", f"{POD.path(self.namespace, pod)}/log", query, follow=True)
        try:
            for piece in response.stream(decode_content=True):
                yield piece.decode(errors="replace")
        finally:
            response.release_conn()

    def _json(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> Object:
        answer: Object = json.loads(self._call(method, path, query, body, content_type).data)
        return answer

    def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        *,
        follow: bool = False,
    ) -> Any:
        """One request with the client's own connections and credentials. Its generated methods know no kinds of Ray."""
        import urllib3

        headers = {"Accept": "application/json, */*", "Content-Type": content_type}
        self.api.update_params_for_auth(headers, [], ["BearerToken"])
        read_s = FOLLOW_TIMEOUT_S if follow else READ_TIMEOUT_S
        try:
            response = self.api.rest_client.pool_manager.request(
                method,
                f"{self.server}{path}?{urlencode(query or {})}",
                body=None if body is None else json.dumps(body),
                headers=headers,
                preload_content=not follow,
                timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=read_s),
            )
        except urllib3.exceptions.HTTPError as error:
            raise ClusterUnreachableError(
                f"the Kubernetes API at {self.server} does not answer ({_reason(error)}): is the cluster up, is a VPN or tunnel needed? "
                "`kubectl cluster-info` asks the same server"
            ) from error
        if response.status >= 300:
            raise _refusal(self.server, response.status, response.data)
        return response


def age(created: str, now: datetime) -> str:
    """How old an object is, in one unit: 45s, 12m, 5h, 3d. `created`: RFC 3339."""
    seconds = max(0, int((now - datetime.fromisoformat(created)).total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def conditions(manifest: Object) -> dict[str, Object]:
    """`status.conditions` by type."""
    return {condition["type"]: condition for condition in manifest.get("status", {}).get("conditions", [])}


def _client_library() -> tuple[Any, Any]:
    """The client and its configuration: an extra, and seconds to import."""
    try:
        from kubernetes import client, config
    except ModuleNotFoundError as error:
        raise KubeconfigError("the Kubernetes client is not installed: pip install 'altiplano[k8s]'") from error
    return client, config


def _kubeconfig_there() -> bool:
    named = os.environ.get("KUBECONFIG")
    return bool(named) or (Path.home() / ".kube" / "config").is_file()


def _context_namespace(config: Any, file: str | None, context: str | None) -> str:
    contexts, active = config.list_kube_config_contexts(file)
    chosen = next((entry for entry in contexts if entry["name"] == context), active)
    namespace: str = chosen["context"].get("namespace") or "default"
    return namespace


def _pod_namespace() -> str:
    return Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read_text().strip()


def _reason(error: Exception) -> str:
    """The innermost reason, without the addresses of objects."""
    return re.sub(r"^.*?object at 0x[0-9a-f]+>: |^\w+\(.*?\): ", "", str(getattr(error, "reason", None) or error))


def _refusal(server: str, code: int, data: bytes) -> RefusedError:
    try:
        message = json.loads(data)["message"]
    except (ValueError, KeyError, TypeError):
        message = data.decode(errors="replace")[:500]
    advice = {
        401: f"the Kubernetes API at {server} does not know you: log in again (`kubectl get pods` says whether it worked)",
        403: "your account may not do this: ask for the right, or choose another account with --context",
    }.get(code)
    return RefusedError(code, f"{message}: {advice}" if advice else message)
