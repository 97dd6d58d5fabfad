"""Guesses at the next tokens of requests: who makes them, and whether they pay.

The engine draws every token itself, from its model's logits with the noise of (seed, step); a guess is right if it is what was
drawn. So guesses change no answer, and seeds repeat whoever guesses (drafter-invariant speculation: Daliri, Musco and Suresh,
arXiv 2408.07978). What they change is time, and that is measured.
"""

from collections.abc import Sequence
from typing import Protocol

from altiplano.engine.request import Request
from altiplano.engine.speculation import PromptLookup

Wants = Sequence[tuple[Request, int]]  # requests with one token to compute, and how many guesses behind it have a place

WARM_UP = 3  # steps of each kind that do not count: they compile and allocate
ENOUGH = 8  # steps of each kind before anything is decided
MEMORY = 32  # steps after which what was measured weighs a third
ON_ABOVE, OFF_BELOW = 1.1, 1.0  # tokens a second with guesses over those without
TRIAL = 4  # steps; the first does not count, because a draft model has to catch up
FIRST_PAUSE, LAST_PAUSE = 32, 1024  # steps between trials
OUTLIER = 10.0  # times the mean


class Proposer(Protocol):
    """Makes guesses."""

    def propose(self, wants: Wants, budget: int) -> list[tuple[int, ...]]:
        """Guesses for each request, no more than it has places for; `budget`: tokens of catching up with known ones."""
        ...

    def observe(self, request: Request, proposed: int, accepted: int) -> None:
        """How many of a request's last guesses were right; before its tokens are booked."""
        ...


class LookupProposer:
    """Prompt lookup: every request's own text."""

    def __init__(self, most: int) -> None:
        self._most = most

    def propose(self, wants: Wants, budget: int) -> list[tuple[int, ...]]:
        return [self._lookup(request).propose(request.tokens, limit) for request, limit in wants]

    def observe(self, request: Request, proposed: int, accepted: int) -> None:
        self._lookup(request).observe(proposed, accepted)

    def _lookup(self, request: Request) -> PromptLookup:
        if request.lookup is None:
            request.lookup = PromptLookup(self._most)
        return request.lookup


class Speed:
    """Tokens per second of one request, over the last steps of one kind."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self.steps = 0

    def observe(self, tokens: float, seconds: float) -> None:
        self.steps += 1
        if self.steps == WARM_UP + 1:
            self._tokens = self._seconds = 0.0
        if self.steps > WARM_UP + 1:
            seconds = min(seconds, OUTLIER * self._seconds / min(self.steps - WARM_UP - 1, MEMORY))
        keep = 1 - 1 / MEMORY
        self._tokens, self._seconds = keep * self._tokens + tokens, keep * self._seconds + seconds

    @property
    def known(self) -> bool:
        return self.steps >= WARM_UP + ENOUGH

    @property
    def value(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0


class Payoff:
    """Decides from step to step whether to guess: what was faster lately, tried again after longer and longer pauses.

    Guessing stops below OFF_BELOW and starts again above ON_ABOVE, so that it does not flutter between the two.
    """

    def __init__(self) -> None:
        self.guessing = True
        self._plain, self._guessed = Speed(), Speed()
        self._pause = self._left = FIRST_PAUSE
        self._trial = 0  # steps left in which to do the other thing
        self._first = False  # whether the next of them is the first

    def decide(self) -> bool:
        """Whether the next step should guess."""
        if self._trial:
            self._trial -= 1
            return not self.guessing
        self._left -= 1
        if self._left <= 0:
            self._begin_trial()
        return self.guessing

    def observe(self, guessed: bool, tokens: float, seconds: float) -> None:
        """The step after `decide` has brought each of its requests `tokens` on average."""
        if guessed != self.guessing and self._first:
            self._first = False
            return
        (self._guessed if guessed else self._plain).observe(tokens, seconds)
        if not self._both_known:
            return
        plain, guessing = self._plain.value, self._guessed.value
        if guessing < OFF_BELOW * plain if self.guessing else guessing > ON_ABOVE * plain:
            self.guessing = not self.guessing
            self._trial, self._pause, self._left = 0, FIRST_PAUSE, FIRST_PAUSE

    def _begin_trial(self) -> None:
        self._trial, self._first, self._left = TRIAL, True, self._pause
        if self._both_known:
            self._pause = min(2 * self._pause, LAST_PAUSE)
        else:
            self._trial = 1 + WARM_UP + ENOUGH

    @property
    def _both_known(self) -> bool:
        return self._plain.known and self._guessed.known


class Payoffs:
    """One `Payoff` for each doubling of the batch: a guess costs little in a small one and a lot in a large one."""

    def __init__(self) -> None:
        self._of: dict[int, Payoff] = {}

    def of(self, requests: int) -> Payoff:
        return self._of.setdefault(requests.bit_length(), Payoff())
