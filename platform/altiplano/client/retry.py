"""Asking again: which failures pass, how long to wait, and how everybody waits when the endpoint says so."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from altiplano.client.endpoint import Endpoint
from altiplano.client.errors import EndpointGoneError, RefusedError, refused

# 500 is among them because HAProxy, in front of Ray Serve, answers 500 while no replica is ready.
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Backoff:
    """Exponential waits with jitter: between half and all of base_s · 2^attempt, at most cap_s."""

    max_retries: int = 8
    """Failures of one request before it is given up. A 429 that says when to come back is no failure."""
    base_s: float = 0.5
    cap_s: float = 30.0
    longest_wait_s: float = 600.0
    """The longest Retry-After that is honoured."""
    patience_s: float = 3600.0
    """How long one request waits in all. Many requests behind one quota take long turns."""

    def delay(self, attempt: int, draw: float) -> float:
        """Seconds before retry number `attempt` (from 0); `draw` is uniform in [0, 1)."""
        return min(self.cap_s, self.base_s * 2.0**attempt) * (0.5 + 0.5 * draw)


# For a person who waits at a terminal.
IMPATIENT = Backoff(max_retries=3, patience_s=30.0)


def retry_after(headers: httpx.Headers, now: datetime) -> float | None:
    """Seconds that the endpoint asks to wait (RFC 9110, section 10.2.3: a number or a date), None where it does not say."""
    value = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    # A date without a zone is in GMT.
    return max(0.0, ((date if date.tzinfo else date.replace(tzinfo=UTC)) - now).total_seconds())


@dataclass(frozen=True)
class Reply:
    """A JSON answer and the id under which the endpoint's logs know it."""

    status: int
    request_id: str | None
    body: dict[str, Any]
    retries: int


@dataclass
class Sender:
    """Posts requests and asks again while failures can pass. Shared by all requests of one client.

    When one request is told to wait, all wait: the others would only be refused as well.
    """

    endpoint: Endpoint
    client: httpx.AsyncClient
    backoff: Backoff = field(default_factory=Backoff)
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    clock: Callable[[], float] = time.monotonic
    draw: Callable[[], float] = random.random
    retries: int = 0
    _closed_until: float = 0.0

    async def post(self, path: str, body: dict[str, Any]) -> Reply:
        """The answer to one request that is not streamed.

        Raises:
            RefusedError: the request itself is wrong.
            EndpointGoneError: it failed after all retries for a reason that can pass.
        """
        response, retries = await self._ask(lambda: self.client.post(path, json=body))
        return _reply(response, retries)

    @asynccontextmanager
    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[httpx.Response]:
        """A streamed answer, unread. Asked again only until its first byte. Raises what `post` raises."""
        request = self.client.build_request("POST", path, json=body)
        response, _ = await self._ask(lambda: self._open(request))
        try:
            if response.is_error:
                raise refused(response)
            yield response
        finally:
            await response.aclose()

    async def _open(self, request: httpx.Request) -> httpx.Response:
        response = await self.client.send(request, stream=True)
        if response.is_error:
            await response.aread()
        return response

    async def _ask(self, send: Callable[[], Awaitable[httpx.Response]]) -> tuple[httpx.Response, int]:
        """The first response that is final, and how many came before it."""
        failures, retries, waited = 0, 0, 0.0
        while True:
            while (closed := self._closed_until - self.clock()) > 0:
                await self.sleep(closed)
            try:
                response = await send()
            except httpx.TransportError as error:
                failures, wait = failures + 1, self.backoff.delay(failures, self.draw())
                if self._spent(failures, waited + wait):
                    raise self.endpoint.gone(error) from error
            else:
                if response.status_code not in PASSING:
                    return response, retries
                asked = retry_after(response.headers, datetime.now(UTC))
                failures += response.status_code != 429 or asked is None
                # Jitter on top of what is asked, so that the crowd does not come back in one instant.
                jitter = self.backoff.delay(max(0, failures - 1), self.draw())
                wait = jitter if asked is None else asked + min(jitter, self.backoff.base_s)
                if wait > self.backoff.longest_wait_s or self._spent(failures, waited + wait):
                    raise _given_up(response, retries, wait)
                if asked is not None:
                    self._closed_until = max(self._closed_until, self.clock() + asked)
            retries, waited = retries + 1, waited + wait
            self.retries += 1
            await self.sleep(wait)

    def _spent(self, failures: int, waited: float) -> bool:
        return failures > self.backoff.max_retries or waited > self.backoff.patience_s


def _reply(response: httpx.Response, retries: int) -> Reply:
    if response.is_error:
        raise refused(response)
    request_id = response.headers.get("x-request-id")
    try:
        body = response.json()
    except ValueError as error:
        raise RefusedError(f"{response.url} answered with something that is no JSON", response.status_code) from error
    if not isinstance(body, dict):
        raise RefusedError(f"{response.url} answered with JSON that is no object", response.status_code)
    return Reply(response.status_code, request_id, body, retries)


def _given_up(response: httpx.Response, retries: int, wait: float) -> EndpointGoneError:
    return EndpointGoneError(
        f"{refused(response)} (given up after {retries} retries; the next one would come in {wait:.0f} s)", response.status_code
    )
