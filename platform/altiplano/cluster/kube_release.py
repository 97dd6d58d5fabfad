"""One release of the chart in a namespace: its Ray clusters, heads and tokens, found by their labels and not by their names."""

import base64
import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from altiplano.cluster.jobs import DASHBOARD_PORT, RayJobs
from altiplano.cluster.kube import POD, RAY_CLUSTER, RAY_SERVICE, SECRET, ClusterUnreachableError, Kube, Object
from altiplano.cluster.kube_forward import forwarded

INSTANCE = "app.kubernetes.io/instance"
COMPONENT = "app.kubernetes.io/component"
# Children of a RayJob or RayService carry the labels of their parent, and this one.
CHILD = "ray.io/originated-from-crd"


class NotInstalledError(ValueError):
    """The namespace does not have what was asked for; the message says how it gets there."""


@dataclass(frozen=True)
class Release:
    """What `helm install NAME` made in the namespace of `kube`."""

    kube: Kube
    name: str

    def labels(self, component: str) -> dict[str, str]:
        """Those of a component: jobs, endpoint, mlflow, postgres, redis."""
        return {INSTANCE: self.name, COMPONENT: component}

    def jobs_cluster(self) -> Object:
        """The RayCluster that takes jobs.

        Raises:
            NotInstalledError: this namespace has none.
        """
        found = [c for c in self.kube.find(RAY_CLUSTER, self.labels("jobs")) if CHILD not in c["metadata"].get("labels", {})]
        if not found:
            raise NotInstalledError(self._missing("cluster for jobs", "rayCluster.enabled"))
        return found[0]

    def endpoint(self) -> Object:
        """The RayService.

        Raises:
            NotInstalledError: this namespace has none.
        """
        found = self.kube.find(RAY_SERVICE, self.labels("endpoint"))
        if not found:
            raise NotInstalledError(self._missing("endpoint", "endpoint.enabled"))
        return found[0]

    def cluster_of_job(self, job: Object) -> Object:
        """The RayCluster in which a RayJob runs.

        Raises:
            NotInstalledError: it is gone or not there yet.
        """
        status = job.get("status", {})
        cluster = self.kube.get(RAY_CLUSTER, status.get("rayClusterName") or "-")
        if cluster is None:
            raise NotInstalledError(
                f"RayJob {job['metadata']['name']} has no cluster now (it is {status.get('jobDeploymentStatus', 'not started')}): a log lives as long as its "
                "cluster; keep it with --keep-for"
            )
        return cluster

    def head(self, cluster: Object) -> Object:
        """The running head pod of a RayCluster.

        Raises:
            ClusterUnreachableError: it does not run.
        """
        name = cluster["metadata"]["name"]
        pods = self.kube.find(POD, {"ray.io/cluster": name, "ray.io/node-type": "head"})
        for pod in pods:
            if pod.get("status", {}).get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]:
                return pod
        seen = (
            ", ".join(f"{p['metadata']['name']} is {p.get('status', {}).get('phase', 'Unknown')}" for p in pods)
            or "there is no pod"
        )
        raise ClusterUnreachableError(f"the head of {name} does not run ({seen}): `altiplano cluster doctor` says why")

    def token(self, cluster: Object, head: Object) -> str | None:
        """Ray's token of a cluster with this `head` pod; None when it asks for none.

        Raises:
            NotInstalledError: the Secret is not there.
        """
        if cluster["spec"].get("authOptions", {}).get("mode") != "token":
            return None
        name, key = _token_secret(cluster, head)
        secret = self.kube.get(SECRET, name)
        if secret is None or key not in secret.get("data", {}):
            raise NotInstalledError(
                f"the Secret {name} with key {key} is not in namespace {self.kube.namespace}: KubeRay makes it for a new cluster, "
                "`altiplano cluster doctor` says whether the operator runs"
            )
        return base64.b64decode(secret["data"][key]).decode()

    @contextmanager
    def ray_jobs(self, cluster: Object) -> Iterator[RayJobs]:
        """The job API of a RayCluster, for as long as the block runs."""
        head = self.head(cluster)
        name = head["metadata"]["name"]
        with contextlib.ExitStack() as stack:
            address = stack.enter_context(forwarded(self.kube, name, DASHBOARD_PORT))
            yield stack.enter_context(RayJobs(address, self.token(cluster, head), place=f"pod {name}"))

    def _missing(self, what: str, key: str) -> str:
        return (
            f"release {self.name} has no {what} in namespace {self.kube.namespace}: name yours with --release and -n, or install it "
            f"(`altiplano cluster install`, {key}: true)"
        )


def _token_secret(cluster: Object, head: Object) -> tuple[str, str]:
    """Name and key of the Secret: as the operator wrote them into the head, whatever it calls the Secret."""
    for variable in head["spec"]["containers"][0].get("env", []):
        if variable["name"] == "RAY_AUTH_TOKEN" and "secretKeyRef" in variable.get("valueFrom", {}):
            reference = variable["valueFrom"]["secretKeyRef"]
            return reference["name"], reference["key"]
    return cluster["spec"]["authOptions"].get("secretName") or cluster["metadata"]["name"], "auth_token"
