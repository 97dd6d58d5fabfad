"""What one step computes, as data: the scheduler's word to a runner."""

from dataclasses import dataclass, replace

from altiplano.engine.params import SamplingParams


@dataclass(frozen=True)
class Chunk:
    """Tokens of one request in one step: `tokens` at positions start, start + 1, … Samples when it reaches the last known token.

    `generated` counts the tokens drawn so far: with the seed it decides the noise of the draw. `history` (prompt, output) is
    filled only when penalties need it.
    """

    request_id: str
    slot: int
    start: int
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    sample: bool
    generated: int
    seed: int
    params: SamplingParams
    adapter: str | None
    history: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    next_tokens: tuple[int, ...] = ()  # the known token after each of `tokens`, filled when their log-probabilities are asked for
    allowed: bytes | None = None  # of a structured request: a bit per token that may be drawn
    num_guesses: int = (
        0  # the last of `tokens`, which nobody has drawn yet: a token is drawn before each of them and after the last
    )

    @property
    def decodes(self) -> bool:
        """Whether it draws the token after a single known one, with guesses behind it or without."""
        return self.sample and len(self.tokens) - self.num_guesses == 1

    def after(self, *drawn: int) -> "Chunk":
        """The same with these tokens drawn before it: later noise, and a longer history where penalties look at one."""
        if not drawn:
            return self
        history = None if self.history is None else (self.history[0], self.history[1] + drawn)
        return replace(self, generated=self.generated + len(drawn), history=history)


@dataclass(frozen=True)
class StepPlan:
    """Everything a runner needs for one step, replayable from a log."""

    chunks: tuple[Chunk, ...]
    preempted: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)
