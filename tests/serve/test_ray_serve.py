"""The endpoint on Ray Serve: deployed by a config over REST, changed while it answers, taken down."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI
from ray.serve.schema import DeploymentSchema, ServeDeploySchema

from altiplano import spec
from altiplano.cluster import local_ray
from altiplano.cluster.processes import PortBusyError, free_port, require_free
from altiplano.models.cria import cria_path
from altiplano.models.manifest import ManifestError
from altiplano.serve import ServeControl, deploy
from altiplano.serve.application import build, parse, serve_config
from altiplano.serve.control import ControlError, DeployError, RefusedConfigError
from altiplano.serve.metrics_server import MOST_REPLICAS_OF_A_NODE
from altiplano.serve.proxy import proxy_of

from .conftest import make_adapter, settings

NOTE: list[Any] = [{"role": "user", "content": "Zobalu asked for 2 red kites to 12 Mill Lane. Where?"}]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, local_ray.RayHead]]:
    workspace = tmp_path_factory.mktemp("ray")
    yield workspace, local_ray.start(workspace, 6)
    local_ray.stop(workspace)


@pytest.fixture(scope="module")
def control(head: tuple[Path, local_ray.RayHead]) -> ServeControl:
    workspace, found = head
    return ServeControl(found.dashboard, local_ray.token(workspace))


@pytest.fixture(scope="module")
def endpoint() -> spec.Serve:
    # An engine that is slow because the machine is busy is not started again, nor its replica.
    patience = {"health_check_timeout_s": 300.0}
    return spec.Serve(port=free_port(), max_num_seqs=16, max_model_len=512, kv_cache_tokens=8192, **patience)


class SteadyClient:
    """Asks one short streamed question after the other, and remembers what did not come back whole."""

    def __init__(self, port: int) -> None:
        self.answers, self.failures = 0, list[str]()
        self._url = f"http://127.0.0.1:{port}/v1/completions"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "SteadyClient":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)

    def _run(self) -> None:
        body = {"model": "champion", "prompt": "A note", "max_tokens": 8, "ignore_eos": True, "stream": True}
        with httpx.Client(timeout=60) as http:
            while not self._stop.is_set():
                try:
                    response = http.post(self._url, json=body)
                    whole = response.status_code == 200 and response.text.endswith("data: [DONE]\n\n")
                    if not whole or '"error"' in response.text:
                        self.failures.append(f"{response.status_code} {response.text[-200:]}")
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                self.answers += 1


def burst(port: int, requests: int) -> set[bytes]:
    """The status lines of completions that are all sent at once."""
    body = json.dumps({"model": "cria", "prompt": "A note", "max_tokens": 4}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60)) for _ in range(requests)]
        for client in clients:
            client.sendall(head.encode() + body)
        return {client.makefile("rb").readline().strip() for client in clients}


def replica_pids(control: ServeControl) -> list[int]:
    deployment = control.status()["applications"]["altiplano"]["deployments"]["endpoint"]
    return [replica["pid"] for replica in deployment["replicas"] if replica["state"] == "RUNNING"]


def metrics_url(control: ServeControl) -> str:
    """Where the one replica shows its own metrics."""
    (pid,) = replica_pids(control)
    ports = range(spec.Serve().metrics_port, spec.Serve().metrics_port + MOST_REPLICAS_OF_A_NODE)
    (address,) = {
        entry.laddr for entry in psutil.Process(pid).net_connections() if entry.status == "LISTEN" and entry.laddr.port in ports
    }
    return f"http://{address.ip}:{address.port}/metrics"


def engine_pids(control: ServeControl) -> list[int]:
    """Processes of engines under the replicas."""
    return [
        child.pid
        for pid in replica_pids(control)
        for child in psutil.Process(pid).children()
        if "altiplano.serve.engine_process" in child.cmdline()
    ]


@pytest.mark.parametrize("proxy", ["haproxy", "python"])
def test_deploy_change_and_undeploy(
    control: ServeControl, endpoint: spec.Serve, adapter: Path, tmp_path: Path, proxy: Any
) -> None:
    endpoint = endpoint.model_copy(update={"http_proxy": proxy})
    first = settings(adapter)
    deploy(first, endpoint, control)
    url = f"http://127.0.0.1:{endpoint.port}"
    with pytest.raises(PortBusyError, match=r"serve\.port"):
        require_free("127.0.0.1", endpoint.port, "serve.port")
    assert proxy_of(control.status()["applications"]["altiplano"]["deployed_app_config"]) == proxy
    assert control.listening() == ("127.0.0.1", endpoint.port)
    with OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60) as client:
        answer = client.chat.completions.create(model="cria", messages=NOTE, temperature=0, max_tokens=20)
        assert answer.choices[0].message.content == "12 Mill Lane"
        assert (
            'altiplano_requests_total{route="/v1/chat/completions",status="200"} 1.0'
            in httpx.get(metrics_url(control), timeout=60).text
        )

        assert burst(endpoint.port, 48) == {b"HTTP/1.1 200 OK"}, "a burst on an idle endpoint is not too much"

        before = replica_pids(control), engine_pids(control)
        assert len(before[0]) == len(before[1]) == 1
        second = make_adapter(tmp_path / "second", seed=2)
        adapters = {**first.adapters, "orders-2": str(second)}
        with SteadyClient(endpoint.port) as steady:
            control.set_user_config(control.get_user_config() | {"adapters": adapters})
            control.set_user_config({"adapters": adapters, "aliases": {"champion": "orders-2"}})
            assert [model.id for model in client.models.list()] == ["cria", "orders-1", "orders-2", "champion"]
            # The same by the pipeline's way.
            deploy(replace(first, aliases={"champion": "orders-1", "second": "orders-1"}), endpoint, control)
            assert [model.id for model in client.models.list()] == ["cria", "orders-1", "champion", "second"]
        assert steady.failures == [] and steady.answers > 0
        assert (replica_pids(control), engine_pids(control)) == before, "nothing was restarted"

        # What does not fit is not taken, and costs nobody a replica.
        taken = control.get_user_config()
        with pytest.raises(RefusedConfigError, match="gone has no manifest"):
            control.set_user_config(
                {"adapters": {**first.adapters, "gone": str(tmp_path / "gone")}, "aliases": {"champion": "gone"}}
            )
        assert control.get_user_config() == taken, "replicas started later start with what runs"
        assert [model.id for model in client.models.list()] == ["cria", "orders-1", "champion", "second"]
        assert (replica_pids(control), engine_pids(control)) == before

    control.undeploy()
    assert control.listening() is None
    require_free("127.0.0.1", endpoint.port, "serve.port")


def test_what_cannot_be_deployed_is_refused_before_anything_changes(
    control: ServeControl, endpoint: spec.Serve, adapter: Path, tmp_path: Path
) -> None:
    damaged = make_adapter(tmp_path / "damaged", seed=3)
    (damaged / "adapter_model.safetensors").write_bytes(b"damaged")
    wanted = settings(adapter)
    with pytest.raises(ManifestError, match="does not match"):
        deploy(replace(wanted, adapters={"damaged": str(damaged)}), endpoint, control)
    with pytest.raises(DeployError, match="chat template"):
        deploy(replace(wanted, template_digest="0" * 64), endpoint, control)
    with pytest.raises(ControlError, match="deploy the endpoint first"):
        control.set_user_config({})


def test_a_wrong_token_and_a_missing_dashboard_are_named(head: tuple[Path, local_ray.RayHead]) -> None:
    with pytest.raises(ControlError, match="refuses the token"):
        ServeControl(head[1].dashboard, "wrong").status()
    with pytest.raises(ControlError, match="refuses the token"):
        ServeControl(head[1].dashboard, None).status()
    with socket.socket() as silent, pytest.raises(ControlError, match="is the cluster running"):
        silent.bind(("127.0.0.1", 0))  # and nobody listens
        ServeControl(f"http://127.0.0.1:{silent.getsockname()[1]}", None).status()


def test_the_config_is_one_that_serve_reads(adapter: Path) -> None:
    endpoint = spec.Serve(limits=spec.ServeLimits(max_queued_seqs=100), autoscaling=spec.ServeAutoscaling(max_replicas=3))
    config = serve_config(settings(adapter), endpoint)
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    assert set(deployment) <= set(DeploymentSchema.model_fields), "Serve's schema lets typos pass"
    for bound in ("max_ongoing_requests", "max_queued_requests"):
        assert deployment[bound] > endpoint.max_num_seqs + 100, "our own queue refuses first"
    assert deployment["user_config"] == {"adapters": {"orders-1": str(adapter)}, "aliases": {"champion": "orders-1"}}
    back, read = parse(application["args"])
    assert back == replace(settings(adapter), adapters={}, aliases={})
    assert read.limits.max_queued_seqs == 100 and read.max_num_seqs == 16


def test_arguments_are_checked_by_name() -> None:
    assert parse({"model": "cria"})[0].model_path == str(cria_path())
    assert build({"model": "cria", "max_num_seqs": 4}) is not None
    with pytest.raises(ValueError, match=r"unknown arguments maxnumseqs: the endpoint takes .*max_num_seqs"):
        parse({"model": "cria", "maxnumseqs": 4})
    with pytest.raises(ValueError, match="argument model is missing"):
        parse({})
