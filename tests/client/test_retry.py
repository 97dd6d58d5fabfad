"""Which failures a client survives, and how long it waits."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altiplano.client import Backoff, Endpoint, EndpointGoneError, RefusedError, Sender
from altiplano.client.retry import Reply, retry_after

from .conftest import CLOSE, Scripted, Seen, VirtualTime, with_sender

BODY = {"model": "cria", "messages": [{"role": "user", "content": "hello"}]}


def ask(sender: Sender) -> Any:
    return sender.post("chat/completions", BODY)


def first(*answers: tuple[int, dict[str, str]]) -> Callable[[Seen], tuple[int, dict[str, str]]]:
    """These answers, then success."""
    waiting = list(answers)
    return lambda seen: waiting.pop(0) if waiting else (200, {})


def test_failures_that_pass_are_asked_again_with_growing_waits(scripted: Scripted, time: VirtualTime) -> None:
    scripted.plan = first((500, {}), (503, {}), (CLOSE, {}), (429, {}))
    reply: Reply = with_sender(scripted.url, time, ask)
    assert reply.body["choices"][0]["message"]["content"] == "re: hello"
    assert reply.retries == 4 and reply.request_id == "served-1"
    assert time.naps == [0.5, 1.0, 2.0, 4.0]


def test_retry_after_is_honoured_and_is_no_failure(scripted: Scripted, time: VirtualTime) -> None:
    scripted.plan = first(*[(429, {"retry-after": "7"})] * 5)
    reply: Reply = with_sender(scripted.url, time, ask, Backoff(max_retries=1))
    assert reply.retries == 5
    assert all(7 <= nap <= 7.5 for nap in time.naps)


def test_one_that_is_told_to_wait_makes_all_wait(scripted: Scripted, time: VirtualTime) -> None:
    scripted.plan = first((429, {"retry-after": "30"}))
    asked_at: list[float] = []
    plan = scripted.plan

    def watched(seen: Seen) -> tuple[int, dict[str, str]]:
        asked_at.append(time.now)
        return plan(seen)

    scripted.plan = watched

    async def two(sender: Sender) -> None:
        sender._closed_until = 0.0
        await sender.post("chat/completions", BODY)
        sender._closed_until = time.now + 11
        await sender.post("chat/completions", BODY)

    with_sender(scripted.url, time, two)
    assert asked_at[1] - asked_at[0] >= 30
    assert asked_at[2] - asked_at[1] == 11


def test_a_wrong_request_is_asked_once_and_says_why(scripted: Scripted, time: VirtualTime) -> None:
    scripted.plan = first((400, {}))
    with pytest.raises(RefusedError, match="400: no: hello") as caught:
        with_sender(scripted.url, time, ask)
    assert caught.value.status == 400 and caught.value.code == "said_no"
    assert len(scripted.seen) == 1 and not time.naps


@pytest.mark.parametrize(
    ("answer", "backoff", "requests"),
    [
        ((503, {}), Backoff(max_retries=3), 4),
        ((429, {"retry-after": "100"}), Backoff(patience_s=250), 3),
        ((429, {"retry-after": "100"}), Backoff(longest_wait_s=50), 1),
        ((429, {"retry-after": "86400"}), Backoff(), 1),
    ],
)
def test_patience_ends(
    scripted: Scripted, time: VirtualTime, answer: tuple[int, dict[str, str]], backoff: Backoff, requests: int
) -> None:
    scripted.plan = lambda seen: answer
    with pytest.raises(EndpointGoneError, match=f"{answer[0]}: no: hello"):
        with_sender(scripted.url, time, ask, backoff)
    assert len(scripted.seen) == requests


def test_nobody_there_names_the_address_and_the_next_command(time: VirtualTime) -> None:
    with pytest.raises(EndpointGoneError, match=r"127\.0\.0\.1:9/v1.*altiplano run"):
        with_sender("http://127.0.0.1:9/v1", time, ask, Backoff(max_retries=2))
    assert len(time.naps) == 2


def test_the_key_travels(scripted: Scripted) -> None:
    assert Endpoint(scripted.url, "secret").open().headers["authorization"] == "Bearer secret"
    assert "authorization" not in Endpoint(scripted.url).open().headers


NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("3", 3.0),
        ("1.5", 1.5),
        ("-4", 0.0),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90.0),
        (format_datetime(NOW - timedelta(seconds=90), usegmt=True), 0.0),
        ("soon", None),
        ("", None),
    ],
)
def test_retry_after_is_a_number_or_a_date(value: str, seconds: float | None) -> None:
    assert retry_after(httpx.Headers({"retry-after": value}), NOW) == seconds


@settings(deadline=None)
@given(st.integers(0, 60), st.floats(0, 1, exclude_max=True))
def test_a_wait_stays_between_half_and_all_of_its_bound(attempt: int, draw: float) -> None:
    bound = min(30.0, 0.5 * 2**attempt)
    assert bound / 2 <= Backoff().delay(attempt, draw) <= bound
