"""A model whose steps take the time that a formula says, on a clock that only it moves."""

from collections.abc import Callable
from pathlib import Path

from altiplano.engine.plan import StepPlan
from altiplano.engine.runner import Drawn

Law = Callable[[int, int], float]  # (prompt tokens, decode rows) to seconds


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class VirtualRunner:
    """Draws token 5 for everybody; every guess is right if `right(request, position)` says so, which by default none is."""

    vocab_size, eos_token_ids, max_position_embeddings = 100, (1,), 1 << 20

    def __init__(self, clock: Clock, law: Law, right: Callable[[StepPlan], bool] = lambda _: False) -> None:
        self._clock, self._law, self._right = clock, law, right
        self.plans: list[StepPlan] = []

    def execute(self, plan: StepPlan) -> list[Drawn]:
        decodes = [chunk for chunk in plan.chunks if len(chunk.tokens) - chunk.num_guesses == 1]
        rows = sum(len(chunk.tokens) for chunk in decodes)
        self.plans.append(plan)
        self._clock.now += self._law(plan.num_tokens - rows, rows)
        right = self._right(plan)
        return [
            Drawn(5 if chunk.sample else None, accepted=(Drawn(5),) * (chunk.num_guesses if right else 0))
            for chunk in plan.chunks
        ]

    def load_adapter(self, name: str, directory: Path) -> None:
        raise NotImplementedError

    def unload_adapter(self, name: str) -> None:
        raise NotImplementedError
