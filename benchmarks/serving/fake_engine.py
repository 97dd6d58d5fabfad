"""An engine that costs nothing: it speaks the real engine's messages and answers every request with the same words.

    python benchmarks/serving/fake_engine.py --step-s 0.02 SOCKET   # settings as JSON on standard input, as the real one

One step gives one token to every request and takes `--step-s` seconds; 0 is as fast as the front end reads.
"""

import argparse
import contextlib
import itertools
import json
import select
import socket
import sys
import time
from pathlib import Path

from tokenizers import Tokenizer

from altiplano.serve import messages as m

WORDS = "The pie is for Priya, who asked for three of them at the end of the street on a Friday."


class Requests:
    """What is being answered: tokens that each request still gets."""

    def __init__(self, words: list[int]) -> None:
        self._words = itertools.cycle(words)
        self._left: dict[str, int] = {}

    def take(self, command: m.Command) -> m.Report | None:
        """Handle a command; returns what has to be answered at once."""
        if isinstance(command, m.Add):
            self._left[command.request_id] = command.sampling.max_tokens
        elif isinstance(command, m.Abort):
            self._left.pop(command.request_id, None)
        elif isinstance(command, m.AskStats):
            return m.Done(command.call, stats={"num_running": float(len(self._left))})
        else:
            return m.Done(command.call)
        return None

    def step(self) -> m.Step:
        """One token for each."""
        word, tokens = next(self._words), []
        for name, left in self._left.items():
            tokens.append(m.Token(name, word, "length" if left == 1 else None))
            self._left[name] = left - 1
        self._left = {name: left for name, left in self._left.items() if left}
        return m.Step(tokens)

    def __bool__(self) -> bool:
        return bool(self._left)


class Commands:
    """Whole commands out of the bytes that have come."""

    def __init__(self) -> None:
        self._data = b""

    def push(self, data: bytes) -> list[m.Command]:
        self._data += data
        found = []
        while len(self._data) >= 4 and len(self._data) >= 4 + (length := int.from_bytes(self._data[:4], "little")):
            found.append(m.decode_command(self._data[4 : 4 + length]))
            self._data = self._data[4 + length :]
        return found


def run(connection: socket.socket, requests: Requests, vocab_size: int, step_s: float) -> None:
    """Answer until the front end hangs up."""
    connection.sendall(m.frame(m.Ready(vocab_size, (0,))))
    commands, due = Commands(), time.perf_counter()
    while True:
        now = time.perf_counter()
        wait = max(0.0, due - now) if requests else None
        if select.select([connection], [], [], wait)[0]:
            data = connection.recv(1 << 16)
            if not data:
                return
            idle = not requests
            for command in commands.push(data):
                answer = requests.take(command)
                if answer is not None:
                    connection.sendall(m.frame(answer))
            if idle:
                due = time.perf_counter() + step_s
        if requests and time.perf_counter() >= due:
            connection.sendall(m.frame(requests.step()))
            due = max(due + step_s, time.perf_counter() - step_s)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--step-s", type=float, required=True)
    options.add_argument("socket")
    args = options.parse_args()
    model = Path(json.load(sys.stdin)["model"])
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    requests = Requests(tokenizer.encode(WORDS, add_special_tokens=False).ids)
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.connect(args.socket)
        run(connection, requests, tokenizer.get_vocab_size(), args.step_s)


if __name__ == "__main__":
    main()
