"""Ray Serve of a release on Kubernetes: its dashboard and its endpoint as ports of this machine, through the Kubernetes API."""

from collections.abc import Iterator
from contextlib import contextmanager

from altiplano.cluster.jobs import DASHBOARD_PORT
from altiplano.cluster.kube import RAY_CLUSTER, ClusterUnreachableError, Object
from altiplano.cluster.kube_forward import forwarded
from altiplano.cluster.kube_release import Release
from altiplano.cluster.rayservice import serve_config
from altiplano.cluster.status import active_cluster
from altiplano.serve import ServeControl

SERVE_PORT = 8000
# Each question is a stream of its own through the API server.
POLL_S = 2.0


@contextmanager
def control_of(release: Release, service: Object) -> Iterator[ServeControl]:
    """Serve of the cluster that answers for a RayService, for as long as the block runs.

    Raises:
        ClusterUnreachableError: no cluster answers for it yet, its head does not run, or a port cannot be reached.
        NotInstalledError: the Secret with Ray's token is not there.
    """
    name = active_cluster(service)
    cluster = None if name is None else release.kube.get(RAY_CLUSTER, name)
    if cluster is None:
        raise ClusterUnreachableError(
            f"no cluster answers for RayService {service['metadata']['name']} yet: `altiplano cluster status` shows it, `altiplano cluster doctor` "
            "says what is in its way"
        )
    head = release.head(cluster)
    pod, port = head["metadata"]["name"], serve_config(service).get("http_options", {}).get("port", SERVE_PORT)
    with forwarded(release.kube, pod, DASHBOARD_PORT) as dashboard, forwarded(release.kube, pod, port) as endpoint:
        yield ServeControl(dashboard, release.token(cluster, head), endpoint, POLL_S)
