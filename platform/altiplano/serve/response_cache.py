"""Answers to identical greedy requests, kept as the bytes that were sent. An option: off unless it is given memory.

An answer belongs to one key and one set of weights, so that nobody learns from timing what another key has asked, and a moved
alias or a replaced adapter is never answered with old words.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

# Who asks, and how the answer travels on our side, do not change what is said.
_NOT_SAID = frozenset({"user", "metadata", "store", "safety_identifier"})
_FAILED = b'data: {"error"'


@dataclass(frozen=True)
class Stored:
    """One complete answer with status 200."""

    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    @property
    def size(self) -> int:
        return len(self.body) + sum(len(name) + len(value) for name, value in self.headers)


class ResponseCache:
    """The least recently used answers, at most `max_bytes` of them."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size = 0
        self._stored: OrderedDict[bytes, Stored] = OrderedDict()

    def get(self, digest: bytes) -> Stored | None:
        found = self._stored.get(digest)
        if found is not None:
            self._stored.move_to_end(digest)
        return found

    def put(self, digest: bytes, answer: Stored) -> None:
        """Keep an answer; one that failed on the way, or is larger than an eighth of the memory, is not kept."""
        if answer.size > self.max_bytes // 8 or _FAILED in answer.body:
            return
        before = self._stored.pop(digest, None)
        self.size += answer.size - (before.size if before else 0)
        self._stored[digest] = answer
        while self.size > self.max_bytes:
            _, dropped = self._stored.popitem(last=False)
            self.size -= dropped.size


def digest_of(path: str, body: Any, weights: str, key_id: str) -> bytes | None:
    """What makes two requests identical; None when the answer is drawn at random, so that each one has to be computed.

    `body` is the parsed JSON; `weights` names the adapter and its files.
    """
    if not isinstance(body, dict) or body.get("temperature") != 0:
        return None
    said = {name: value for name, value in body.items() if name not in _NOT_SAID}
    text = msgspec.json.encode([path, weights, key_id, said], order="deterministic")
    return hashlib.sha256(text).digest()
