"""Clients that cost nothing: raw sockets in one process, which count events and never parse them.

    echo '{"port": 8000, "path": "/v1/completions", "body": {…}, "streams": 64}' | python benchmarks/serving/load.py

Every stream is one POST on a connection of its own; all are sent at once. Prints {"seconds", "ttft_s", "events", "bytes", "tokens"}:
wall time from the first byte sent to the last stream's end, seconds to the first event of each stream, all events but `[DONE]`, bytes
received, and the completion tokens of the servers' own `usage` (0 where there is none).
"""

import json
import re
import select
import socket
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

EVENT, END = b"data: ", b"data: [DONE]"
USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
PATIENCE_S = 120.0


@dataclass
class Stream:
    """One answer as it comes in."""

    socket: socket.socket
    sent: float = 0.0
    first: float | None = None
    events: int = 0
    size: int = 0
    tail: bytes = b""

    def take(self, data: bytes, now: float) -> bool:
        """Count what has come; True at the end of the answer."""
        self.size += len(data)
        # An event's beginning may be divided between two pieces.
        seen = self.tail[-len(EVENT) + 1 :] + data
        self.events += seen.count(EVENT)
        if self.events and self.first is None:
            self.first = now - self.sent
        self.tail = (self.tail + data)[-1024:] if len(data) < 1024 else data[-1024:]
        return END in self.tail

    def tokens(self) -> int:
        """What the server says that it has generated."""
        found = USAGE.findall(self.tail)
        return int(found[-1]) if found else 0


def post(host: str, path: str, body: Any) -> bytes:
    """A whole HTTP/1.1 request."""
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
    return head.encode() + text


def run(port: int, path: str, body: Any, streams: int) -> dict[str, Any]:
    """Send `streams` requests at once and read all answers.

    Raises:
        RuntimeError: an answer was refused, broke off or did not end.
    """
    request = post(f"127.0.0.1:{port}", path, body)
    with ExitStack() as opened:
        poll, by_fd = opened.enter_context(select.epoll()), dict[int, Stream]()
        for _ in range(streams):
            client = opened.enter_context(socket.create_connection(("127.0.0.1", port)))
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            poll.register(client, select.EPOLLIN)
            by_fd[client.fileno()] = Stream(client)
        started = time.perf_counter()
        for stream in by_fd.values():
            stream.sent = time.perf_counter()
            stream.socket.sendall(request)
        _read(poll, by_fd)
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "ttft_s": [stream.first for stream in by_fd.values()],
        "events": sum(stream.events - 1 for stream in by_fd.values()),
        "bytes": sum(stream.size for stream in by_fd.values()),
        "tokens": sum(stream.tokens() for stream in by_fd.values()),
    }


def _read(poll: select.epoll, by_fd: dict[int, Stream]) -> None:
    """Until all answers have ended."""
    running = len(by_fd)
    while running:
        ready = poll.poll(PATIENCE_S)
        if not ready:
            raise RuntimeError(f"{running} of {len(by_fd)} answers did not end")
        for fd, _ in ready:
            stream = by_fd[fd]
            data = stream.socket.recv(1 << 18)
            if not data:
                raise RuntimeError(f"an answer broke off: {stream.tail!r}")
            if stream.take(data, time.perf_counter()):
                poll.unregister(fd)
                running -= 1


if __name__ == "__main__":
    print(json.dumps(run(**json.load(sys.stdin))))
