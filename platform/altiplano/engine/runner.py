"""What a backend does for the engine: turn a plan into tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from altiplano.engine.plan import StepPlan


@dataclass(frozen=True)
class Drawn:
    """The result of one chunk: the token (None when the chunk does not reach the last known one) and what was asked about it.

    `logprob` and `top` (token id, log-probability) describe the model's own distribution, before temperature and filters.
    `prompt_logprobs` are those of the tokens after each position of the chunk that lies inside the prompt, `prompt_top` the most
    likely tokens there. `accepted`: the draws before this one, each equal to a guess of the chunk, in order.
    """

    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    prompt_top: tuple[tuple[tuple[int, float], ...], ...] = ()
    accepted: "tuple[Drawn, ...]" = ()


class Runner(Protocol):
    """A model on a device. `execute` returns one `Drawn` per chunk of the plan, in order."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_position_embeddings: int

    def execute(self, plan: StepPlan) -> list[Drawn]: ...

    def load_adapter(self, name: str, directory: Path) -> None: ...

    def unload_adapter(self, name: str) -> None: ...


@runtime_checkable
class Preparer(Protocol):
    """Who has work that steps to come would stop for, and that can be done before."""

    def prepare(self) -> bool:
        """Do a piece of it, a short one. Returns whether it did: False while nothing is left. What fails is left to the step."""
        ...


@runtime_checkable
class Stamper(Protocol):
    """Who can watch pages of its cache for `Canary`. Asked only while nothing is being computed."""

    def stamp(self, pages: Sequence[int]) -> None:
        """Fill free pages with a pattern that no step writes."""
        ...

    def written(self, pages: Sequence[int]) -> list[int]:
        """Those of the stamped `pages` that do not carry the pattern any more, ascending. Waits for what was launched."""
        ...


@runtime_checkable
class Sleeper(Protocol):
    """Who can give its memory back for a while. Nothing is computed between `sleep` and `wake_up`."""

    def sleep(self, level: int) -> None:
        """Free the cache, and the device's copy of weights and adapters: kept in host memory (level 1), or weights forgotten (2)."""
        ...

    def wake_up(self) -> None:
        """Take the memory again; the cache is empty. Does nothing when awake.

        Raises:
            EngineError: the memory is not there, or the checkpoint cannot be read any more. It sleeps on.
        """
        ...
