"""Jobs on the standing cluster: the real job API of a head that asks for a token, through Kubernetes and directly."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from conftest import HEAD_POD, Ran
from stand_in import FullCluster

from altiplano.cluster import jobs, local_ray, processes

Altiplano = Callable[..., Ran]


def test_a_job_runs_with_the_files_of_a_directory(running: FullCluster, altiplano: Altiplano, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "task.py").write_text("import os, sys; print('hello', os.environ['WHO']); sys.exit(7)\n")
    started = altiplano(
        "jobs",
        "submit",
        "--name",
        "greeting",
        "--working-dir",
        str(tmp_path / "work"),
        "-e",
        "WHO=llama",
        "--",
        "python",
        "task.py",
    )
    assert (started.code, started.out.strip()) == (0, "greeting"), started.err
    followed = altiplano("jobs", "logs", "--follow", "greeting")
    assert "hello llama" in followed.out
    assert followed.code == 7, "the code of the command is that of the job"
    (job,) = [job for job in json.loads(altiplano("jobs", "list", "-o", "json").out)["jobs"] if job["id"] == "greeting"]
    assert (job["id"], job["status"], job["entrypoint"]) == ("greeting", "FAILED", "python task.py")
    assert "hello llama" in altiplano("jobs", "logs", "greeting").out
    again = altiplano("jobs", "submit", "--name", "greeting", "--", "true")
    assert again.code == 1 and "greeting already exists" in again.err


def test_a_job_is_stopped_and_a_dry_run_starts_nothing(running: FullCluster, altiplano: Altiplano, tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"x" * 2048)
    before = {job["id"] for job in json.loads(altiplano("jobs", "list", "-o", "json").out)["jobs"]}
    planned = altiplano("jobs", "submit", "--dry-run", "-o", "json", "--working-dir", str(tmp_path), "--", "sleep", "600")
    assert json.loads(planned.out)["upload_bytes"] > 0
    altiplano("jobs", "submit", "--name", "sleeper", "--", "sleep", "600")
    refused = altiplano("jobs", "stop", "sleeper")
    assert refused.code == 2 and "-y" in refused.err, "nobody can answer a question here"
    assert altiplano("jobs", "stop", "sleeper", "-y").out.startswith("stopping sleeper")
    ended = altiplano("jobs", "logs", "-f", "sleeper")
    assert ended.code == 1 and "STOPPED" in ended.err
    listed = {job["id"]: job["status"] for job in json.loads(altiplano("jobs", "list", "-o", "json").out)["jobs"]}
    assert listed["sleeper"] == "STOPPED" and set(listed) == {*before, "sleeper"}
    unknown = altiplano("jobs", "logs", "nobody")
    assert unknown.code == 2 and "no job nobody" in unknown.err


def test_ray_is_reached_directly_with_its_token(
    ray_head: tuple[local_ray.RayHead, str], altiplano: Altiplano, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    head, token = ray_head
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    without = altiplano("jobs", "list", "--dashboard-url", head.dashboard)
    assert without.code == 4 and "RAY_AUTH_TOKEN" in without.err
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    assert altiplano("jobs", "list", "--dashboard-url", head.dashboard).code == 0
    nobody = altiplano("jobs", "list", "--dashboard-url", f"http://127.0.0.1:{processes.free_port()}")
    assert nobody.code == 4 and "is its head running?" in nobody.err


def test_jobs_are_listed_while_the_head_is_down(installed: FullCluster, altiplano: Altiplano) -> None:
    pod = installed.get("pods", HEAD_POD)
    installed.put(pod, {"phase": "Pending"})
    nothing = altiplano("jobs", "list")
    assert nothing.code == 4 and f"{HEAD_POD} is Pending" in nothing.err and "cluster doctor" in nothing.err
    assert altiplano("jobs", "submit", "--to", "rayjob", "--name", "sweep", "-y", "--", "python", "x.py").code == 0
    listed = altiplano("jobs", "list")
    assert listed.code == 0 and "sweep" in listed.out and "does not run" in listed.err


def test_a_cluster_that_does_not_answer_is_named_within_seconds(
    altiplano: Altiplano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(
        json.dumps(
            {
                "current-context": "gone",
                "contexts": [{"name": "gone", "context": {"cluster": "gone", "user": "me"}}],
                "clusters": [{"name": "gone", "cluster": {"server": f"http://127.0.0.1:{processes.free_port()}"}}],
                "users": [{"name": "me", "user": {}}],
            }
        )
    )
    file.chmod(0o600)
    monkeypatch.setenv("KUBECONFIG", str(file))
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    lost = altiplano("jobs", "list")
    assert lost.code == 4 and "does not answer" in lost.err and "kubectl cluster-info" in lost.err
    wrong = altiplano("jobs", "list", "--context", "elsewhere")
    assert wrong.code == 2 and "kubectl config get-contexts" in wrong.err


def test_a_head_that_has_no_agent_yet_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that has just started on a busy machine, which answers so after ten seconds."""
    late = "Traceback (most recent call last):\nTimeoutError: Failed to get head node agent within 10 seconds. The last exception is None"
    answers = [
        httpx.Response(500, text=late),
        httpx.Response(500, text="No available agent to submit job, please try again later."),
        httpx.Response(200, json={"submission_id": "greeting"}),
    ]
    monkeypatch.setattr(jobs, "POLL_S", 0)
    with jobs.RayJobs("http://127.0.0.1:9", None) as ray_jobs:
        ray_jobs._http.close()
        ray_jobs._http = httpx.Client(base_url="http://head", transport=httpx.MockTransport(lambda request: answers.pop(0)))
        assert ray_jobs.submit("true") == "greeting" and not answers
        answers.append(httpx.Response(500, text="Traceback\nValueError: no such entrypoint"))
        with pytest.raises(jobs.JobRefusedError, match="no such entrypoint"):
            ray_jobs.submit("true")
        monkeypatch.setattr(jobs, "AGENT_TIMEOUT_S", -1.0)
        answers.append(httpx.Response(500, text=late))
        with pytest.raises(jobs.JobRefusedError, match="head node agent"):
            ray_jobs.submit("true")
