"""One decode step of a model: the kernels for the number of rows, and the draws that the rows ask for. Capturable."""

import torch

from altiplano.engine.cuda.adapter_pool import Update
from altiplano.engine.cuda.few_rows import FewRows
from altiplano.engine.cuda.model import CudaLlama
from altiplano_kernels.filtered_sampling.kernel import draw_filtered
from altiplano_kernels.sampling.kernel import DrawWorkspace, advance, draw

# Of so many rows logits are not rounded: plain draws beside filtered ones then come from the sums that they come from without them. On an
# H200 that takes a filtered step of 1B 0.1 to 1.5 % longer (1 to 16 us), and would 256 rows 1.7 %.
WIDE_ROWS = 64


class Stepper:
    """Steps of `model` over the slots of its table; `few`: its kernels for few rows, where they fit."""

    def __init__(self, model: CudaLlama, few: FewRows | None, draws: DrawWorkspace) -> None:
        self.model, self.few, self._draws = model, few, draws

    @property
    def most_rows(self) -> int:
        """Rows that `draw_rows` has room for."""
        return int(self._draws.values.numel() // self._draws.parts)

    def step(self, rows: torch.Tensor, filtered: bool = False, update: Update | None = None, fresh: int = 1) -> None:
        """A token for each slot in `rows`: int32 [rows]. `filtered`: a row draws under top-k, top-p or min-p; `update`: of adapters;
        `fresh`: how many rows may belong to one request, at neighbouring positions."""
        if self.few is not None and len(rows) <= self.few.most_rows and update is None:
            if filtered:
                self.draw_rows(rows, self.few.logits(rows, fresh), pdl=True, filtered=True)
            else:
                self.few.step(rows, fresh)
            return
        hidden = self.model.decode_hidden(rows, update, fresh=fresh)
        candidates = None if filtered else self.model.draw(rows, hidden)
        if candidates is None:
            self.draw_rows(rows, self.logits(hidden), pdl=True, filtered=filtered)
        else:
            self._advance(rows, *candidates, candidates[0].shape[1], pdl=True)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, vocab] to draw from, of last hidden states [rows, hidden]: float32 of up to `WIDE_ROWS` rows, else bf16. Capturable.

        In deterministic mode they are bf16 for any number of rows.
        """
        wide = len(hidden) <= WIDE_ROWS and not self.model.deterministic
        return self.model.head(hidden, torch.float32 if wide else torch.bfloat16)

    def draw_rows(self, rows: torch.Tensor, logits: torch.Tensor, pdl: bool, filtered: bool) -> None:
        """Draw from logits: [rows, vocab], and advance the slots in `rows`."""
        slots, draws = self.model.slots, self._draws
        draw(logits, rows, slots.temperatures, slots.seeds, slots.steps, draws, pdl)
        if filtered:
            filters = (slots.top_ks, slots.top_ps, slots.min_ps)
            draw_filtered(logits, rows, slots.temperatures, *filters, slots.seeds, slots.steps, draws, pdl)
        self._advance(rows, draws.values, draws.ids, draws.parts, pdl)

    def _advance(self, rows: torch.Tensor, values: torch.Tensor, ids: torch.Tensor, parts: int, pdl: bool) -> None:
        slots = self.model.slots
        advance(values, ids, parts, rows, slots.tokens, slots.positions, slots.steps, slots.ring, pdl)
