"""Ray's job API over HTTP: submit, list, follow, stop. It knows no Kubernetes; an address and a token are enough.

Ray's own client has no timeouts, and takes seconds to import.
"""

import asyncio
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from altiplano.cluster.jobs_package import Package

DASHBOARD_PORT = 8265
CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 15.0, 60.0
UPLOAD_TIMEOUT_S = 300.0
FINAL = ("SUCCEEDED", "FAILED", "STOPPED")
POLL_S = 0.5
HEARTBEAT_S = 60.0  # a followed stream is given up when half of this passes without an answer to it
# A head that has just started has no agent that could run a job. Ray waits 10 s for it, which a busy machine may not keep.
NO_AGENT, AGENT_TIMEOUT_S = ("Failed to get head node agent", "No available agent"), 120.0


class RayUnreachableError(ConnectionError):
    """Ray's dashboard does not answer, or does not take the token."""


class JobRefusedError(RuntimeError):
    """Ray does not take the job; the message is its own."""


class UnknownJobError(ValueError):
    """No job of that id."""


@dataclass(frozen=True)
class Job:
    """One job. Times in seconds since 1970, None when not reached."""

    id: str
    status: str  # PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED
    entrypoint: str
    message: str
    started: float | None
    ended: float | None
    exit_code: int | None  # of the entrypoint
    metadata: Mapping[str, str] = field(default_factory=dict)


class RayJobs:
    """The jobs of one Ray cluster. `token`: Ray's own; `place`: how messages call where the dashboard is."""

    def __init__(self, address: str, token: str | None, place: str | None = None) -> None:
        self._address = address.rstrip("/")
        self._place = place or self._address
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        self._http = httpx.Client(base_url=self._address, headers=self._headers, timeout=timeout)

    def __enter__(self) -> "RayJobs":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    def submit(
        self,
        entrypoint: str,
        *,
        working_dir: Path | None = None,
        env: Mapping[str, str] | None = None,
        submission_id: str | None = None,
        num_cpus: float | None = None,
        num_gpus: float | None = None,
        resources: Mapping[str, float] | None = None,
    ) -> str:
        """Start a job and return its id. `working_dir` is uploaded, unless the cluster has the same bytes already. A head that has no agent
        yet is asked again for two minutes.

        Raises:
            RayUnreachableError: the dashboard does not answer.
            JobRefusedError: Ray does not take it, for example because the id is taken.
            PackageError: the directory is too large to be sent.
        """
        runtime_env: dict[str, Any] = {"env_vars": dict(env)} if env else {}
        if working_dir is not None:
            runtime_env["working_dir"] = self._upload(working_dir)
        asked = {
            "entrypoint": entrypoint,
            "runtime_env": runtime_env,
            "submission_id": submission_id,
            "entrypoint_num_cpus": num_cpus,
            "entrypoint_num_gpus": num_gpus,
            "entrypoint_resources": dict(resources) if resources else None,
        }
        body = {key: value for key, value in asked.items() if value is not None}
        deadline = time.monotonic() + AGENT_TIMEOUT_S
        while True:
            try:
                started: str = self._request("POST", "/api/jobs/", json=body).json()["submission_id"]
                return started
            except JobRefusedError as error:
                if not any(text in str(error) for text in NO_AGENT) or time.monotonic() > deadline:
                    raise
            time.sleep(POLL_S)

    def list(self) -> list[Job]:
        """All jobs that were submitted, the newest first."""
        found = [_job(entry) for entry in self._request("GET", "/api/jobs/").json() if entry.get("submission_id")]
        return sorted(found, key=lambda job: job.started or float("inf"), reverse=True)

    def get(self, job_id: str) -> Job:
        """Raises UnknownJobError."""
        return _job(self._request("GET", f"/api/jobs/{job_id}").json())

    def log(self, job_id: str) -> str:
        """Everything that the job has printed until now."""
        text: str = self._request("GET", f"/api/jobs/{job_id}/logs").json()["logs"] or ""
        return text

    def follow(self, job_id: str) -> Iterator[str]:
        """What the job prints, from its beginning, piece by piece until it ends."""
        self.get(job_id)
        with asyncio.Runner() as runner:
            pieces = self._tail(job_id)
            while (piece := runner.run(anext(pieces, None))) is not None:
                yield piece

    def stop(self, job_id: str) -> bool:
        """Ask a job to end; False when it had ended."""
        stopped: bool = self._request("POST", f"/api/jobs/{job_id}/stop").json()["stopped"]
        return stopped

    def wait(self, job_id: str, timeout_s: float) -> Job:
        """The job once it has ended.

        Raises:
            TimeoutError: it runs for longer.
        """
        deadline = time.monotonic() + timeout_s
        while (job := self.get(job_id)).status not in FINAL:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"job {job_id} is {job.status} after {timeout_s:.0f} s: `altiplano jobs logs {job_id}` says how far it is"
                )
            time.sleep(POLL_S)
        return job

    def _upload(self, directory: Path) -> str:
        package = Package.of(directory)
        path = f"/api/packages/gcs/{package.name}"
        if self._send("GET", path).status_code == httpx.codes.NOT_FOUND:
            self._request("PUT", path, content=package.data, timeout=UPLOAD_TIMEOUT_S)
        return f"gcs://{package.name}"

    async def _tail(self, job_id: str) -> Any:
        import aiohttp

        try:
            async with (
                aiohttp.ClientSession(headers=self._headers) as session,
                session.ws_connect(
                    f"{self._address}/api/jobs/{job_id}/logs/tail", heartbeat=HEARTBEAT_S, max_msg_size=0
                ) as stream,
            ):
                async for message in stream:
                    if message.type is aiohttp.WSMsgType.TEXT:
                        yield message.data
        except aiohttp.ClientError as error:
            raise RayUnreachableError(f"{self._lost(error)}; the job goes on: altiplano jobs logs --follow {job_id}") from error

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        response = self._send(method, path, **options)
        if response.status_code == httpx.codes.NOT_FOUND and path.startswith("/api/jobs/"):
            raise UnknownJobError(f"no job {path.split('/')[3]} on this cluster: `altiplano jobs list` has the ids")
        if response.is_error:
            raise JobRefusedError(f"Ray does not take this ({response.status_code}): {_reason(response.text)}")
        return response

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise RayUnreachableError(self._lost(error)) from error
        if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise RayUnreachableError(
                f"Ray at {self._place} refuses the token ({response.status_code}): set RAY_AUTH_TOKEN to the cluster's own (key auth_token "
                "of its Secret)"
            )
        return response

    def _lost(self, error: Exception) -> str:
        return f"Ray's dashboard at {self._place} does not answer ({error or type(error).__name__}): is its head running?"


def _job(entry: Mapping[str, Any]) -> Job:
    def seconds(name: str) -> float | None:
        return None if entry.get(name) is None else entry[name] / 1000

    return Job(
        id=entry["submission_id"],
        status=entry["status"],
        entrypoint=entry["entrypoint"],
        message=entry.get("message") or "",
        started=seconds("start_time"),
        ended=seconds("end_time"),
        exit_code=entry.get("driver_exit_code"),
        metadata=entry.get("metadata") or {},
    )


def _reason(text: str) -> str:
    """Ray answers with a traceback; the reason is what its last error says."""
    errors = list(re.finditer(r"^[\w.]+(?:Error|Exception): ", text, re.MULTILINE))
    return " ".join((text[errors[-1].end() :] if errors else text).split())[:500] or "no reason given"
