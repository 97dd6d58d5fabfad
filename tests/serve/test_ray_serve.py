"""The same endpoint on Ray Serve, with adapters that change while it runs."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import ray
from openai import OpenAI

from altiplano import spec
from altiplano.cluster.processes import PortBusyError, free_port, require_free
from altiplano.models.manifest import ManifestError
from altiplano.serve import deploy, undeploy
from altiplano.serve.deployment import DeployError

from .conftest import make_adapter, settings

# Ray's own sockets and files, closed when its processes are collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.serve.shutdown()
    ray.shutdown()


def test_deploy_change_and_undeploy(cluster: None, adapter: Path, tmp_path: Path) -> None:
    port = free_port()
    endpoint = spec.Serve(port=port)
    first = settings(adapter)
    deploy(first, endpoint)
    with pytest.raises(PortBusyError, match=r"serve\.port"):
        require_free("127.0.0.1", port, "serve.port")
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60) as client:
        note = [{"role": "user", "content": "Zobalu asked for 2 red kites to 12 Mill Lane. Where?"}]
        answer = client.chat.completions.create(model="cria", messages=note, temperature=0, max_tokens=20)  # type: ignore[arg-type]
        assert answer.choices[0].message.content == "12 Mill Lane"
        chunks = list(client.chat.completions.create(model="champion", messages=note, stream=True, max_tokens=5))  # type: ignore[call-overload]
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")

        second = make_adapter(tmp_path / "second", seed=2)
        adapters = {**first.adapters, "orders-2": str(second)}
        deploy(replace(first, adapters=adapters, aliases={"champion": "orders-2"}), endpoint)
        assert [model.id for model in client.models.list()] == ["cria", "orders-1", "orders-2", "champion"]

    (second / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ManifestError, match="does not match"):
        deploy(replace(first, adapters=adapters), endpoint)
    with pytest.raises(DeployError, match="chat template"):
        deploy(replace(first, template_digest="0" * 64), endpoint)
    undeploy()
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=10).raise_for_status()
