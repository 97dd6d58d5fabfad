"""What passes between front end and engine, counted: tokens against quotas, latencies, prefix hits, cost."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from altiplano.serve import messages as m
from altiplano.serve.adapters import name_of
from altiplano.serve.call import Call, current_call
from altiplano.serve.engine_client import EngineClient

TELL_EVERY = 16  # tokens: Prometheus's counters take a lock each time


class MeteredEngineClient(EngineClient):
    """An engine client that counts every answer for the call it belongs to, and keeps the keys' cached prefixes apart."""

    async def generate(
        self, request_id: str, prompt: list[int], sampling: m.Sampling, **more: Any
    ) -> AsyncGenerator[m.Token, None]:
        call = current_call()
        if call is None:
            async with aclosing(super().generate(request_id, prompt, sampling, **more)) as plain:
                async for token in plain:
                    yield token
            return
        # A prefix hit is faster than a miss: with one cache for all, a key could find out what another one asks.
        more.setdefault("namespace", call.key.id if call.key else "")
        more.setdefault("priority", call.priority)
        answer = Answer(call, more.get("adapter"), len(prompt))
        call.unfinished[request_id] = lambda: self._send(m.Abort(request_id))
        try:
            async with aclosing(super().generate(request_id, prompt, sampling, watch=answer, **more)) as tokens:
                async for token in tokens:
                    yield token
        except (GeneratorExit, asyncio.CancelledError):
            # A stop string was found, or the client is gone.
            answer.left("stop" if request_id in call.stopped else "abort")
            raise
        finally:
            call.unfinished.pop(request_id, None)
            call.stopped.discard(request_id)
            answer.end()


class Answer:
    """One answer being generated. Begins with its construction; `end` must follow."""

    def __init__(self, call: Call, adapter: str | None, prompt_tokens: int) -> None:
        governance = call.governance
        self._call, self._clock = call, governance.clock
        call.arm = call.arm or name_of(adapter)  # an arm of a test has its own name
        labels = call.labels(call.arm)
        self._metrics = governance.metrics.of(labels)
        self._account = governance.ledger.begin(labels, self._clock())
        self._tokens = call.quota.tokens if call.quota else None
        self._prompt, self._count, self._told = prompt_tokens, 0, 0
        self._reason: str | None = None
        self._began = False
        self._first = self._last = 0.0  # news, or tokens where there are any

    def saw(self, token: m.Token) -> None:
        """News from the engine."""
        now = self._clock()
        if token.finish_reason is not None:
            self._reason = token.finish_reason
        if not self._began and token.finish_reason != "abort":
            self._began = True
            self._computed_prompt(token)
        if token.token_id is None:
            self._last = self._last or now  # a prompt that was scored, and nothing was said
            return
        if self._count == 0:
            self._begin(now)
        else:
            self._metrics.inter_token.observe(now - self._last)
        self._count += 1
        self._last = now
        self._account.token()
        if self._count - self._told >= TELL_EVERY:
            self._tell()
        self._call.generation_tokens += 1
        if self._tokens is not None:
            self._tokens.take(1)

    def waited(self, seconds: float) -> None:
        """How long the engine let it wait before its first step."""
        self._metrics.queued.observe(seconds)

    def left(self, reason: str) -> None:
        """Nobody reads on: "stop", the answer is complete, or "abort", nobody wants it any more."""
        self._reason = reason if reason == "stop" else self._reason or reason

    def end(self) -> None:
        """The engine is done, has failed, or nobody waits any more."""
        call, metrics = self._call, self._metrics
        call.governance.ledger.end(self._account, self._clock())
        self._tell()
        if self._reason is None:
            return  # it failed
        metrics.finished(self._reason)
        if self._reason == "abort":
            return  # how long it would have taken is not known
        metrics.end_to_end.observe(self._last - call.started)
        if self._count > 1:
            metrics.per_output_token.observe((self._last - self._first) / (self._count - 1))
        call.finish_reasons.append(self._reason)

    def _computed_prompt(self, token: m.Token) -> None:
        self._call.cached_tokens += token.num_cached_tokens
        self._metrics.prompt_tokens.inc(self._prompt)
        self._metrics.cache_queries.inc(self._prompt)
        self._metrics.cache_hits.inc(token.num_cached_tokens)
        self._account.prompt(self._prompt, token.num_cached_tokens)

    def _begin(self, now: float) -> None:
        call = self._call
        self._first = now
        call.first_token = now if call.first_token is None else call.first_token
        self._metrics.first_token.observe(now - call.started)

    def _tell(self) -> None:
        self._metrics.generation_tokens.inc(self._count - self._told)
        self._told = self._count
