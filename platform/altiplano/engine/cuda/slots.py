"""What a running request needs at every step, kept on the GPU from admission to its end.

Row `scratch` (the last) belongs to nobody: rows that only fill a batch up point there, and what they write lands in a page of
its own. A slot's page row is scratch behind the pages that the request holds, so a step too many does no harm.
"""

from collections.abc import Sequence

import torch

from altiplano_kernels.sampling.kernel import RING

Filters = tuple[int, float, float]  # top_k (0: no limit), top_p, min_p
NO_FILTERS: Filters = (0, 1.0, 0.0)
STAGES = 4  # pinned buffers that take turns: the GPU may lag behind the host by this many uploads less one


class SlotTable:
    """Device tensors of `num_slots` + 1 rows, and the pinned host copies that feed them."""

    def __init__(self, num_slots: int, pages_per_slot: int, scratch_page: int, device: str) -> None:
        rows = num_slots + 1
        self.scratch, self.scratch_page, self.width = num_slots, scratch_page, pages_per_slot

        def zeros(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(rows, dtype=dtype, device=device)

        self.tokens, self.positions, self.steps = zeros(torch.int32), zeros(torch.int32), zeros(torch.int32)
        self.temperatures, self.seeds = zeros(torch.float32), zeros(torch.int64)
        self.top_ks, self.top_ps, self.min_ps = zeros(torch.int32), zeros(torch.float32) + 1, zeros(torch.float32)
        self._filtered: set[int] = set()
        self.ring = torch.zeros(rows, RING, dtype=torch.int32, device=device)
        self.tables = torch.full((rows, pages_per_slot), scratch_page, dtype=torch.int32, device=device)
        self.rows = torch.full((rows,), self.scratch, dtype=torch.int32, device=device)
        self._host_tables = torch.full((rows, pages_per_slot), scratch_page, dtype=torch.int32)
        self._pages: list[int] = [0] * rows
        self._dirty = False
        self._stages = [torch.empty_like(self._host_tables).pin_memory() for _ in range(STAGES)]
        self._fences: list[torch.cuda.Event | None] = [None] * STAGES
        self._turn = 0

    def set_pages(self, slot: int, pages: Sequence[int], fresh: bool) -> None:
        """Make `pages` the page row of a slot; only what was added since the last call is touched unless the slot is `fresh`."""
        row = self._host_tables[slot]
        known = 0 if fresh else self._pages[slot]
        if fresh:
            row.fill_(self.scratch_page)
        if fresh or len(pages) > known:
            row[known : len(pages)] = torch.tensor(pages[known:], dtype=torch.int32)
            self._pages[slot] = len(pages)
            self._dirty = True

    def upload_tables(self) -> None:
        """Send the page rows if any has changed; asynchronous."""
        if not self._dirty:
            return
        stage, fence = self._stages[self._turn], self._fences[self._turn]
        if fence is not None:
            fence.synchronize()
        stage.copy_(self._host_tables)
        self.tables.copy_(stage, non_blocking=True)
        fence = torch.cuda.Event()
        fence.record()
        self._fences[self._turn] = fence
        self._turn = (self._turn + 1) % STAGES
        self._dirty = False

    def upload_rows(self, slots: Sequence[int], bucket: int) -> None:
        """Batch row i belongs to slots[i]; rows up to `bucket` are scratch."""
        rows = torch.tensor([*slots, *[self.scratch] * (bucket - len(slots))], dtype=torch.int32).pin_memory()
        self.rows[:bucket].copy_(rows, non_blocking=True)

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
        whole = self._send([slots, tokens, positions, steps, seeds, top_ks], torch.int64)
        real = self._send([temperatures, top_ps, min_ps], torch.float32)
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

    def _send(self, rows: Sequence[Sequence[float]], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(rows, dtype=dtype).pin_memory().to(self.tokens.device, non_blocking=True)
