"""A pipeline that runs on one Ray cluster and gives its adapter to the endpoint of another, as the chart's two clusters are."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from altiplano import spec
from altiplano.cluster import local_ray
from altiplano.cluster.processes import free_port
from altiplano.pipeline.serving import hand_over, remote_control
from altiplano.serve import ServeControl, deploy
from altiplano.serve.control import ControlError, DeployError

from .conftest import make_adapter, settings

pytestmark = pytest.mark.slow  # two heads and an endpoint
QUESTION = {"prompt": "A note", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Workspaces of the cluster that runs jobs and of the one that serves; each has a token of its own."""
    jobs, serving = tmp_path_factory.mktemp("jobs"), tmp_path_factory.mktemp("serving")
    for workspace in (jobs, serving):
        local_ray.start(workspace, 4)
    yield jobs, serving
    for workspace in (jobs, serving):
        local_ray.stop(workspace)


def _control(workspace: Path) -> ServeControl:
    head = local_ray.find(workspace)
    assert head is not None
    return ServeControl(head.dashboard, local_ray.token(workspace))


def test_the_endpoint_of_another_cluster_gets_the_adapter_in_place(
    heads: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, serving = heads
    for name, value in local_ray.environment(jobs).items():
        monkeypatch.setenv(name, value)  # a job has the token of its own cluster in its environment
    monkeypatch.delenv("ALTIPLANO_SERVE_RAY_TOKEN", raising=False)
    endpoint = spec.Serve(port=free_port(), max_num_seqs=16, max_model_len=512, kv_cache_tokens=8192)
    first, second = make_adapter(tmp_path / "first", 1), make_adapter(tmp_path / "second", 2)
    there = _control(serving)
    deploy(settings(first), endpoint, there)
    url = f"http://127.0.0.1:{endpoint.port}/v1"

    def answer(model: str) -> str:
        text: str = httpx.post(f"{url}/completions", json={"model": model, **QUESTION}, timeout=60).json()["choices"][0]["text"]
        return text

    before = answer("champion")
    replicas = [r["actor_id"] for r in there.status()["applications"]["altiplano"]["deployments"]["endpoint"]["replicas"]]
    head = local_ray.find(serving)
    assert head is not None
    remote = spec.ServeRemote(dashboard_url=head.dashboard, url=url)
    with pytest.raises(ControlError, match="refuses the token"):
        hand_over(remote_control(remote), "cria", "orders-2", str(second), "champion")
    remote = remote.model_copy(update={"token_file": str(serving / "ray.token")})
    with pytest.raises(DeployError, match=r"was trained on meta-llama/Llama-3\.2-1B"):
        hand_over(remote_control(remote), "meta-llama/Llama-3.2-1B", "orders-2", str(second), "champion")
    hand_over(remote_control(remote), "cria", "orders-2", str(second), "champion")
    assert answer("champion") == answer("orders-2") != before
    config = there.get_user_config()
    assert config["adapters"] == {"orders-2": str(second)}, "the version before left"
    assert config["aliases"]["champion"] == "orders-2"
    now = [r["actor_id"] for r in there.status()["applications"]["altiplano"]["deployments"]["endpoint"]["replicas"]]
    assert now == replicas, "no replica restarted"
    assert _control(jobs).status()["applications"] == {}, "nothing was deployed where the pipeline runs"
