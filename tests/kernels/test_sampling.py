"""Draws and the advance of slots against the reference: on a GPU where there is one, else by Triton's interpreter."""

import os
import random

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from altiplano_kernels.sampling.kernel import BLOCK, CHUNK, RING, DrawWorkspace, advance, draw  # noqa: E402
from altiplano_kernels.sampling.reference import greedy, sample  # noqa: E402

ROWS, SLOTS = 5, 9


class Slots:
    """Settings of slots, of which some rows draw, in any order; the last is scratch."""

    def __init__(self, dice: random.Random) -> None:
        def ints(low: int, high: int, kind: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.tensor([dice.randrange(low, high) for _ in range(SLOTS)], dtype=kind, device=DEVICE)

        self.rows = torch.tensor(dice.sample(range(SLOTS - 1), ROWS), dtype=torch.int32, device=DEVICE)
        self.temperatures = torch.tensor([dice.choice((0.0, 0.3, 1.0, 2.5)) for _ in range(SLOTS)], device=DEVICE)
        self.seeds, self.steps = ints(-(2**62), 2**62, torch.int64), ints(0, 3 * RING)
        self.tokens, self.positions = ints(0, 100), ints(0, 1000)
        self.ring = torch.full((SLOTS, RING), -1, dtype=torch.int32, device=DEVICE)

    def draw(self, logits: torch.Tensor, work: DrawWorkspace) -> None:
        draw(logits, self.rows, self.temperatures, self.seeds, self.steps, work)

    def wanted(self, logits: torch.Tensor) -> torch.Tensor:
        """int64 [rows], of the reference."""
        at, wide = self.rows.long().cpu(), logits.float().cpu()
        heat, seeds, steps = (column.cpu()[at] for column in (self.temperatures, self.seeds, self.steps))
        nothing = torch.zeros(ROWS)
        drawn = sample(wide, heat.clamp(min=1e-5), nothing.long(), nothing + 1, nothing, seeds, steps.long())
        return torch.where(heat > 0, drawn, greedy(wide))


def best(work: DrawWorkspace) -> torch.Tensor:
    """The lowest of the best candidates, int64 [rows]."""
    values, ids = work.values.view(ROWS, -1).cpu(), work.ids.view(ROWS, -1).cpu().long()
    return ids.where(values == values.amax(1, keepdim=True), ids.max() + 1).amin(1)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", [1, 700, BLOCK, CHUNK - 1, CHUNK + 1, 2 * CHUNK + 77])
def test_the_token_is_the_references(vocab: int, kind: torch.dtype) -> None:
    dice = random.Random(vocab)
    torch.manual_seed(vocab)
    slots, work = Slots(dice), DrawWorkspace(ROWS, vocab, DEVICE)
    # A part of something wider, whose other columns would always be drawn.
    logits = torch.full((ROWS, vocab + 8), 1e4, dtype=kind, device=DEVICE)[:, :vocab]
    logits.copy_(torch.randn(ROWS, vocab) * dice.choice((0.1, 3.0)))
    slots.draw(logits, work)
    assert torch.equal(best(work), slots.wanted(logits))


def test_of_equals_the_lowest_is_drawn_and_of_nothing_the_first() -> None:
    slots, vocab = Slots(random.Random(1)), CHUNK + 100
    slots.temperatures.zero_()
    logits = torch.zeros(ROWS, vocab, device=DEVICE)
    for row, places in enumerate([(7, 3000), (CHUNK - 1, CHUNK), (CHUNK + 5, CHUNK + 50), (0, vocab - 1)]):
        logits[row, list(places)] = 5.0
    logits[4] = float("-inf")
    work = DrawWorkspace(ROWS, vocab, DEVICE)
    slots.draw(logits, work)
    assert best(work).tolist() == [7, CHUNK - 1, CHUNK + 5, 0, 0]


def test_a_row_draws_the_same_in_any_company_and_in_any_slot() -> None:
    torch.manual_seed(2)
    slots = Slots(random.Random(2))
    slots.temperatures.fill_(1.0)
    logits = torch.randn(1, 500).expand(ROWS, 500).to(DEVICE)
    work = DrawWorkspace(ROWS, 500, DEVICE)
    slots.seeds.fill_(2**40 + 9)
    slots.steps.fill_(17)
    slots.draw(logits, work)
    assert len(set(best(work).tolist())) == 1
    slots.seeds.copy_(torch.arange(SLOTS))
    slots.draw(logits, work)
    assert len(set(best(work).tolist())) > 1


@pytest.mark.parametrize("parts", [1, 3, 16])
def test_the_best_candidate_becomes_the_slots_last_token(parts: int) -> None:
    dice = random.Random(parts)
    torch.manual_seed(parts)
    slots = Slots(dice)
    slots.rows[1] = SLOTS - 1  # a row that only fills the batch
    values, ids = torch.randn(ROWS, parts), torch.stack([torch.randperm(1000)[:parts] for _ in range(ROWS)])
    if parts > 1:
        values[0] = 2.0  # equals
    wanted = ids.where(values == values.amax(1, keepdim=True), 1 << 20).amin(1).tolist()
    before = {name: getattr(slots, name).clone() for name in ("tokens", "positions", "steps", "ring")}
    flat = values.flatten().to(DEVICE), ids.flatten().int().to(DEVICE)
    advance(*flat, parts, slots.rows, slots.tokens, slots.positions, slots.steps, slots.ring)
    for row, slot in enumerate(slots.rows.tolist()):
        if slot != SLOTS - 1:
            before["ring"][slot, int(before["steps"][slot]) % RING] = before["tokens"][slot] = wanted[row]
            before["positions"][slot] += 1
            before["steps"][slot] += 1
    assert all(torch.equal(getattr(slots, name), column) for name, column in before.items())
