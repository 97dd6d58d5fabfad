"""Slow clients, clients that leave, and bodies that never end: the engine works for those who are there."""

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from altiplano.serve import messages as m
from altiplano.serve.metrics import Labels

from .conftest import Server
from .test_gate import LONG, SHORT, Guarded

STREAM = LONG | {"stream": True}
WHOLE = LONG


@pytest.fixture(scope="module")
def guarded(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    made = Guarded(adapter, tmp_path_factory.mktemp("keys"))
    yield made
    made.close()


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def head(guarded: Guarded, length: int | None) -> bytes:
    size = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    return (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {guarded.user}\r\n"
        f"content-type: application/json\r\n{size}\r\n\r\n"
    ).encode()


def answer(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and body of the one answer on a connection."""
    response = connection.makefile("rb")
    status = int(response.readline().split()[1])
    length = 0
    while (line := response.readline().strip().lower()) != b"":
        if line.startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return status, json.loads(response.read(length))


def test_bodies_are_bounded_however_they_are_sent(guarded: Guarded) -> None:
    with guarded.http(guarded.user) as http:
        declared = http.post("/v1/completions", content=b"x" * (65 << 10))
    assert declared.status_code == 413 and declared.json()["error"]["message"]
    with connect(guarded) as connection:
        connection.sendall(head(guarded, None))
        piece = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
        connection.sendall(piece * 5)  # and no end
        status, body = answer(connection)
    assert status == 413 and "65536" in body["error"]["message"]


@pytest.mark.parametrize("length", ["-1", "1e3", "99999999999999999999"])
def test_nonsense_lengths_are_refused(guarded: Guarded, length: str) -> None:
    with connect(guarded) as connection:
        connection.sendall(head(guarded, 1).replace(b"content-length: 1\r", f"content-length: {length}\r".encode()))
        assert connection.recv(100).split()[1] in (b"400", b"413")


def test_a_body_that_does_not_come_is_not_waited_for(guarded: Guarded) -> None:
    with guarded.patience(body_timeout_s=0.3), connect(guarded) as connection:
        connection.sendall(head(guarded, 100) + b'{"model"')
        status, body = answer(connection)
    assert status == 408 and "0.3 s" in body["error"]["message"]
    guarded.idle()
    assert guarded.governance.queue.size == 0


def test_a_client_that_leaves_before_its_body_is_complete_is_forgotten(guarded: Guarded) -> None:
    with connect(guarded) as connection:
        connection.sendall(head(guarded, 100) + b'{"model"')
        guarded.until(lambda: guarded.governance.queue.size == 1)
    guarded.idle()
    assert guarded.busy() == 0


@pytest.mark.parametrize("body", [STREAM, WHOLE], ids=["stream", "whole"])
def test_clients_that_leave_free_their_pages_at_once(guarded: Guarded, body: dict[str, Any]) -> None:
    def generated() -> float:
        account = guarded.governance.ledger.account(Labels("cria", "base", guarded.user.split("-")[1]))
        return account.generation_tokens

    before = generated()
    encoded = json.dumps(body).encode()
    with guarded.unending():
        connections = [connect(guarded) for _ in range(16)]
        for connection in connections:
            connection.sendall(head(guarded, len(encoded)) + encoded)

        guarded.until(lambda: len(guarded.generator.client._streams) == 16 and generated() >= before + 16)
        for connection in connections:
            connection.close()
        guarded.idle()
    assert guarded.busy() == 0
    assert generated() - before < 16 * 400  # nobody's answer was computed to its end
    used = guarded.run(guarded.generator.client.stats())
    assert used["kv_cache_held"] == 0


def test_what_a_slow_reader_has_not_taken_is_counted_when_it_comes(guarded: Guarded) -> None:
    class Count:
        waits, tokens = 0, 0

        def waited(self, seconds: float) -> None:
            assert self.tokens == 0 and seconds >= 0
            self.waits += 1

        def saw(self, token: m.Token) -> None:
            self.tokens += token.token_id is not None

    count = Count()
    stream = guarded.generator.client.generate("slow", [5, 6, 7], m.Sampling(max_tokens=50, ignore_eos=True), watch=count)

    async def take_one() -> None:
        await anext(stream)

    guarded.run(take_one())
    guarded.until(lambda: count.tokens == 50)
    assert count.waits == 1
    guarded.run(stream.aclose())


def test_many_clients_come_and_go_and_the_endpoint_still_answers(guarded: Guarded) -> None:
    async def come_and_go() -> None:
        headers = {"authorization": f"Bearer {guarded.user}"}
        async with httpx.AsyncClient(base_url=guarded.url, timeout=60, headers=headers) as http:

            async def visit(turn: int) -> int:
                async with http.stream("POST", "/v1/completions", json=STREAM | {"seed": turn}) as stream:
                    if stream.status_code == 200:
                        async for _ in stream.aiter_bytes():
                            break
                    return stream.status_code

            for _ in range(8):
                statuses = await asyncio.gather(*(visit(turn) for turn in range(16)))
                assert set(statuses) <= {200, 429}

    asyncio.run(come_and_go())
    guarded.idle()
    assert guarded.busy() == 0 and not guarded.generator.client._streams
    with guarded.http(guarded.user) as http:
        assert http.post("/v1/completions", json=SHORT).status_code == 200


def test_a_client_that_stops_reading_is_cut_off_and_slows_nobody_down(guarded: Guarded) -> None:
    # Small buffers between us, and log-probabilities for an answer that is larger than they are together.
    guarded._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    body = json.dumps(STREAM | {"logprobs": 20}).encode()
    gone = guarded.governance.metrics.clients_gone.labels("stalled")
    before = gone._value.get()
    with guarded.patience(stalled_client_timeout_s=0.5), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        host, port = guarded.url.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        connection.sendall(head(guarded, len(body)) + body)
        with guarded.http(guarded.user) as http:
            assert http.post("/v1/completions", json=SHORT).status_code == 200
        guarded.idle()
        received = b""
        while piece := connection.recv(1 << 16):
            received += piece
        assert b"[DONE]" not in received  # and nobody takes the answer for complete
    assert gone._value.get() == before + 1
    assert guarded.busy() == 0
