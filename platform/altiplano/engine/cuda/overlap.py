"""The engine that runs ahead: it launches the next burst of steps before it has read the tokens of the last one.

    launch burst n+1 ──► read burst n ──► end, abort, tell ──► launch burst n+2 …
    GPU: ▓▓▓▓ burst n ▓▓▓▓▓▓▓▓▓▓▓ burst n+1 ▓▓▓▓▓▓▓▓▓▓▓ burst n+2

Tokens feed the next step on the GPU, so the host learns of an end only afterwards: the tokens after it are dropped, their keys
and values lie behind the known ones and are never indexed. Work on the GPU is in launch order, so pages that a finished
request gives back are written by their next owner only after the last stray write. Requests that need whole rows of logits
(log-probabilities, penalties, structured output) make the engine fall back to one step at a time while they are there.

With guesses (see `guesses.py`) the host does not know either how many tokens a burst draws, only how many at most: it reserves
pages for all of them, counts the certain ones as computed, and corrects itself when the burst is read.

A graph with guesses takes a tenth of a second to capture, and guesses begin where few requests run and every token is waited for. So
these graphs, 16 at most, are captured while nobody waits: at the start, with an adapter that comes to an idle engine, after sleep, and
those of an adapter that came beside answers when an endpoint is quiet.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from altiplano.engine.config import EngineConfig
from altiplano.engine.core import Engine
from altiplano.engine.cuda import drawing
from altiplano.engine.cuda.ahead import Ahead
from altiplano.engine.cuda.guess_choice import MOST_DRAWN, NO_GUESSES, GuessChoice
from altiplano.engine.cuda.runner import CudaRunner, Ticket
from altiplano.engine.errors import AdapterError, EngineError
from altiplano.engine.guessing import Payoff
from altiplano.engine.outputs import TokenOutput
from altiplano.engine.plan import Chunk
from altiplano.engine.request import Request, State
from altiplano.engine.runner import Drawn
from altiplano.engine.step_time import Step

# Pages that a request takes at once while half of them are free: attention reads neighbours faster than strays.
PAGES_AT_ONCE = 8


@dataclass(frozen=True)
class _Flight:
    """Tokens that the GPU draws: for each request its slot. `count` tokens each, and up to `guesses` more for each of them."""

    requests: list[Request]
    slots: list[int]
    count: int
    guesses: int = 0


@dataclass(frozen=True)
class _Launched:
    """What was launched together. `asked`: who decided whether to guess, where the question came up and the answer was obeyed."""

    flights: list[_Flight]
    ticket: Ticket
    started: float
    prompt_tokens: int
    decodes: int
    burst: int
    asked: Payoff | None
    caught_up: bool  # a draft model has computed known tokens beside it


class OverlappedEngine(Engine):
    """`Engine` on a `CudaRunner`, with bursts of up to `burst` tokens. Same outputs; several tokens of a request may come per step."""

    def __init__(self, config: EngineConfig, runner: CudaRunner, burst: int = 8) -> None:
        super().__init__(config, runner)
        self._cuda, self._burst = runner, burst
        self._flying: _Launched | None = None
        self._landed: Ticket | None = None  # the last one, while the GPU has not been idle since
        self._ahead = Ahead()
        self._choice = GuessChoice(self._scheduler, runner, self._payoffs, self._ahead)
        self._held = False  # whether decodes were left out of the last launch
        self._made: dict[int, int] = {}  # guesses made in each slot, over all its requests
        runner.warm_up()

    def has_unfinished(self) -> bool:
        return super().has_unfinished() or self._flying is not None

    def is_blocked(self) -> bool:
        """As in `Engine`, and nothing is in flight: a burst that outlives its requests has to land before anybody rests or sleeps."""
        return self._flying is None and super().is_blocked()

    def step(self) -> list[TokenOutput]:
        """Launch what comes next and return the news of what was launched before."""
        if not self._all_plain():
            news = self._land(None)
            # Nothing is in flight: what was remembered of requests would outlive those that end here.
            self._ahead.clear()
            return news + super().step()
        news, self._news = self._news, []
        started = self._clock()
        launched = self._launch(started)
        news += self._land(launched)
        self._seconds += self._clock() - started
        if self.config.debug and self._flying is None:
            self._check_pages()
        return news

    def load_adapter(self, name: str, directory: Path) -> None:
        try:
            super().load_adapter(name, directory)
            if not self.has_unfinished():
                self._cuda.warm_up()
        except torch.OutOfMemoryError as error:
            if name in self.adapters:
                self.unload_adapter(name)
            raise AdapterError(
                f"the GPU has no memory for adapter {name!r} on its way into its place: lower num_blocks, or use an adapter of a lower rank"
            ) from error

    def wake_up(self) -> None:
        level = self.sleep_level
        super().wake_up()
        try:
            self._cuda.warm_up()
        except torch.OutOfMemoryError as error:
            self.sleep(level)
            raise EngineError(
                "the GPU has no memory for the graphs with guesses: free it, then wake the engine up again"
            ) from error

    def abort(self, request_id: str) -> None:
        request = self._requests.get(request_id)
        super().abort(request_id)
        if request is not None:
            self._ahead.drop(request)

    def _all_plain(self) -> bool:
        return all(drawing.is_plain(r.params, r.num_generated) for r in self._requests.values())

    def _launch(self, started: float) -> _Launched | None:
        scheduler = self._scheduler
        scheduler.running.sort(key=lambda r: r.order)
        flights, budget, preempted = [], scheduler.budget, False
        # A burst beside a prompt would run at the small batch of those who are there already; one step keeps them going.
        alone = not self._prompts_follow()
        prompts = self._prompt_budget()
        in_flight = None if self._flying is None else [flight.guesses for flight in self._flying.flights]
        choice = self._choice.choose(prompts, in_flight) if alone else NO_GUESSES
        if choice.wait:
            return None
        guesses, short = choice.guesses, not alone or choice.catch_up
        burst = 1 if short else MOST_DRAWN // (guesses + 1) if guesses else self._burst
        decodes, chunks = [], list[Chunk]()
        for request in list(scheduler.running):
            if request.state is not State.RUNNING:
                continue  # preempted a moment ago
            n = self._ahead.wanted(request, burst)
            computing = self._ahead.computing(request)
            n = min(n, budget, prompts) if computing else n
            if n == 0:
                continue
            preempted |= not self._reserve(request, n if computing else self._ahead.most(request, n, guesses))
            if request.state is not State.RUNNING:
                continue
            if computing:
                chunks.append(scheduler.chunk(request, n))
                budget -= n
                prompts -= n
            else:
                decodes.append(request)
        chunks = [c for c in chunks if self._requests[c.request_id].state is State.RUNNING]
        decodes = [r for r in decodes if r.state is State.RUNNING]
        if not preempted and min(budget, prompts) > 0:
            scheduler.admit(min(budget, prompts), chunks)
        self._held = bool(decodes) and not guesses and not self._held and self._is_full(chunks)
        if self._held:
            decodes = []
        if chunks:
            flights += self._launch_chunks(chunks)
        if decodes:
            flights.append(self._launch_burst(decodes, burst, guesses))
            if choice.catch_up:
                self._choice.catch_up(decodes, choice.catch_up)
        if not flights and not chunks:
            return None
        times = flights[-1].count if decodes else 1
        self._steps += times
        tokens = sum(len(chunk.tokens) for chunk in chunks)
        return _Launched(flights, self._cuda.publish(), started, tokens, len(decodes), times, choice.asked, choice.catch_up > 0)

    def _is_full(self, chunks: list[Chunk]) -> bool:
        """Whether prompts fill the launch. Who decodes already waits for one such, not for two, and not under a latency target: few
        rows take nearly as long as all will together."""
        return self.config.itl_target_ms is None and sum(len(chunk.tokens) for chunk in chunks) == self._scheduler.budget

    def _prompt_budget(self) -> int:
        """Tokens of prompts that may be computed beside decodes, which are launches of their own, over all requests."""
        running = self._scheduler.running
        return self._scheduler.prompt_budget(lambda: sum(not self._ahead.computing(request) for request in running), shared=False)

    def _prompts_follow(self) -> bool:
        """Whether prompts are under way, or one waits that could be admitted."""
        scheduler = self._scheduler
        if any(self._ahead.computing(request) for request in scheduler.running):
            return True
        if not scheduler.waiting or len(scheduler.running) >= self.config.max_num_seqs:
            return False
        pages = scheduler.pool.num_free + scheduler.pool.num_evictable
        return pages * self.config.block_size >= len(scheduler.waiting[0].tokens)

    def _reserve(self, request: Request, n: int) -> bool:
        """Pages for n more tokens; takes them from the last in order if it must. False if anybody was preempted."""
        scheduler, untouched = self._scheduler, True
        if n > self._room(request) and 2 * scheduler.pool.num_free > scheduler.pool.num_pages:
            left = request.prompt_len + request.params.max_tokens - request.num_computed
            n = max(n, min(left, n + PAGES_AT_ONCE * self.config.block_size))
        while not scheduler.reserve(request, n):
            victim = scheduler.running[-1]
            scheduler.preempt(victim)
            self._ahead.preempt(victim)
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
            self._ahead.launch(request, 1, 0)
        return [_Flight(requests, [c.slot for c in drawn], 1)] if drawn else []

    def _launch_burst(self, requests: list[Request], burst: int, guesses: int) -> _Flight:
        times = max(self._ahead.wanted(request, burst) for request in requests)
        fresh = [request for request in requests if request not in self._ahead.live]
        if fresh:
            self._cuda.launch_state([self._scheduler.chunk(request, 1) for request in fresh])
        slots = []
        for request in requests:
            assert request.slot is not None
            slots.append(request.slot)
            self._cuda.slots.set_pages(request.slot, request.pages, fresh=False)
        if guesses:
            self._choice.inform(requests)
            self._cuda.launch_guesses(slots, times, guesses)
        else:
            self._cuda.launch_decode(slots, times)
        for request in requests:
            self._ahead.launch(request, times, guesses)
            request.num_computed += min(times, self._room(request))
        return _Flight(requests, slots, times, guesses)

    def _room(self, request: Request) -> int:
        """Tokens that the reserved pages still hold: a burst may run past the request's end."""
        return len(request.pages) * self.config.block_size - request.num_computed

    def _land(self, launched: _Launched | None) -> list[TokenOutput]:
        """Read the burst before `launched`, which becomes the one in flight."""
        landing, self._flying = self._flying, launched
        news: list[TokenOutput] = []
        if landing is None:
            return news
        # Chunks in the middle of a prompt draw nothing to wait for, and an event that has not come to pass has no time.
        landing.ticket.done.synchronize()
        before = self._totals()
        for flight in landing.flights:
            self._land_flight(flight, landing.ticket, news)
        ended = self._clock()
        tokens = self._generated - before[0]
        self._learn_launch(landing, tokens)
        self._record(landing.started, ended, landing.decodes, landing.prompt_tokens, before, landing.burst)
        self._landed = landing.ticket if launched is not None else None
        return news

    def _land_flight(self, flight: _Flight, ticket: Ticket, news: list[TokenOutput]) -> None:
        first = [request.num_generated for request in flight.requests]
        counts = [flight.count] * len(first)
        if flight.guesses:
            self._guessed_steps += flight.count
            drawn = [ticket.drawn(slot) for slot in flight.slots]
            # Who has finished in between has less than was drawn for it, and gets nothing.
            counts = [max(0, total - known) for (total, _), known in zip(drawn, first, strict=True)]
            self._guessed += sum(made - self._made.get(slot, 0) for slot, (_, made) in zip(flight.slots, drawn, strict=True))
            self._made.update((slot, made) for slot, (_, made) in zip(flight.slots, drawn, strict=True))
        for request, tokens in zip(flight.requests, ticket.tokens(flight.slots, first, counts), strict=True):
            if flight.guesses and request.state is not State.FINISHED:
                self._settle(request, flight, len(tokens))
            self._book_burst(request, tokens, flight.count * (flight.guesses + 1), news)
            if flight.guesses and request in self._ahead.known:
                # Where all guesses were right, the draft model has not computed the last of them.
                self._ahead.known[request] = len(request.tokens) - 2

    def _settle(self, request: Request, flight: _Flight, drawn: int) -> None:
        """Correct what was supposed of a burst with guesses."""
        self._ahead.slack[request] -= flight.count * flight.guesses
        self._accepted += drawn - flight.count
        if request.state is State.RUNNING:
            request.num_computed += min(drawn - flight.count, self._room(request))

    def _learn_launch(self, landing: _Launched, tokens: int) -> None:
        """Remember what a launch has taken, if the GPU had no pause before it."""
        if self._landed is None:
            return
        seconds = self._landed.ready.elapsed_time(landing.ticket.ready) / 1000
        guessed = any(flight.guesses for flight in landing.flights)
        # A prompt that was admitted into room made by eviction has taken time of its own.
        if landing.asked is not None and landing.decodes and not landing.prompt_tokens:
            landing.asked.observe(guessed, tokens / landing.decodes, seconds)
        if self.config.itl_target_ms is not None and not guessed and not landing.caught_up:
            self._times.observe(Step(landing.prompt_tokens, landing.decodes, seconds / landing.burst))

    def _book_burst(self, request: Request, tokens: list[int], supposed: int, news: list[TokenOutput]) -> None:
        if request.state is not State.FINISHED:
            self._ahead.drawn[request] -= supposed
        for token in tokens:
            if request.state is State.FINISHED:
                break  # ended or aborted: the rest was drawn for nobody
            request.tokens.append(token)
            news.append(self._book(request, Drawn(token)))
        if request.state is State.FINISHED:
            self._ahead.drop(request)
