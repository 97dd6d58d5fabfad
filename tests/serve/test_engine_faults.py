"""An engine that hangs or ends under an endpoint: what clients, health checks and scrapes are told, and that it comes back."""

import asyncio
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from altiplano.serve import deployment, engine_client
from altiplano.serve import messages as m
from altiplano.serve.engine_errors import EngineDiedError
from altiplano.serve.observability import STATS_TIMEOUT_S  # the product's own: tests change the module's

from .conftest import PATIENCE_S, Server
from .test_gate import LONG, SHORT

CHAMPION: dict[str, Any] = SHORT | {"model": "champion"}


@pytest.fixture
def replica(server: Server, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What Ray Serve asks for its health, around the server's engine; patient, unless a test has stopped the engine."""
    monkeypatch.setattr(deployment._Process, "generator", server.generator)
    made = SimpleNamespace(_patience_s=PATIENCE_S)
    made.check = lambda: server.run(deployment.Endpoint.func_or_class.check_health(made))  # type: ignore[attr-defined]
    return made


def test_a_stopped_engine_is_unhealthy_and_its_front_end_still_tells_what_it_knows(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    httpx.post(f"{server.url}/v1/completions", json=SHORT, timeout=60)
    with server.stopped(), monkeypatch.context() as impatient:
        impatient.setattr("altiplano.serve.app.HEALTH_TIMEOUT_S", 0.3)
        impatient.setattr("altiplano.serve.observability.STATS_TIMEOUT_S", 0.3)
        health = httpx.get(f"{server.url}/health", timeout=60)
        text = httpx.get(f"{server.url}/metrics", timeout=60).text
    assert health.status_code == 503 and health.headers["retry-after"] == "2"
    assert health.json()["error"]["type"] == "server_error"
    assert STATS_TIMEOUT_S < 3, (
        "docs/api.md and docs/operations.md: /metrics answers within three seconds, also when the engine hangs"
    )
    assert "altiplano_engine_up 0.0" in text and 'altiplano_generation_tokens_total{arm="base"' in text
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
    assert "altiplano_engine_up 1.0" in httpx.get(f"{server.url}/metrics", timeout=60).text


def test_a_health_check_starts_a_hung_engine_again_with_its_adapters(server: Server, replica: Any) -> None:
    words = httpx.post(f"{server.url}/v1/completions", json=CHAMPION, timeout=60).json()["choices"]
    client = server.generator.client
    replica.check()
    with server.stopped() as before:
        restarts = client.restarts
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(httpx.post, f"{server.url}/v1/completions", json=LONG | {"stream": True}, timeout=60)
            server.until(lambda: bool(client._streams))
            replica._patience_s = 0.3
            replica.check()
            replica._patience_s = PATIENCE_S
            # Nothing was said yet when the engine ended, so the status can still say it.
            assert waiting.result().status_code == 503 and "engine_restarting" in waiting.result().text
        answer = httpx.post(f"{server.url}/v1/completions", json=CHAMPION, timeout=60)
        if not client.ready:
            assert answer.status_code == 503 and answer.headers["retry-after"] == "2"
        server.run(client.wait_until_ready())
    assert client.pid != before and client.restarts == restarts + 1
    replica.check()
    assert httpx.post(f"{server.url}/v1/completions", json=CHAMPION, timeout=60).json()["choices"] == words
    assert f"altiplano_engine_restarts {client.restarts}.0" in httpx.get(f"{server.url}/metrics", timeout=60).text


def test_an_engine_that_cannot_start_any_more_fails_the_health_check(
    server: Server, replica: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def died(timeout_s: float) -> dict[str, float]:
        raise EngineDiedError("the engine is starting: try again in a moment")

    monkeypatch.setattr(server.generator.client, "stats", died)
    replica.check()
    monkeypatch.setattr(type(server.generator.client), "failure", "no space left")
    with pytest.raises(EngineDiedError):
        replica.check()


def test_long_texts_are_made_beside_the_event_loop(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, real = list[int](), server.generator.tokenizer

    def decode(ids: list[int], **more: Any) -> str:
        threads.append(threading.get_ident())
        return str(real.decode(ids, **more))

    async def loop_thread() -> int:
        return threading.get_ident()

    monkeypatch.setattr(server.generator, "tokenizer", SimpleNamespace(decode=decode))
    ids = real.encode("Zobalu asked for kites", add_special_tokens=False).ids
    answer = httpx.post(f"{server.url}/detokenize", json={"tokens": ids * 1000}, timeout=60).json()["prompt"]
    assert answer == real.decode(ids * 1000)
    assert threads and server.run(loop_thread()) not in threads


def test_an_engine_that_does_not_answer_says_so_to_who_waits(server: Server) -> None:
    with server.stopped(), pytest.raises(TimeoutError):
        server.run(server.generator.client.stats(0.1))
    assert server.run(server.generator.client.stats())["num_running"] == 0


def test_an_engine_that_understands_nothing_any_more_is_started_again(server: Server) -> None:
    """Its commands are read beside its steps: who reads no longer must not leave a process that waits forever."""
    client = server.generator.client

    async def garble() -> None:
        assert client._writer is not None
        client._writer.write(m.LENGTH.pack(3) + b"xyz")

    restarts = client.restarts
    server.run(garble())
    server.until(lambda: client.restarts > restarts)
    server.run(client.wait_until_ready())
    assert httpx.post(f"{server.url}/v1/completions", json=SHORT, timeout=60).status_code == 200


POISON = 13
BROKEN = f"""
from altiplano.engine.cpu.runner import CpuRunner
from altiplano.serve.engine_process import main

execute = CpuRunner.execute

def fail(self, plan):
    if any({POISON} in chunk.tokens for chunk in plan.chunks):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return execute(self, plan)

CpuRunner.execute = fail
main()
"""


def test_a_kernel_that_fails_ends_every_request_and_the_process_starts_again_clean(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine_client, "COMMAND", [sys.executable, "-c", BROKEN])
    client = engine_client.EngineClient(server.generator.client._settings)
    sampling = m.Sampling(max_tokens=400, temperature=0.0, ignore_eos=True)

    async def say(name: str, prompt: list[int], most: int) -> list[int | None]:
        params = msgspec.structs.replace(sampling, max_tokens=most)
        return [token.token_id async for token in client.generate(name, prompt, params)]

    async def story() -> None:
        await client.start()
        try:
            before = await say("before", [5, 6, 7], 8)
            assert client.pid is not None
            os.kill(client.pid, signal.SIGSTOP)  # the poison comes before any other answer has ended
            asked = [asyncio.create_task(say(f"other {i}", [5, 6, 8 + i], 400)) for i in range(3)]
            asked.append(asyncio.create_task(say("poison", [5, POISON], 8)))
            while len(client._streams) < len(asked):
                await asyncio.sleep(0)
            os.kill(client.pid, signal.SIGCONT)
            told = await asyncio.gather(*asked, return_exceptions=True)
            assert [type(error) for error in told] == [EngineDiedError] * 4
            await client.wait_until_ready()
            assert client.restarts == 1 and await say("after", [5, 6, 7], 8) == before
            stats = await client.stats()
            assert (stats["num_running"], stats["num_waiting"], stats["kv_cache_held"]) == (0, 0, 0)
        finally:
            await client.stop()

    server.run(story())
    assert "illegal memory access" in caplog.text


@pytest.mark.parametrize("hangs", ["before it connects", "while it loads"])
def test_an_engine_that_hangs_while_it_starts_again_is_given_up(
    server: Server, monkeypatch: pytest.MonkeyPatch, hangs: str
) -> None:
    """The replica then fails its health check, and Serve starts another one."""
    monkeypatch.setattr(engine_client, "START_TIMEOUT_S", 0.5)
    program = "import sys, socket\ns = socket.socket(socket.AF_UNIX)\n"
    program += "s.connect(sys.argv[-1])\n" if hangs == "while it loads" else ""
    program += "sys.stdin.read()\nimport signal\nsignal.pause()"
    client = engine_client.EngineClient(server.generator.client._settings)
    monkeypatch.setattr(engine_client, "COMMAND", [sys.executable, "-c", program])
    with pytest.raises(RuntimeError, match="within"):
        server.run(client.start())
    assert client.pid is not None and not psutil.pid_exists(client.pid)
