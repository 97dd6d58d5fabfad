"""Speculative decoding inside CUDA graphs: guesses are made, checked and accepted on the GPU, and the host learns of it afterwards.

    parents ─► guesses (own text, or a draft model's steps) ─► guests ─► one decode step ─► accepted tokens ─► parents

Guests are slots that a request lends its state to: one for its last token, and one for each guess. A draft model has two guests a
request, for the last two tokens: so it catches up by itself with a guess that was right and that it never computed. It has a cache
of its own under the page numbers of the engine's.
"""

from collections.abc import Callable, Sequence

import torch

from altiplano.engine.cuda.graphs import Kind
from altiplano.engine.cuda.slots import SlotTable
from altiplano.engine.cuda.stepper import Stepper
from altiplano_kernels.few_rows.kernel import MOST_ROWS
from altiplano_kernels.guessing.kernel import MOST, accept, look_up, note, spread
from altiplano_kernels.prefill_attention.kernel import list_tiles

MOST_REQUESTS = MOST_ROWS // 2
GUESTS = MOST_ROWS + 2 * MOST_REQUESTS
BUCKETS = (1, 2, 4, 8)  # requests


class Guesses:
    """Guesses for up to `MOST_REQUESTS` requests, at most `most` each, by prompt lookup or by a `draft` model whose steps use `slots` too."""

    def __init__(self, slots: SlotTable, most: int, width: int, draft: Stepper | None) -> None:
        device = slots.tokens.device
        self._slots, self._most, self._draft = slots, most, draft
        self.history = torch.zeros(len(slots.tokens), width, dtype=torch.int32, device=device)
        self.guessed = torch.zeros(len(slots.tokens), dtype=torch.int32, device=device)  # guesses made, of each slot
        self._parents = torch.full((MOST_REQUESTS,), slots.scratch, dtype=torch.int32, device=device)
        self._guesses = torch.full((MOST_REQUESTS, MOST), -1, dtype=torch.int32, device=device)
        numbers = torch.tensor(list(slots.guests), dtype=torch.int32, device=device)
        self._checkers, self._pairs = numbers[:MOST_ROWS], numbers[MOST_ROWS:]
        self._drafters = self._pairs[1::2].contiguous()

    @property
    def drafts(self) -> bool:
        """Whether a model guesses: it must `catch_up` with what it has not computed."""
        return self._draft is not None

    @staticmethod
    def bucket_of(requests: int) -> int:
        return next(bucket for bucket in BUCKETS if bucket >= requests)

    def per_request(self, requests: int) -> int:
        """Guesses that each of so many requests gets in a step; 0 if there are too many of them."""
        return min(self._most, MOST_ROWS // self.bucket_of(requests) - 1) if 0 < requests <= MOST_REQUESTS else 0

    def kinds(self, most_requests: int, adapted: Sequence[bool]) -> list[tuple[int, Kind]]:
        """Buckets and kinds of all steps with guesses for up to `most_requests`: 16 at most."""
        buckets = [bucket for bucket in BUCKETS if bucket <= self.bucket_of(min(most_requests, MOST_REQUESTS))]
        return [
            (bucket, Kind(filtered, one, self.per_request(bucket)))
            for one in adapted
            for filtered in (False, True)
            for bucket in buckets
        ]

    def set_parents(self, slots: Sequence[int], bucket: int) -> None:
        """The requests of the next steps; the rest of the bucket is scratch. Asynchronous."""
        self._slots.assign(self._parents[:bucket], slots)

    def remember(self, slot: int, tokens: Sequence[int]) -> None:
        """Write the known tokens of a slot, from the first on; `note` and `step` add what is drawn. Asynchronous."""
        self.history[slot, : len(tokens)] = self._slots.send(tokens, torch.int32)

    def note(self, rows: torch.Tensor, pdl: bool) -> None:
        """Keep what a plain step has drawn for the slots in `rows`. Capturable."""
        note(rows, self._slots.tokens, self._slots.positions, self.history, pdl)

    def catch_up(self, slot: int, tokens: Sequence[int], first: int) -> None:
        """Let the draft model compute `tokens` of a slot, at positions from `first` on, into the slot's pages. Asynchronous."""
        assert self._draft is not None
        n = len(tokens)
        tiles = list_tiles([(0, n, first, slot)])
        flat = self._slots.send([*tokens, *range(first, first + n), *[slot] * n, *tiles], torch.int32)
        self._draft.model.prefill_hidden(flat[:n], flat[n : 2 * n], flat[2 * n : 3 * n], flat[3 * n :])

    def rows(self, bucket: int, k: int) -> torch.Tensor:
        """The guests that check the guesses of a step: those of the first request, then those of the second, …"""
        return self._checkers[: bucket * (k + 1)]

    def step(self, bucket: int, k: int, check: Callable[[torch.Tensor], None], filtered: bool = False) -> None:
        """Guess, `check` the guesses with a decode step of `rows(bucket, k)`, and move the requests on. Capturable.

        `filtered`: a request draws under top-k, top-p or min-p; a draft model should then draw as it does.
        """
        slots, parents = self._slots, self._parents[:bucket]
        drafted = self._guess(bucket, k, filtered)
        rows = self.rows(bucket, k)
        spread(parents, self._guesses, drafted, slots.columns, self.history, slots.tables, slots.guests[0], k, pdl=True)
        check(rows)
        accept(
            parents, self._guesses, slots.tokens, slots.positions, slots.steps, slots.ring, self.history, self.guessed, slots.guests[0], k,
            pdl=True,
        )  # fmt: skip

    def _guess(self, bucket: int, k: int, filtered: bool) -> torch.Tensor | None:
        """Leaves guesses in `_guesses`, or in the rings of the slots that it returns."""
        slots, parents = self._slots, self._parents[:bucket]
        if self._draft is None:
            look_up(parents, slots.positions, self.history, self._guesses, k, pdl=True)
            return None
        first = slots.guests[MOST_ROWS]
        spread(parents, self._guesses, None, slots.columns, self.history, slots.tables, first, 0, behind=1, pdl=True)
        self._draft.step(self._pairs[: 2 * bucket], filtered, fresh=2)
        drafters = self._drafters[:bucket]
        for _ in range(k - 1):
            self._draft.step(drafters, filtered)
        return drafters
