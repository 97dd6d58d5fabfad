"""Draws over a vocabulary, with and without filters, and the guesses of speculative decoding. None of them knows the model.

Logits are peaked as those of trained models are: of random ones top-p would keep nearly everything.
"""

from collections.abc import Callable, Iterator

import torch

from altiplano_kernels.filtered_sampling.kernel import draw_filtered
from altiplano_kernels.guessing import kernel as guess
from altiplano_kernels.sampling import kernel as plain
from kernel_benches.case import Case, Launch, Model, each, rows_of

PEAKED, FLOPS = 4.0, 6  # of a draw with noise, per logit
GUESSES, PAGES, SPARE = 4, 64, 512  # SPARE: tokens that requests may move on by while they are timed
FILTERS = {"top-p 0.9": (0, 0.9, 0.0), "top-k 50": (50, 1.0, 0.0), "min-p 0.05": (0, 1.0, 0.05)}


class Rows:
    """Slots and settings of `rows` requests."""

    def __init__(self, rows: int, temperature: float, device: str) -> None:
        self.slots, self.steps = (torch.arange(rows, dtype=torch.int32, device=device) for _ in range(2))
        self.seeds, self.temperatures = torch.arange(rows, device=device), torch.full((rows,), temperature, device=device)

    def draw(self, logits: torch.Tensor, work: plain.DrawWorkspace) -> None:
        plain.draw(logits, self.slots, self.temperatures, self.seeds, self.steps, work, pdl=True)


def peaked(rows: int, vocab: int, device: str, turns: int) -> list[torch.Tensor]:
    return [torch.randn(rows, vocab, device=device, dtype=torch.bfloat16) * PEAKED for _ in range(turns)]


def sampling(model: Model) -> Iterator[Case]:
    for rows in (1, *model.decodes):
        yield draw_case(model, rows, 0.0)
        yield draw_case(model, rows, 0.7)
    yield advance_case(model, model.decodes[-1])


def draw_case(model: Model, rows: int, temperature: float) -> Case:
    def prepare(device: str, turns: int) -> list[Launch]:
        requests, work = Rows(rows, temperature, device), plain.DrawWorkspace(rows, model.vocab, device)
        return each(lambda logits: requests.draw(logits, work), peaked(rows, model.vocab, device, turns))

    words = f"{'temperature 0.7' if temperature else 'greedy'}, {rows_of(rows)}"
    return Case("sampling", "any", words, 2 * rows * model.vocab, (FLOPS if temperature else 1) * rows * model.vocab, prepare)


def advance_case(model: Model, rows: int) -> Case:
    parts = -(-model.vocab // plain.CHUNK)

    def prepare(device: str, turns: int) -> list[Launch]:
        slots, tokens, positions, steps = (torch.arange(rows + 1, dtype=torch.int32, device=device) for _ in range(4))
        ring = torch.zeros(rows + 1, plain.RING, dtype=torch.int32, device=device)
        values, ids = torch.randn(rows * parts, device=device), torch.arange(rows * parts, dtype=torch.int32, device=device)
        candidates = [(values.clone(), ids) for _ in range(turns)]
        return each(lambda c: plain.advance(*c, parts, slots[:rows], tokens, positions, steps, ring, pdl=True), candidates)

    # Slot, position and step are read; token, its place in the ring, position and step are written.
    return Case("sampling", "any", f"advance, {rows_of(rows)}", rows * (8 * parts + 28), rows * parts, prepare)


def filtered_sampling(model: Model) -> Iterator[Case]:
    """Together with the plain draw before them, whose token they let stand or replace: both read all logits."""
    for words, filters in FILTERS.items():
        for rows in (1, *model.decodes):
            yield filter_case(model, rows, words, filters)


def filter_case(model: Model, rows: int, words: str, filters: tuple[int, float, float]) -> Case:
    def prepare(device: str, turns: int) -> list[Launch]:
        requests, work = Rows(rows, 0.7, device), plain.DrawWorkspace(rows, model.vocab, device)
        top_k, top_p, min_p = filters
        settings = (
            torch.full((rows,), top_k, dtype=torch.int32, device=device),
            torch.full((rows,), top_p, device=device),
            torch.full((rows,), min_p, device=device),
        )

        def both(logits: torch.Tensor) -> None:
            requests.draw(logits, work)
            draw_filtered(
                logits, requests.slots, requests.temperatures, *settings, requests.seeds, requests.steps, work, pdl=True
            )

        return each(both, peaked(rows, model.vocab, device, turns))

    size = rows * model.vocab
    return Case("filtered_sampling", "any", f"draw and {words}, {rows_of(rows)}", 4 * size, (FLOPS + 3) * size, prepare)


def guessing(model: Model) -> Iterator[Case]:
    for rows in (8, model.decodes[0]):
        for name, (moved, launch) in guess_launches(model.contexts[1]).items():
            yield guess_case(name, rows, model.contexts[1], rows * moved, launch)


Guess = Callable[["Guesses"], object]


class Guesses:
    """Requests with a text of random words, and the rows that check four guesses of each."""

    def __init__(self, requests: int, context: int, device: str) -> None:
        count = requests * (GUESSES + 2) + 1  # slots: requests, their rows, and scratch

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        self.parents, self.first = torch.arange(requests, dtype=torch.int32, device=device), requests
        self.tokens, self.steps, self.guessed, self.top_ks = (zeros(count) for _ in range(4))
        self.positions = zeros(count) + context - 1
        self.temperatures, self.top_ps, self.min_ps = (torch.ones(count, device=device) for _ in range(3))
        self.seeds = zeros(count).long()
        self.ring, self.tables, self.guesses = zeros(count, plain.RING), zeros(count, PAGES), zeros(requests, guess.MOST)
        self.history = torch.randint(1000, (count, context + SPARE), dtype=torch.int32, device=device)

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        filters = (self.top_ks, self.top_ps, self.min_ps)
        return (self.tokens, self.positions, self.steps, self.temperatures, self.seeds, *filters, self.ring)


def guess_launches(context: int) -> dict[str, tuple[int, Guess]]:
    """Bytes per request, and the launch."""
    checks, settings = GUESSES + 1, 7 * 4 + 8  # numbers of a row, and its seed
    return {
        "look_up": (
            4 * context + 4 * GUESSES,
            lambda g: guess.look_up(g.parents, g.positions, g.history, g.guesses, GUESSES, pdl=True),
        ),
        "spread": (
            settings * (1 + checks) + 4 * PAGES * (1 + checks) + 4 * GUESSES,
            lambda g: guess.spread(g.parents, g.guesses, None, g.state, g.history, g.tables, g.first, GUESSES, pdl=True),
        ),
        "accept": (
            4 * (3 * checks + GUESSES + 8),
            lambda g: guess.accept(
                g.parents, g.guesses, g.tokens, g.positions, g.steps, g.ring, g.history, g.guessed, g.first, GUESSES, pdl=True
            ),
        ),
        "note": (16, lambda g: guess.note(g.parents, g.tokens, g.positions, g.history, pdl=True)),
    }


def guess_case(name: str, rows: int, context: int, moved: int, launch: Guess) -> Case:
    def prepare(device: str, turns: int) -> list[Launch]:
        return each(launch, (Guesses(rows, context, device) for _ in range(turns)))

    words = f"{name}, {rows} requests" + (f" of {context} tokens" if name == "look_up" else "")
    return Case("guessing", "any", words, moved, 0, prepare)
