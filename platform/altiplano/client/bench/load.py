"""Sending the load: every request leaves at its own time, whatever the others do."""

import asyncio
import json
import resource
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any

import httpx

from altiplano.client.bench.quantiles import percentile
from altiplano.client.errors import refused
from altiplano.client.sse import DONE, EventParser

PROBE_S = 0.01


@dataclass
class Record:
    """One request. Times in seconds from the start of the load.

    scheduled ≤ released (this program woke up) ≤ started (a place under --max-concurrency was free, the request left) ≤ pieces.
    """

    model: str
    scheduled: float
    released: float = 0.0
    started: float = 0.0
    pieces: list[float] = field(default_factory=list)
    """Arrivals of chunks with text. The role-only first chunk of a chat is no token."""
    ended: float = 0.0
    """Arrival of the last chunk that belongs to an answer; usage comes later and does not count."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    has_usage: bool = False
    text: str = ""
    error: str | None = None

    @property
    def first(self) -> float:
        """Arrival of the first text; of the end, for an answer without text."""
        return self.pieces[0] if self.pieces else self.ended


@dataclass(frozen=True)
class Run:
    """One load, and how the client itself fared: of its busiest process, the processor time over the wall's (1 is a whole core),
    and the 99th percentile of how late its event loop woke up, in seconds: so late it may have seen a token."""

    records: list[Record]
    cpu_share: float
    loop_lag: float


async def run_load(
    client: httpx.AsyncClient,
    path: str,
    bodies: Sequence[dict[str, Any]],
    schedule: Sequence[float],
    max_concurrency: int | None = None,
    on_end: Callable[[Record], None] = lambda record: None,
    zero: float | None = None,
) -> Run:
    """Send body i at schedule[i] seconds and follow its stream to the end; one record per body, in order. Never raises for a
    request that fails: that is a record with an error. `zero` is the start on perf_counter's clock; None: now."""
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()
    zero = perf_counter() if zero is None else zero

    async def one(body: dict[str, Any], due: float) -> Record:
        record = Record(str(body["model"]), scheduled=due, released=perf_counter() - zero)
        async with gate:
            await _follow(client, path, body, record, zero)
        on_end(record)
        return record

    await _until(zero)
    began, cpu, running, lags = perf_counter(), process_time(), [], list[float]()
    probe = asyncio.create_task(_probe(lags))
    for body, due in zip(bodies, schedule, strict=True):
        await _until(zero + due)
        running.append(asyncio.create_task(one(body, due)))
    records = list(await asyncio.gather(*running))
    probe.cancel()
    return Run(records, (process_time() - cpu) / (perf_counter() - began), percentile(sorted(lags), 99) if lags else 0.0)


async def _probe(lags: list[float]) -> None:
    while True:
        due = perf_counter() + PROBE_S
        await asyncio.sleep(PROBE_S)
        lags.append(perf_counter() - due)


async def _until(time: float) -> None:
    while (early := time - perf_counter()) > 0:
        await asyncio.sleep(early)


def raise_file_limit() -> None:
    """One connection is one open file: allow as many as the system does."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _follow(client: httpx.AsyncClient, path: str, body: dict[str, Any], record: Record, zero: float) -> None:
    record.started = perf_counter() - zero
    try:
        async with client.stream("POST", path, json=body) as response:
            if response.is_error:
                await response.aread()
                record.error = str(refused(response))
            elif not await _read(response, record, zero):
                record.error = "the stream broke off before the answer's end"
    except (httpx.HTTPError, ValueError, KeyError) as error:
        record.error = f"{type(error).__name__}: {error}"
    if record.error is not None:
        record.ended = perf_counter() - zero


async def _read(response: httpx.Response, record: Record, zero: float) -> bool:
    """Note every chunk; False when the stream ends before its time, or carries an error."""
    parser, texts = EventParser(), list[str]()
    async for data in response.aiter_bytes():
        now = perf_counter() - zero
        for event in parser.push(data):
            if event == DONE:
                record.text = "".join(texts)
                if not record.has_usage:
                    record.output_tokens = len(record.pieces)
                return record.ended > 0
            chunk = json.loads(event)
            if "error" in chunk:
                raise ValueError(chunk["error"].get("message", chunk["error"]))
            if usage := chunk.get("usage"):
                record.has_usage = True
                record.prompt_tokens, record.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            for choice in chunk["choices"]:
                text = choice["delta"].get("content") if "delta" in choice else choice["text"]
                if text:
                    record.pieces.append(now)
                    texts.append(text)
                if text or choice.get("finish_reason"):
                    record.ended = now
    return False
