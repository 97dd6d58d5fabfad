"""The real engine's process without a front end: its messages over a socket, nothing else.

Used by overhead.py. Lives as long as its standard input; one line of JSON per measurement on standard output.
"""

import json
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from front_end import AS_RAY

from altiplano.serve import messages as m
from altiplano.serve.engine_client import COMMAND, engine_settings
from altiplano.serve.settings import ServeSettings


class BareEngine:
    """An engine process with its model loaded."""

    def __init__(self, settings: ServeSettings) -> None:
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listening:
            path = str(Path(folder) / "socket")
            listening.bind(path)
            listening.listen(1)
            self._process = subprocess.Popen([*AS_RAY, *COMMAND, path], stdin=subprocess.PIPE)
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(engine_settings(settings)).encode())
            self._process.stdin.close()
            self._connection, _ = listening.accept()
        self._reader = self._connection.makefile("rb")
        ready = self._read()
        if not isinstance(ready, m.Ready):
            raise RuntimeError(f"the engine did not start: {ready}")

    def run(self, prompt: list[int], max_tokens: int, streams: int) -> dict[str, Any]:
        """Answers to `streams` requests at once: {"seconds", "tokens", "ttft_s"}."""
        sampling = m.Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        started = time.perf_counter()
        for index in range(streams):
            self._connection.sendall(m.frame(m.Add(f"req-{index}", prompt, sampling)))
        tokens, first, running = 0, dict[str, float](), streams
        while running:
            step = self._read()
            assert isinstance(step, m.Step), step
            now = time.perf_counter()
            for token in step.tokens:
                tokens += token.token_id is not None
                first.setdefault(token.request_id, now - started)
                running -= token.finish_reason is not None
        return {"seconds": time.perf_counter() - started, "tokens": tokens, "ttft_s": list(first.values())}

    def _read(self) -> m.Report:
        (length,) = m.LENGTH.unpack(self._reader.read(m.LENGTH.size))
        report: m.Report = m.decode_report(self._reader.read(length))
        return report

    def close(self) -> None:
        self._reader.close()
        self._connection.close()
        self._process.wait(30)
