"""The engine that runs ahead: it launches the next burst of steps before it has read the tokens of the last one.

    launch burst n+1 ──► read burst n ──► end, abort, tell ──► launch burst n+2 …
    GPU: ▓▓▓▓ burst n ▓▓▓▓▓▓▓▓▓▓▓ burst n+1 ▓▓▓▓▓▓▓▓▓▓▓ burst n+2

Tokens feed the next step on the GPU, so the host learns of an end only afterwards: the tokens after it are dropped, their keys
and values lie behind the known ones and are never indexed. Work on the GPU is in launch order, so pages that a finished
request gives back are written by their next owner only after the last stray write. Requests that need whole rows of logits
(log-probabilities, penalties, structured output) make the engine fall back to one step at a time while they are there.
"""

import time
from dataclasses import dataclass

from altiplano.engine.config import EngineConfig
from altiplano.engine.core import Engine
from altiplano.engine.cuda import drawing
from altiplano.engine.cuda.runner import CudaRunner, Ticket
from altiplano.engine.outputs import TokenOutput
from altiplano.engine.plan import Chunk
from altiplano.engine.request import Request, State
from altiplano.engine.runner import Drawn


@dataclass(frozen=True)
class _Flight:
    """Tokens that the GPU draws: for each request its slot and the number of its first token, `count` tokens each."""

    requests: list[Request]
    slots: list[int]
    first: list[int]
    count: int


