"""Where jobs are: on the cluster that stands, or each on the one that its RayJob has made."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from altiplano.cli.plans import release_of

if TYPE_CHECKING:
    from altiplano.cluster.jobs import RayJobs
    from altiplano.cluster.kube import Object
    from altiplano.cluster.kube_release import Release


@dataclass(frozen=True)
class JobPlaces:
    """What the options of a command say. Kubernetes is asked once for each thing, and not at all when a dashboard is named."""

    context: str | None
    namespace: str | None
    release_name: str
    dashboard_url: str | None

    @property
    def on_kubernetes(self) -> bool:
        return self.dashboard_url is None

    @cached_property
    def release(self) -> "Release":
        """Raises KubeconfigError: there is no cluster to talk to."""
        return release_of(self.context, self.namespace, self.release_name)

    @contextmanager
    def standing(self) -> Iterator["RayJobs"]:
        """The job API of the cluster that takes jobs."""
        from altiplano.cluster.jobs import RayJobs
        from altiplano.cluster.ray_token import token_of_environment

        if self.dashboard_url is not None:
            with RayJobs(self.dashboard_url, token_of_environment()) as ray_jobs:
                yield ray_jobs
            return
        with self.release.ray_jobs(self.release.jobs_cluster()) as ray_jobs:
            yield ray_jobs

    @contextmanager
    def cluster_of(self, job_id: str) -> Iterator[tuple["RayJobs", str]]:
        """The job API of the cluster that has this job, and the id that Ray has for it."""
        manifest = self._ray_job(job_id)
        if manifest is not None:
            with self.release.ray_jobs(self.release.cluster_of_job(manifest)) as ray_jobs:
                yield ray_jobs, manifest["status"].get("jobId") or job_id
            return
        with self.standing() as ray_jobs:
            yield ray_jobs, job_id

    def is_waiting(self, job_id: str) -> bool:
        """Whether this is a RayJob that has no cluster that could be asked."""
        manifest = self._ray_job(job_id)
        return manifest is not None and manifest.get("status", {}).get("jobStatus") not in ("PENDING", "RUNNING")

    def delete(self, job_id: str) -> None:
        """Delete a RayJob."""
        from altiplano.cluster.kube import RAY_JOB

        self.release.kube.delete(RAY_JOB, job_id)

    def _ray_job(self, job_id: str) -> "Object | None":
        from altiplano.cluster.kube import RAY_JOB

        return self.release.kube.get(RAY_JOB, job_id) if self.on_kubernetes else None
