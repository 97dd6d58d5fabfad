"""What the host supposes of requests whose tokens are in flight: it learns of a burst's tokens only when the burst is read."""

from altiplano.engine.request import Request


class Ahead:
    """Tokens in flight, by request, and what the GPU and those who guess know of it."""

    def __init__(self) -> None:
        self.drawn: dict[Request, int] = {}  # tokens in flight, at most
        self.slack: dict[Request, int] = {}  # those of them that are not certain
        self.live: set[Request] = set()  # requests whose slot on the GPU is up to date
        self.known: dict[Request, int] = {}  # who guesses knows the request's text; tokens that a draft model has computed of it

    def computing(self, request: Request) -> bool:
        """Whether known tokens are still to be computed, other than the last one drawn."""
        return request not in self.live and len(request.tokens) - request.num_computed > 1

    def wanted(self, request: Request, burst: int) -> int:
        """Tokens to compute next: the rest of the prompt, or a burst up to max_tokens."""
        if self.computing(request):
            return len(request.tokens) - request.num_computed
        left = request.params.max_tokens - request.num_generated - self.drawn.get(request, 0)
        return max(0, min(burst, left))

    def most(self, request: Request, steps: int, guesses: int) -> int:
        """Tokens that may be computed before the next burst: in flight without certainty, and in `steps` more; none past the request's end."""
        most = self.slack.get(request, 0) + steps * (guesses + 1)
        return min(most, request.prompt_len + request.params.max_tokens - request.num_computed)

    def launch(self, request: Request, steps: int, guesses: int) -> None:
        """`steps` more are in flight, and the slot follows them."""
        self.live.add(request)
        self.drawn[request] = self.drawn.get(request, 0) + steps * (guesses + 1)
        if guesses:
            self.slack[request] = self.slack.get(request, 0) + steps * guesses

    def preempt(self, request: Request) -> None:
        """Its slot and its pages are gone; what is in flight still lands."""
        self.live.discard(request)
        self.known.pop(request, None)

    def drop(self, request: Request) -> None:
        for kept in (self.drawn, self.slack, self.known):
            kept.pop(request, None)
        self.live.discard(request)

    def clear(self) -> None:
        """Forget everything: nothing is in flight, and no slot is up to date."""
        for kept in (self.drawn, self.slack, self.live, self.known):
            kept.clear()
