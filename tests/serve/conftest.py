"""An endpoint as users meet it: uvicorn on a free port, the real engine process, cria and an adapter behind it."""

import asyncio
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import torch
import uvicorn
from openai import OpenAI
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from altiplano.data.templates import ChatTemplate
from altiplano.models.cria import cria_path
from altiplano.models.manifest import write_manifest
from altiplano.serve import app, control, deployment, engine_client, evidence, experiment, observability
from altiplano.serve.app import create_app
from altiplano.serve.deployment import make_generator
from altiplano.serve.generation import Generator
from altiplano.serve.governance import Governance
from altiplano.serve.settings import ServeSettings

PATIENCE_S = 120.0  # what takes longer has failed, on the busiest machine too
PAUSING_ENGINE = [sys.executable, "-P", str(Path(__file__).parent / "pausing_engine.py")]


def make_adapter(directory: Path, seed: int, base_path: Path | None = None) -> Path:
    """An adapter for cria, or another base, that changes what it says."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(base_path or cria_path(), dtype=torch.float32)
    settings = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, settings).save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    write_manifest(directory)
    return directory


def make_base(directory: Path, seed: int) -> Path:
    """A base of cria's family, with fewer layers and weights of its own."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(cria_path())
    config.num_hidden_layers -= 1
    config.layer_types = None
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(cria_path() / name, directory)
    return directory


def settings(adapter: Path) -> ServeSettings:
    return ServeSettings(
        model_path=str(cria_path()),
        served_model_name="cria",
        adapters={"orders-1": str(adapter)},
        aliases={"champion": "orders-1"},
        template_digest=ChatTemplate().digest,
        max_model_len=512,
        kv_cache_tokens=8192,
        max_num_seqs=16,
    )


def start_ray(num_cpus: int) -> None:
    """A Ray of this process, whichever others run here. Ray gives its own processes 30 seconds, which a busy machine may not keep: then
    twice more."""
    for left in (2, 1, 0):
        try:
            ray.init("local", num_cpus=num_cpus, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
            return
        except Exception:
            ray.shutdown()
            if not left:
                raise


class Server:
    """uvicorn in a thread with an event loop of its own; `run` executes a coroutine there."""

    def __init__(self, wanted: ServeSettings, governance: Governance | None = None) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.generator: Generator = self.run(make_generator(wanted))
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        sock.listen(128)  # clients may come before uvicorn accepts
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        # No connection is closed at the moment at which its client, after a pause, sends the next request.
        patience: dict[str, Any] = {"timeout_keep_alive": 10 * int(PATIENCE_S)}
        config = uvicorn.Config(create_app(lambda: self.generator, governance), log_level="error", lifespan="off", **patience)
        self._uvicorn = uvicorn.Server(config)
        self._serving = asyncio.run_coroutine_threadsafe(self._uvicorn.serve([sock]), self.loop)
        self._sock = sock

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, PATIENCE_S), self.loop).result()

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait until something is so in the server, which goes on meanwhile."""

        async def wait() -> None:
            while not reached():
                await asyncio.sleep(0.002)

        self.run(wait())

    @contextmanager
    def stopped(self) -> Iterator[int]:
        """The engine's process, which neither works nor ends in between: no answer ends."""
        pid = self.generator.client.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            yield pid
        finally:
            with suppress(ProcessLookupError):  # it was started again meanwhile
                os.kill(pid, signal.SIGCONT)

    @contextmanager
    def unending(self) -> Iterator[None]:
        """Long answers that begin here get their first words, and do not end before this does.

        The engine (see pausing_engine.py) hears commands all the time, and computes nothing.
        """
        client = self.generator.client
        pid = client.pid
        assert pid is not None
        os.kill(pid, signal.SIGUSR1)
        try:
            yield
        finally:
            if client.ready and client.pid == pid:  # it has not ended meanwhile
                os.kill(pid, signal.SIGUSR2)
                self.run(client.stats())  # it looks up when it is asked something

    def leave(self, path: str, reached: Callable[[], bool], **request: Any) -> None:
        """Ask (POST) and leave without an answer, as soon as something is so in the server."""

        async def visit() -> None:
            async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE_S) as http:
                asking = asyncio.create_task(http.post(path, **request))
                await asyncio.to_thread(self.until, reached)
                assert not asking.done()
                asking.cancel()
                await asyncio.wait({asking})

        asyncio.run(visit())

    def close(self) -> None:
        self._uvicorn.should_exit = True
        self._serving.result(PATIENCE_S)
        self.run(self.generator.client.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        self._sock.close()


@pytest.fixture(scope="module", autouse=True)
def patient() -> Iterator[None]:
    """Nothing is given up because the machine is busy, and the engine can pause (see `Server.unending`).

    A test of what becomes of something that does not answer sets the time that it waits itself.
    """
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(engine_client, "COMMAND", PAUSING_ENGINE)
        for module, name in (
            (app, "HEALTH_TIMEOUT_S"),
            (control, "REPLICA_TIMEOUT_S"),
            (deployment, "STATS_TIMEOUT_S"),
            (evidence, "TIMEOUT_S"),
            (experiment, "LATE_AFTER_S"),
            (observability, "STATS_TIMEOUT_S"),
        ):
            changed.setattr(module, name, PATIENCE_S)
        yield


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"), seed=1)


@pytest.fixture(scope="module")
def server(adapter: Path) -> Iterator[Server]:
    made = Server(settings(adapter))
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made
