"""What a running request needs at every step, kept on the GPU from admission to its end.

Row `scratch` (the last) belongs to nobody: rows that only fill a batch up point there, and what they write lands in a page of
its own. A slot's page row is scratch behind the pages that the request holds, so a step too many does no harm. Between the
requests' slots and scratch lie `guests`, which belong to the steps that check guesses (see `guesses.py`).
"""

from collections.abc import Sequence

import torch

from altiplano_kernels.sampling.kernel import RING

Filters = tuple[int, float, float]  # top_k (0: no limit), top_p, min_p
NO_FILTERS: Filters = (0, 1.0, 0.0)


class SlotTable:
    """Device tensors of `num_slots` + `guests` + 1 rows."""

    def __init__(self, num_slots: int, pages_per_slot: int, scratch_page: int, device: str, guests: int = 0) -> None:
        rows = num_slots + guests + 1
        self.guests = range(num_slots, num_slots + guests)
        self.scratch, self.scratch_page, self.width = rows - 1, scratch_page, pages_per_slot

        def zeros(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(rows, dtype=dtype, device=device)

        self.tokens, self.positions, self.steps = zeros(torch.int32), zeros(torch.int32), zeros(torch.int32)
        self.temperatures, self.seeds = zeros(torch.float32), zeros(torch.int64)
        self.top_ks, self.top_ps, self.min_ps = zeros(torch.int32), zeros(torch.float32) + 1, zeros(torch.float32)
        self._filtered: set[int] = set()
        self.ring = torch.zeros(rows, RING, dtype=torch.int32, device=device)
        self.tables = torch.full((rows, pages_per_slot), scratch_page, dtype=torch.int32, device=device)
        self.rows = torch.full((rows,), self.scratch, dtype=torch.int32, device=device)
        self._held = [0] * rows  # places of each page row that are not scratch
        self._changes: dict[int, int] = {}  # of the flat tables, not sent yet

    @property
    def columns(self) -> tuple[torch.Tensor, ...]:
        """What `guessing.kernel.spread` copies from a request to its guests, and the ring."""
        filters = (self.top_ks, self.top_ps, self.min_ps)
        return (self.tokens, self.positions, self.steps, self.temperatures, self.seeds, *filters, self.ring)

    def set_pages(self, slot: int, pages: Sequence[int], fresh: bool) -> None:
        """Make `pages` the page row of a slot; only what was added since the last call is touched unless the slot is `fresh`."""
        held = self._held[slot]
        if not fresh and len(pages) <= held:
            return
        first = 0 if fresh else held
        values = [*pages[first:], *[self.scratch_page] * (held - len(pages))]
        start = slot * self.width + first
        self._changes.update(zip(range(start, start + len(values)), values, strict=True))
        self._held[slot] = len(pages)

    def upload_tables(self) -> None:
        """Send what `set_pages` has changed; asynchronous."""
        if not self._changes:
            return
        sent = self.send([list(self._changes), list(self._changes.values())], torch.int64)
        self.tables.view(-1)[sent[0]] = sent[1].int()
        self._changes.clear()

    def longest_first(self, slots: Sequence[int]) -> list[int]:
        """By the pages that they hold: attention over many takes longest, and what the GPU starts last should be short."""
        return sorted(slots, key=self._held.__getitem__, reverse=True)

    def upload_rows(self, slots: Sequence[int], bucket: int) -> None:
        """Batch row i belongs to slots[i]; rows up to `bucket` are scratch."""
        self.assign(self.rows[:bucket], slots)

    def assign(self, target: torch.Tensor, slots: Sequence[int]) -> None:
        """target[i] = slots[i], and scratch for the rest of `target`: int32; asynchronous."""
        numbers = torch.tensor([*slots, *[self.scratch] * (len(target) - len(slots))], dtype=torch.int32)
        target.copy_(numbers.pin_memory(), non_blocking=True)

    def write(
        self,
        slots: Sequence[int],
        tokens: Sequence[int],
        positions: Sequence[int],
        steps: Sequence[int],
        temperatures: Sequence[float],
        seeds: Sequence[int],
        filters: Sequence[Filters] | None = None,
    ) -> None:
        """Set the state of slots: the token that comes next, its position, the number of tokens drawn before, and the sampling.

        A temperature below 1e-5 is greedy; `filters` of a greedy request are not looked at.
        """
        top_ks, top_ps, min_ps = zip(*(filters or [NO_FILTERS] * len(slots)), strict=True)
        whole = self.send([slots, tokens, positions, steps, seeds, top_ks], torch.int64)
        real = self.send([temperatures, top_ps, min_ps], torch.float32)
        at = whole[0]
        self.tokens[at] = whole[1].int()
        self.positions[at] = whole[2].int()
        self.steps[at] = whole[3].int()
        self.seeds[at] = whole[4]
        self.top_ks[at] = whole[5].int()
        self.temperatures[at], self.top_ps[at], self.min_ps[at] = real[0], real[1], real[2]
        self._filtered.difference_update(slots)
        self._filtered.update(slot for slot, wanted in zip(slots, filters or (), strict=False) if wanted != NO_FILTERS)

    def any_filtered(self, slots: Sequence[int]) -> bool:
        """Whether one of these slots draws under top-k, top-p or min-p."""
        return not self._filtered.isdisjoint(slots)

    def send(self, values: Sequence[float] | Sequence[Sequence[float]], dtype: torch.dtype) -> torch.Tensor:
        """Numbers on the device; asynchronous."""
        return torch.tensor(values, dtype=dtype).pin_memory().to(self.tokens.device, non_blocking=True)
