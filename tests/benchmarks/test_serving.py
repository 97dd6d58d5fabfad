"""The clients and the fake engine of the serving benchmarks: what they count is what was sent."""

import importlib.util
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks/serving"
TOKENS, STREAMS = 40, 8


@pytest.fixture(scope="module")
def load() -> Any:
    found = importlib.util.spec_from_file_location("load", FOLDER / "load.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["load"] = module
    found.loader.exec_module(module)
    return module


@pytest.fixture(params=[["endpoint", "--step-s", "0"], ["bare", "--step-s", "0"]], ids=["endpoint", "bare"])
def front_end(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    command = [sys.executable, str(FOLDER / "front_end.py"), *request.param]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        yield request.param[0], int(process.stdout.readline())
        process.stdin.close()
        assert process.wait(60) == 0


def test_every_token_is_an_event_that_the_clients_count(front_end: tuple[str, int], load: Any) -> None:
    kind, port = front_end
    body = {"model": "cria", "prompt": [5, 6, 7], "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    done = load.run(port, "/v1/completions", body | {"stream_options": {"include_usage": True}}, STREAMS)
    # The bare application knows no usage; the endpoint says it in one more event.
    usage = kind == "endpoint"
    assert done["events"] == STREAMS * (TOKENS + usage)
    assert done["tokens"] == STREAMS * TOKENS * usage
    assert len(done["ttft_s"]) == STREAMS and all(0 < first <= done["seconds"] for first in done["ttft_s"])


def test_events_are_counted_wherever_the_bytes_are_divided(load: Any) -> None:
    events = [{"text": "a"}, {"text": "b"}, {"choices": [], "usage": {"completion_tokens": 2}}]
    sent = b"HTTP/1.1 200 OK\r\n\r\n" + b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    sent += b"data: [DONE]\n\n"
    for size in range(1, len(sent) + 1):
        stream = load.Stream(socket.socket())
        ended = [stream.take(sent[at : at + size], 1.0) for at in range(0, len(sent), size)]
        stream.socket.close()
        assert (stream.events - 1, stream.tokens(), stream.first, stream.size) == (3, 2, 1.0, len(sent))
        assert ended[-1] and not any(ended[: (len(sent) - len(b"]\n\n")) // size])


def test_an_answer_that_breaks_off_is_no_result(load: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def refuse() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 429 Too Many Requests\r\n\r\n")

        server = threading.Thread(target=refuse)
        server.start()
        with pytest.raises(RuntimeError, match="429 Too Many Requests"):
            load.run(listening.getsockname()[1], "/", {}, 1)
        server.join()
