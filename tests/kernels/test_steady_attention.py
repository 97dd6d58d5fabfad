"""Attention that is the same in any company: on a GPU where there is one, else by Triton's interpreter."""

import os
import random

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from altiplano_kernels.prefill_attention.kernel import list_tiles  # noqa: E402
from altiplano_kernels.steady_attention import kernel as steady  # noqa: E402
from altiplano_kernels.steady_attention.kernel import Workspace  # noqa: E402

from .interpreted import patch_rounding  # noqa: E402
from .paged import BOUND, KINDS, QUERY, Pages, Sizes, random_lengths, random_sizes  # noqa: E402


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_rounding(monkeypatch)
    if DEVICE == "cpu":  # several parts, and tiles of queries, of short sequences
        for name, value in {"PART": 64, "TILE": 16, "ROWS": 32}.items():
            monkeypatch.setattr(steady, name, value)


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """To the bit; but products of the interpreter are numpy's, whose sums depend on a row's place in its tile."""
    if DEVICE == "cuda":
        return torch.equal(found, wanted)
    return bool(found.isfinite().all()) and float((found - wanted).double().norm() / wanted.double().norm()) < 1e-3


class Sequences:
    """Sequences of random lengths in pages, and a query for each of their tokens: poisoned where no kernel may look."""

    def __init__(self, kind: torch.dtype, seed: int, sizes: Sizes | None = None) -> None:
        self.dice = random.Random(seed)
        torch.manual_seed(seed)
        self.sizes = sizes or random_sizes(self.dice)
        lengths = [*random_lengths(self.dice, self.sizes.page, 2), steady.PART, 2 * steady.PART + 13]
        self.pages = Pages(self.sizes, lengths, kind, self.dice, DEVICE)
        self.lengths, self.width = self.pages.lengths, self.sizes.heads * self.sizes.dim
        self.queries = [torch.randn(n, self.width).bfloat16().to(QUERY).to(DEVICE) for n in self.lengths]

    def chunks(self, chunks: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """What becomes of the tokens of each (sequence, first token, number of tokens), in one launch."""
        total, first, flat = sum(count for _, _, count in chunks), 0, list[tuple[int, int, int, int]]()
        query, out = (
            torch.full((total, self.width + 8), float("nan"), dtype=kind, device=DEVICE)[:, : self.width]
            for kind in (QUERY, torch.bfloat16)
        )
        for slot, start, count in chunks:
            query[first : first + count] = self.queries[slot][start : start + count]
            flat.append((first, count, start, slot))
            first += count
        tiles = torch.tensor(list_tiles(flat), dtype=torch.int32, device=DEVICE)
        steady.chunks(query, self.pages.cache, self.pages.scales, self.pages.tables, tiles, out, self.sizes.heads)
        return list(out.split([count for _, _, count in chunks]))

    def decode(self, slots: list[int], work: Workspace) -> torch.Tensor:
        """What becomes of the last token of each of these sequences."""
        query = torch.stack([self.queries[slot][-1] for slot in slots])
        out = torch.full((len(slots), self.width + 8), float("nan"), dtype=torch.bfloat16, device=DEVICE)[:, : self.width]
        at, rows = (
            torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([self.lengths[slot] - 1 for slot in slots], slots)
        )
        pages = self.pages
        return steady.decode(query, pages.cache, pages.scales, pages.tables, rows, at, out, work, self.sizes.heads)

    def workspace(self) -> Workspace:
        return Workspace(self.sizes.group, self.sizes.dim, max(self.lengths), DEVICE)

    def error(self, found: torch.Tensor, slot: int) -> float:
        """Of all tokens of a sequence."""
        return self.pages.error(self.queries[slot], found, slot, 0)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_token_is_the_same_in_any_chunk_and_in_any_step(kind: torch.dtype, seed: int) -> None:
    given = Sequences(kind, seed)
    whole = given.chunks([(slot, 0, n) for slot, n in enumerate(given.lengths)])
    assert max(given.error(found, slot) for slot, found in enumerate(whole)) < BOUND, given.sizes
    longest, edge = len(given.lengths) - 1, given.dice.randrange(1, steady.PART)
    for start, count in ((0, edge), (edge, 1), (edge, given.lengths[longest] - edge)):
        beside = (0, 0, given.lengths[0])
        assert same(given.chunks([beside, (longest, start, count)])[1], whole[longest][start : start + count]), start
    work = given.workspace()
    for slots in ([longest], [longest, 0, 2], [1, longest]):  # shared by other numbers of programs
        for _ in range(2):  # whoever comes last adds the parts up, the second time too
            assert same(given.decode(slots, work), torch.stack([whole[slot][-1] for slot in slots])), slots


def test_programs_share_a_row_while_there_are_processors_left() -> None:
    work = Workspace(4, 16, 9 * steady.PART, DEVICE)
    assert [work.workers(groups) for groups in (1, 8, 64, 66, 67, 132, 133, 4096)] == [8, 8, 4, 4, 2, 2, 1, 1]
    assert Workspace(4, 16, steady.PART, DEVICE).workers(1) == 1, "a part has one program"
    assert len(work.counters) >= max(groups for groups in range(1, 300) if work.workers(groups) > 1)


def test_small_programs_are_for_what_they_were_seen_to_change_no_bit_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of bf16 on a Hopper GPU."""
    for hopper in (False, True):
        monkeypatch.setattr(steady, "runs_on", lambda _, hopper=hopper: hopper)
        for kind in KINDS:
            for group, dim, workers in ((4, 64, 1), (4, 64, 8), (3, 128, 1)):
                rows, _ = steady.choose_shape(group, torch.empty(1, 2, 1, 16, dim, dtype=kind), workers)
                assert rows == (16 if hopper and kind is torch.bfloat16 else steady.ROWS) >= group
    wide = torch.empty(1, 2, 1, 16, 64, dtype=torch.bfloat16)
    assert steady.choose_shape(20, wide, 1)[0] == steady.ROWS, "a group has a row for each of its heads"


def test_rows_of_many_programs_need_no_parts_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Sequences(torch.bfloat16, 5)
    work = given.workspace()
    slots = list(range(len(given.lengths)))
    shared = given.decode(slots, work)
    assert work.workers(len(slots) * given.sizes.kv_heads) > 1
    monkeypatch.setattr(steady, "FEW", 0)
    work.parts.fill_(float("nan"))
    assert torch.equal(given.decode(slots, work), shared)
    assert bool(work.parts.isnan().all())
