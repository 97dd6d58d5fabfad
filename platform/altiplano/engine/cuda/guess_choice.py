"""Whether the next launch guesses: where it pays, where pages are free for it, and once a draft model knows what was said."""

from collections.abc import Sequence
from typing import NamedTuple

from altiplano.engine.cuda.ahead import Ahead
from altiplano.engine.cuda.runner import CudaRunner
from altiplano.engine.guessing import Payoff, Payoffs
from altiplano.engine.request import Request
from altiplano.engine.scheduler import Scheduler

MOST_DRAWN = 32  # tokens of a request in one burst with guesses: two bursts fit into the ring


class Choice(NamedTuple):
    """What to do about guesses in the next launch."""

    guesses: int = 0  # for each request
    asked: Payoff | None = None  # who has decided so
    catch_up: int = 0  # known tokens that a draft model computes first, beside a plain step, as many as of a prompt
    wait: bool = False  # what is in flight must land before a draft model can compute it


NO_GUESSES = Choice()


class GuessChoice:
    """Chooses from launch to launch for the requests that `scheduler` runs, and tells those who guess what they must know."""

    def __init__(self, scheduler: Scheduler, runner: CudaRunner, payoffs: Payoffs, ahead: Ahead) -> None:
        self._scheduler, self._cuda, self._payoffs, self._ahead = scheduler, runner, payoffs, ahead
        self._postponed: Payoff | None = None  # it wants guesses, and a draft model does not know enough yet

    def choose(self, prompts: int, in_flight: Sequence[int] | None) -> Choice:
        """What to do while nobody's prompt is computed, which could take `prompts` tokens of a step.

        in_flight: how many guesses each flight has that has not landed; None: nothing was launched that has not. Pages are reserved for
        the guesses that it answers.
        """
        running, postponed = self._scheduler.running, self._postponed
        self._postponed = None
        most = self._cuda.guesses_per_request(len(running))
        if not most or not any(self._ahead.wanted(request, 1) for request in running):
            return NO_GUESSES
        payoff = self._payoffs.of(len(running))
        if payoff is not postponed and not payoff.decide():
            return Choice(asked=payoff)
        if self._cuda.drafts:
            if self._behind() > prompts:
                self._postponed = payoff
                return Choice(catch_up=max(prompts, 2 * len(running)))  # more than is drawn meanwhile
            if in_flight is not None and self._unknown(in_flight):
                self._postponed = payoff
                return Choice(wait=True)
        return Choice(most, payoff) if self._reserve(most) else NO_GUESSES

    def inform(self, requests: Sequence[Request]) -> None:
        """Tell those who guess what they do not know of the requests; with a draft model nothing is in flight then."""
        self.catch_up(requests, sum(len(request.tokens) for request in requests))
        for request in requests:
            self._ahead.known[request] = len(request.tokens) - 1

    def catch_up(self, requests: Sequence[Request], most: int) -> None:
        """The same, but a draft model computes `most` of the tokens."""
        known = self._ahead.known
        for request in requests:
            assert request.slot is not None
            if request not in known:
                self._cuda.remember(request.slot, request.tokens)
            first = known.setdefault(request, 0)
            missing = len(request.tokens) - 1 - first
            n = min(missing, most)
            if self._cuda.drafts and missing > 1 and n > 0:
                self._cuda.catch_up(request.slot, request.tokens[first : first + n], first)
                known[request] += n
                most -= n

    def _reserve(self, guesses: int) -> bool:
        """Pages for a burst in which every guess is right. Nobody is preempted for a guess, nor for pages that were kept for one."""
        scheduler, steps = self._scheduler, MOST_DRAWN // (guesses + 1)
        held = [len(request.pages) for request in scheduler.running]
        if all(scheduler.reserve(request, self._ahead.most(request, steps, guesses)) for request in scheduler.running):
            return True
        for request, pages in zip(scheduler.running, held, strict=True):
            scheduler.pool.release(request.pages[pages:])
            del request.pages[pages:]
        return False

    def _behind(self) -> int:
        """Known tokens that a draft model has to compute before its own steps, which begin with the last two."""
        missing = [len(request.tokens) - 1 - self._ahead.known.get(request, 0) for request in self._scheduler.running]
        return sum(tokens for tokens in missing if tokens > 1)

    def _unknown(self, in_flight: Sequence[int]) -> bool:
        """Whether some request has tokens, in flight or known, that a draft model's own steps leave out: all but the last two."""
        if not all(in_flight):
            return True
        return any(self._ahead.known.get(request, -1) < len(request.tokens) - 2 for request in self._scheduler.running)
