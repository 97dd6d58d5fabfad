"""Which tokens the next step computes.

One budget of tokens per step is shared by decodes (one token each) and chunks of prompts. Running requests go first, in the
order (priority, arrival), so nobody who is being served is starved by newcomers; when pages run out, the last in that order
gives its pages up and waits again with everything it has said so far. The first in order can always run, because the cache
holds at least one request of the longest length: every request ends.
"""

import time
from collections.abc import Callable, Sequence

from altiplano.engine.pages import PagePool
from altiplano.engine.plan import Chunk, StepPlan
from altiplano.engine.radix import RadixIndex
from altiplano.engine.request import Request, State

# Rows of a decode step up to which another row is nearly free, because the weights are read anyway.
SPECULATIVE_ROWS = 16


# Guesses for requests with so many places each; the last number is what catching up may cost in tokens.
Guess = Callable[[Sequence[tuple[Request, int]], int], list[tuple[int, ...]]]


class Scheduler:
    """Queues, slots and pages of all requests.

    `guess` is asked for guesses at the tokens after a decode. `prompt_limit(decodes)` limits the tokens of prompts in a step that
    also decodes, so that nobody waits too long for the next token. `clock`: seconds, for the time of admission.
    """

    def __init__(
        self,
        pool: PagePool,
        radix: RadixIndex | None,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        *,
        guess: Guess | None = None,
        prompt_limit: Callable[[int], int] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.pool, self.radix, self.block_size = pool, radix, block_size
        self.budget = max_num_batched_tokens
        self._guess, self._prompt_limit, self._clock = guess, prompt_limit, clock
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._slots = list(range(max_num_seqs - 1, -1, -1))
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        self.waiting.sort(key=lambda r: r.order)

    def plan(self) -> StepPlan:
        """Choose the tokens of the next step and reserve their pages. Empty only when no request is there or all are blocked."""
        budget, chunks, preempted = self.budget, list[Chunk](), list[str]()
        self.running.sort(key=lambda r: r.order)
        prompts = self.prompt_budget(self._decodes, shared=True)
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            if request.blocked:
                index += 1
                continue
            rest = len(request.tokens) - request.num_computed
            n = min(rest, budget) if rest == 1 else min(rest, budget, prompts)
            if n == 0:
                index += 1
                continue
            while not self.reserve(request, n):
                victim = self.running[-1]
                self.preempt(victim)
                preempted.append(victim.request_id)
                if victim is request:
                    break
            else:
                chunks.append(self.chunk(request, n))
                budget -= n
                prompts -= n if rest > 1 else 0
                index += 1
        # Who was preempted in this very step would only be thrown out again.
        if not preempted:
            admitted = min(budget, prompts)
            left = self.admit(admitted, chunks)
            budget, prompts = budget - admitted + left, prompts - admitted + left
        if self._guess is not None:
            self._add_guesses(self._guess, chunks, budget, prompts)
        return StepPlan(tuple(chunks), tuple(preempted))

    def prompt_budget(self, decodes: Callable[[], int], *, shared: bool) -> int:
        """Tokens of prompts that the next step may compute, over all requests.

        `decodes`: counts the requests that decode in it, if anybody wants to know; `shared`: whether they need their part of the budget.
        """
        if self._prompt_limit is None:
            return self.budget
        rows = decodes()
        if not rows:
            return self.budget
        return max(1, min(self._prompt_limit(rows), self.budget - rows if shared else self.budget))

    def advance(self, request: Request, chunk: Chunk, token: int | None) -> None:
        """Book a computed chunk without its guesses, and the token drawn from it."""
        before = request.num_computed
        request.num_computed += len(chunk.tokens) - chunk.num_guesses
        if token is not None:
            request.tokens.append(token)
        # Index once when the prompt is done, so that equal prompts share while the first still answers.
        if before < request.prompt_len <= request.num_computed:
            self._index(request)

    def accept(self, request: Request, token: int) -> None:
        """Book a right guess, the last known token, as computed; and the token drawn after it."""
        request.num_computed += 1
        request.tokens.append(token)

    def admit(self, budget: int, chunks: list[Chunk]) -> int:
        """Start waiting requests within `budget` tokens, in order, while slots and pages last; their chunks are added to `chunks`.

        Returns what is left of the budget. Nobody is preempted for a newcomer. A request that was preempted since the last call
        to `plan` should not be admitted again before the next: it would only be thrown out once more.
        """
        while self.waiting and budget > 0 and self._slots:
            request = next((r for r in self.waiting if not r.blocked), None)
            if request is None:
                break
            self._match_prefix(request)
            n = min(len(request.tokens) - request.num_computed, budget)
            if not self.reserve(request, n):
                self.pool.release(request.pages)
                request.pages, request.num_computed = [], 0
                break
            self.waiting.remove(request)
            request.state, request.slot = State.RUNNING, self._slots.pop()
            if request.admitted is None:
                request.admitted = self._clock()
            self.running.append(request)
            chunks.append(self.chunk(request, n))
            budget -= n
        return budget

    def reserve(self, request: Request, n: int) -> bool:
        """Give a running request the pages that `n` more tokens need, evicting cached prefixes if that is enough.

        False, and nothing has changed but evicted prefixes, when there are not as many: preempt somebody and ask again.
        """
        need = -(-(request.num_computed + n) // self.block_size) - len(request.pages)
        if need <= 0:
            return True
        short = need - self.pool.num_free
        if short > 0 and self.radix is not None:
            self.radix.evict(short)
        pages = self.pool.take(need)
        if pages is None:
            return False
        request.pages += pages
        return True

    def preempt(self, request: Request) -> None:
        """Take a running request's pages and slot; it waits again, in its old place, with everything that it has said."""
        self._index(request)
        self.running.remove(request)
        self._give_up(request)
        request.state, request.num_computed = State.WAITING, 0
        request.prompt_logprobs.clear()
        request.prompt_top.clear()
        self.num_preemptions += 1
        self.add(request)

    def chunk(self, request: Request, n: int, guesses: tuple[int, ...] = ()) -> Chunk:
        """The next `n` known tokens of a running request and `guesses` behind them, whose pages are reserved."""
        start = request.num_computed
        following = tuple(request.tokens[start + 1 : start + n + 1]) if request.params.prompt_logprobs else ()
        assert request.slot is not None
        return Chunk(
            request.request_id,
            request.slot,
            start,
            tuple(request.tokens[start : start + n]) + guesses,
            tuple(request.pages),
            start + n == len(request.tokens),
            request.num_generated,
            request.seed,
            request.params,
            request.adapter,
            request.history,
            following,
            request.allowed,
            len(guesses),
        )

    def finish(self, request: Request, reason: str) -> None:
        """End a request in any state and give its pages and slot back."""
        if request.state is State.FINISHED:
            return
        if request.state is State.RUNNING:
            self._index(request)
            self.running.remove(request)
            self._give_up(request)
        else:
            self.waiting.remove(request)
        request.state, request.finish_reason = State.FINISHED, reason

    def check(self) -> None:
        """Raise AssertionError when pages or slots have leaked or are owned twice."""
        self.pool.check()
        held: dict[int, int] = {}
        for request in self.running:
            assert len(request.pages) * self.block_size >= request.num_computed, (
                f"{request.request_id} has computed tokens without pages"
            )
            for page in request.pages:
                held[page] = held.get(page, 0) + 1
        indexed = len(self.radix) if self.radix else 0
        owned = sum(self.pool.holders(page) for page in range(self.pool.num_pages))
        assert owned == sum(held.values()) + indexed, (
            f"{owned} holds, but requests have {sum(held.values())} and the prefix cache {indexed}"
        )

    def _match_prefix(self, request: Request) -> None:
        """Start from the cached pages; the last token is always computed, because its logits are needed."""
        if self.radix is None or request.params.prompt_logprobs:
            return
        usable = (len(request.tokens) - 1) // self.block_size
        pages = self.radix.match(_namespace(request), request.tokens)[:usable]
        self.pool.hold(pages)
        request.pages, request.num_computed = list(pages), len(pages) * self.block_size
        if request.num_generated == 0:
            request.num_cached_tokens = request.num_computed

    def _decodes(self) -> int:
        return sum(not r.blocked and len(r.tokens) - r.num_computed == 1 for r in self.running)

    def _add_guesses(self, guess: Guess, chunks: list[Chunk], budget: int, catch_up: int) -> None:
        """Put guesses behind decodes; nothing while many requests share the step, and nobody is preempted for a guess."""
        if self._prompt_limit is not None and any(len(chunk.tokens) > 1 for chunk in chunks):
            return  # a step beside a prompt has no time to spare
        share = (SPECULATIVE_ROWS - len(self.running)) // len(self.running) if self.running else 0
        of = {request.request_id: request for request in self.running}
        wants, places = list[tuple[Request, int]](), list[int]()
        for place, chunk in enumerate(chunks):
            request = of[chunk.request_id]
            limit = min(share, request.params.max_tokens - request.num_generated - 1, budget)
            # What a structured request may say after a guess is known only once the guess is right.
            if limit < 1 or len(chunk.tokens) > 1 or not chunk.sample or not chunk.generated or request.params.structured:
                continue
            if self.reserve(request, 1 + limit):
                wants.append((request, limit))
                places.append(place)
                budget -= limit
        if not wants:
            return
        for place, (request, _), guesses in zip(places, wants, guess(wants, catch_up), strict=True):
            if guesses:
                chunks[place] = self.chunk(request, 1, guesses)

    def _give_up(self, request: Request) -> None:
        self.pool.release(request.pages)
        request.pages, request.num_drafted = [], 0
        assert request.slot is not None
        self._slots.append(request.slot)
        request.slot = None

    def _index(self, request: Request) -> None:
        if self.radix is not None:
            self.radix.insert(_namespace(request), request.tokens[: request.num_computed], request.pages)


def _namespace(request: Request) -> str:
    return f"{request.adapter or ''}\0{request.namespace}"