class OverlappedEngine(Engine):
    """`Engine` on a `CudaRunner`, with bursts of up to `burst` tokens. Same outputs; several tokens of a request may come per step."""

    def __init__(self, config: EngineConfig, runner: CudaRunner, burst: int = 8) -> None:
        super().__init__(config, runner)
        self._cuda, self._burst = runner, burst
        self._flying: tuple[list[_Flight], Ticket] | None = None
        self._ahead: dict[Request, int] = {}  # tokens in flight per request
        self._live: set[Request] = set()  # requests whose slot on the GPU is up to date

    def has_unfinished(self) -> bool:
        return super().has_unfinished() or self._flying is not None

    def step(self) -> list[TokenOutput]:
        """Launch what comes next and return the news of what was launched before."""
        if not self._all_plain():
            news = self._land(None)
            self._live.clear()
            return news + super().step()
        news, self._news = self._news, []
        started = time.perf_counter()
        launched = self._launch()
        news += self._land(launched)
        self._seconds += time.perf_counter() - started
        if self.config.debug and self._flying is None:
            self._scheduler.check()
        return news

    def _all_plain(self) -> bool:
        return all(drawing.is_plain(r.params, r.num_generated) for r in self._requests.values())

    def _launch(self) -> tuple[list[_Flight], Ticket] | None:
        scheduler = self._scheduler
        scheduler.running.sort(key=lambda r: r.order)
        flights, budget, preempted = [], scheduler.budget, False
        # A burst beside a prompt would run at the small batch of those who are there already; one step keeps them going.
        burst = 1 if self._prompts_follow() else self._burst
        decodes, chunks = [], list[Chunk]()
        for request in list(scheduler.running):
            if request.state is not State.RUNNING:
                continue  # preempted a moment ago
            n = self._wanted(request, burst)
            computing = self._computing(request)
            n = min(n, budget) if computing else n
            if n == 0:
                continue
            preempted |= not self._reserve(request, n)
            if request.state is not State.RUNNING:
                continue
            if computing:
                chunks.append(scheduler.chunk(request, n))
                budget -= n
            else:
                decodes.append(request)
        chunks = [c for c in chunks if self._requests[c.request_id].state is State.RUNNING]
        decodes = [r for r in decodes if r.state is State.RUNNING]
        if not preempted and budget > 0:
            scheduler.admit(budget, chunks)
        if chunks:
            flights += self._launch_chunks(chunks)
        if decodes:
            flights.append(self._launch_burst(decodes, burst))
        if not flights and not chunks:
            return None
        self._steps += 1
        return flights, self._cuda.publish()

    def _computing(self, request: Request) -> bool:
        """Whether known tokens are still to be computed, other than the last one drawn."""
        return request not in self._live and len(request.tokens) - request.num_computed > 1

    def _prompts_follow(self) -> bool:
        """Whether prompts are under way, or one waits that could be admitted."""
        scheduler = self._scheduler
        if any(self._computing(request) for request in scheduler.running):
            return True
        if not scheduler.waiting or len(scheduler.running) >= self.config.max_num_seqs:
            return False
        return scheduler.pool.num_free * self.config.block_size >= len(scheduler.waiting[0].tokens)

    def _wanted(self, request: Request, burst: int) -> int:
        """Tokens to compute next: the rest of the prompt, or a burst up to max_tokens."""
        if self._computing(request):
            return len(request.tokens) - request.num_computed
        left = request.params.max_tokens - request.num_generated - self._ahead.get(request, 0)
        return max(0, min(burst, left))

    def _reserve(self, request: Request, n: int) -> bool:
        """Pages for n more tokens; takes them from the last in order if it must. False if anybody was preempted."""
        scheduler, untouched = self._scheduler, True
        while not scheduler.reserve(request, n):
            victim = scheduler.running[-1]
            scheduler.preempt(victim)
            self._live.discard(victim)
            untouched = False
            if victim is request:
                break
        return untouched

    def _launch_chunks(self, chunks: list[Chunk]) -> list[_Flight]:
        self._cuda.launch_prefill(chunks)
        drawn = [chunk for chunk in chunks if chunk.sample]
        for chunk in chunks:
            self._scheduler.advance(self._requests[chunk.request_id], chunk, None)
        requests = [self._requests[chunk.request_id] for chunk in drawn]
        for request in requests:
            self._live.add(request)
            self._ahead[request] = self._ahead.get(request, 0) + 1
        return [_Flight(requests, [c.slot for c in drawn], [c.generated for c in drawn], 1)] if drawn else []

    def _launch_burst(self, requests: list[Request], burst: int) -> _Flight:
        times = max(self._wanted(request, burst) for request in requests)
        fresh = [request for request in requests if request not in self._live]
        if fresh:
            self._cuda.launch_state([self._scheduler.chunk(request, 1) for request in fresh])
        slots = []
        for request in requests:
            assert request.slot is not None
            slots.append(request.slot)
            self._cuda.slots.set_pages(request.slot, request.pages, fresh=False)
        first = [request.num_generated + self._ahead.get(request, 0) for request in requests]
        self._cuda.launch_decode(slots, times)
        for request in requests:
            self._live.add(request)
            self._ahead[request] = self._ahead.get(request, 0) + times
            request.num_computed += min(times, self._room(request))
        return _Flight(requests, slots, first, times)

    def _room(self, request: Request) -> int:
        """Tokens that the reserved pages still hold: a burst may run past the request's end."""
        return len(request.pages) * self.config.block_size - request.num_computed

    def _land(self, launched: tuple[list[_Flight], Ticket] | None) -> list[TokenOutput]:
        """Read the burst before `launched`, which becomes the one in flight."""
        landing, self._flying = self._flying, launched
        news: list[TokenOutput] = []
        if landing is None:
            return news
        flights, ticket = landing
        for flight in flights:
            found = ticket.tokens(flight.slots, flight.first, flight.count)
            for request, tokens in zip(flight.requests, found, strict=True):
                self._book_burst(request, tokens, news)
        return news

    def _book_burst(self, request: Request, tokens: list[int], news: list[TokenOutput]) -> None:
        if request.state is not State.FINISHED:
            self._ahead[request] -= len(tokens)
        for token in tokens:
            if request.state is State.FINISHED:
                break  # ended or aborted: the rest was drawn for nobody
            request.tokens.append(token)
            news.append(self._book(request, Drawn(token)))
        if request.state is State.FINISHED:
            self._ahead.pop(request, None)
            self._live.discard(request)
