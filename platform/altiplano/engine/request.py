"""One request on its way through the engine.

    WAITING ──admitted──► RUNNING ──stop, length, abort──► FINISHED
       ▲                     │
       └──────preempted──────┘   (pages given up; computed again later, from the prefix cache where it still holds them)

A request only has known tokens (prompt and answer so far) and computed ones (whose keys and values are cached). Prefill,
chunks, prefix hits and preemption are all the same: computed chases known. A structured request keeps its place and its
pages, but computes nothing until the set of tokens that may come next is there.
"""

from dataclasses import dataclass, field
from enum import Enum

from altiplano.engine.params import SamplingParams
from altiplano.engine.speculation import Caution, PromptLookup


class State(Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """`tokens` are known, the first `num_computed` of them are in `pages`. Lower `priority` values go first."""

    request_id: str
    prompt_len: int
    tokens: list[int]
    params: SamplingParams
    seed: int
    arrival: int
    adapter: str | None = None
    priority: int = 0
    namespace: str = ""
    state: State = State.WAITING
    num_computed: int = 0
    num_cached_tokens: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int | None = None
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    finish_reason: str | None = None
    arrived: float = 0.0  # seconds of time.perf_counter
    admitted: float | None = None  # for the first time
    lookup: PromptLookup | None = None  # guesses at its next tokens from its own text
    caution: Caution | None = None  # how many tokens a draft model may guess
    num_drafted: int = 0  # tokens that a draft model has computed, in the same pages
    allowed: bytes | None = None  # of a structured request: a bit per token that may come next, lowest bit first

    @property
    def blocked(self) -> bool:
        """Whether nobody has said yet which token may come next."""
        return self.params.structured and self.allowed is None

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def history(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """(prompt, output), which penalties look at; None where there are none."""
        if not self.params.penalized:
            return None
        return tuple(self.tokens[: self.prompt_len]), tuple(self.tokens[self.prompt_len :])

    @property
    def order(self) -> tuple[int, int]:
        """Smaller goes first."""
        return (self.priority, self.arrival)
