"""How much one client may ask for: token buckets, the bounded queue, and the shape of a body. Time comes from outside."""

import math
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

from altiplano import spec
from altiplano.serve.errors import ApiError
from altiplano.serve.keys import Key

ANONYMOUS = "anonymous"
MAX_RETRY_AFTER_S = 60
MAX_TOLD = 4096  # of one key


class TokenBucket:
    """`per_minute` units a minute, at most one minute's worth saved. Times in seconds of any monotonic clock.

    The level may fall below zero: an answer's length is known only when it ends, so its tokens are charged as they come and the
    debt is paid before the next request. Over any time t at most `per_minute * (1 + t / 60)` units are admitted, plus what the
    requests that were running add (so at most `max_concurrency` answers).
    """

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._rate = per_minute / 60
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        """Units that are there; negative when in debt."""
        self._level = min(float(self.per_minute), self._level + max(0.0, now - self._at) * self._rate)
        self._at = max(self._at, now)
        return self._level

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` units are there; 0 when they are. An amount above a minute's worth waits for a full bucket."""
        missing = min(amount, float(self.per_minute)) - self.level(now)
        return max(0.0, missing / self._rate)

    def take(self, amount: float) -> None:
        """Charge; what is missing becomes debt."""
        self._level -= amount


@dataclass
class Quota:
    """What one key has left. Limits of None are not counted."""

    key_id: str
    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None
    max_concurrency: int | None = None
    running: int = 0

    @classmethod
    def of(cls, key: Key | None, limits: spec.ServeLimits, now: float) -> "Quota":
        """A key's own limits, else the endpoint's defaults."""

        def bucket(own: int | None, default: int | None) -> TokenBucket | None:
            per_minute = own if own is not None else default
            return None if per_minute is None else TokenBucket(per_minute, now)

        return cls(
            key.id if key else ANONYMOUS,
            bucket(key.requests_per_minute if key else None, limits.requests_per_minute),
            bucket(key.tokens_per_minute if key else None, limits.tokens_per_minute),
            key.max_concurrency if key and key.max_concurrency is not None else limits.max_concurrency,
        )

    def enter(self, now: float) -> None:
        """Start one request.

        Raises:
            ApiError: 429, with the seconds after which it would be taken.
        """
        if self.max_concurrency is not None and self.running >= self.max_concurrency:
            raise _too_many(f"this key already has {self.running} requests running, the most it may have", 1.0)
        if self.requests is not None:
            wait = self.requests.wait(1, now)
            if wait > 0:
                raise _too_many(f"this key may send {self.requests.per_minute} requests a minute", wait)
        if self.tokens is not None and self.tokens.level(now) <= 0:
            raise _too_many(f"this key may use {self.tokens.per_minute} tokens a minute", self.tokens.wait(1, now))
        if self.requests is not None:
            self.requests.take(1)
        self.running += 1

    def leave(self) -> None:
        self.running -= 1

    def charge_prompt(self, tokens: int, now: float) -> None:
        """Charge a prompt before it is computed.

        Raises:
            ApiError: 429 when it has to wait; 400 when it can never fit.
        """
        if self.tokens is None:
            return
        if tokens > self.tokens.per_minute:
            raise ApiError(
                400,
                f"the prompt has {tokens} tokens and this key may use {self.tokens.per_minute} a minute: shorten it",
                code="request_too_large",
            )
        wait = self.tokens.wait(tokens, now)
        if wait > 0:
            raise _too_many(f"this key may use {self.tokens.per_minute} tokens a minute, and the prompt has {tokens}", wait)
        self.tokens.take(tokens)

    def headers(self, now: float) -> dict[str, str]:
        """OpenAI's x-ratelimit headers for the limits that exist."""
        found = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                left = bucket.level(now)
                found[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(left)))
                found[f"x-ratelimit-reset-{name}"] = f"{bucket.wait(bucket.per_minute, now):.1f}s"
        return found


class Queue:
    """Answers in this front end: `running` that the engine computes together, and `waiting` more, so that a wait stays bounded.

    A key may take waiting places only up to its share: all places divided by the keys that asked within the last minute. So one
    busy client cannot keep the others out, alone it may use everything, and the engine never idles for fairness.

    Who is refused is told to come back when its turn will be, behind those of its key who were told so before: under ten times the
    load clients return as fast as answers end, and not all at once.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self.running, self.limit = running, running + waiting
        self.size = 0
        self._held: Counter[str] = Counter()
        self._asked: dict[str, float] = {}
        self._ends: deque[float] = deque(maxlen=64)
        self._told: defaultdict[str, deque[float]] = defaultdict(
            lambda: deque(maxlen=MAX_TOLD)
        )  # when those who were refused come back

    def enter(self, answers: int, now: float, key_id: str = ANONYMOUS, held: int = 0) -> None:
        """Take places for `answers`, of which `held` are taken already.

        Raises:
            ApiError: 429, with an estimate of when there is room, from how fast answers ended lately; 400 when there never is.
        """
        if answers > self.limit:
            raise ApiError(400, f"the request asks for {answers} answers, and the endpoint holds {self.limit}: ask for fewer")
        self._asked[key_id] = now
        more = max(0, answers - held)
        full = self.size + more > self.limit
        if full or (self.size + more > self.running and self._held[key_id] + more > self._share(now)):
            whose = f"{self.size} answers run or wait" if full else f"this key has its share, {self._held[key_id]} answers"
            wait = self.retry_after(more, now, key_id)
            self._told[key_id].append(now + wait)
            raise _too_many(f"the endpoint is busy ({whose})", wait, code="overloaded")
        self.size += more
        self._held[key_id] += more

    def leave(self, answers: int, now: float, key_id: str = ANONYMOUS, *, computed: bool = True) -> None:
        """Give places back. What was refused before the engine saw it says nothing about how fast answers end."""
        self.size -= answers
        self._held[key_id] -= answers
        if computed:
            self._ends.extend([now] * answers)

    def retry_after(self, answers: int, now: float, key_id: str = ANONYMOUS) -> float:
        """Seconds until `answers` places are likely free for this key, from 1 to MAX_RETRY_AFTER_S: 1 when nothing is known."""
        if len(self._ends) < 2:
            return 1.0
        rate = len(self._ends) / max(now - self._ends[0], 1e-3) / max(1, len(self._asked))
        told = self._told[key_id]
        while told and told[0] <= now:
            told.popleft()
        return min(MAX_RETRY_AFTER_S, max(1.0, (len(told) + max(1, self.size + answers - self.limit)) / rate))

    def _share(self, now: float) -> float:
        self._asked = {key_id: at for key_id, at in self._asked.items() if now - at < 60 or self._held[key_id]}
        return self.limit / max(1, len(self._asked))


@dataclass
class Quotas:
    """The quota of every key that was seen; a key whose limits changed starts anew."""

    limits: spec.ServeLimits
    _by_key: dict[str, tuple[Key | None, Quota]] = field(default_factory=dict)

    def of(self, key: Key | None, now: float) -> Quota:
        name = key.id if key else ANONYMOUS
        known = self._by_key.get(name)
        if known is None or known[0] != key:
            made = Quota.of(key, self.limits, now)
            # Requests that still run under the old record keep their own count; they end soon.
            self._by_key[name] = known = (key, made)
        return known[1]


def check_values(body: Any, limits: spec.ServeLimits) -> None:
    """A parsed body is neither too deep nor made of too many parts.

    Raises:
        ApiError: 400.
    """
    if not _fits(body, limits.max_json_depth, limits.max_json_values):
        raise ApiError(
            400,
            f"the body may be nested {limits.max_json_depth} levels deep and hold {limits.max_json_values} values: send less at once",
        )


def check_schema(schema: Any, limits: spec.ServeLimits, param: str = "response_format") -> None:
    """A JSON schema is small enough to become a grammar.

    Raises:
        ApiError: 400.
    """
    if not _fits(schema, limits.max_schema_depth, limits.max_schema_values):
        raise ApiError(
            400,
            f"a schema may be nested {limits.max_schema_depth} levels deep and hold {limits.max_schema_values} values: simplify it",
            param=param,
        )


def _fits(value: Any, max_depth: int, max_values: int) -> bool:
    # Level by level: recursion would end at Python's own limit, with its own error.
    containers: list[Any]
    containers, depth, values = [[value]], 0, 0
    while containers:
        parts = [part for container in containers for part in (container.values() if isinstance(container, dict) else container)]
        depth += bool(parts)
        values += len(parts)
        if depth > max_depth or values > max_values:
            return False
        containers = [part for part in parts if isinstance(part, dict | list)]
    return True


def _too_many(what: str, wait_s: float, code: str = "rate_limit_exceeded") -> ApiError:
    seconds = min(MAX_RETRY_AFTER_S, max(1, math.ceil(wait_s)))
    return ApiError(429, f"{what}: try again in {seconds} s", code=code, retry_after=seconds)
