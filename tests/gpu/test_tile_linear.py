"""Products of 1 to 300 rows on the tensor copy engine against float64: every tiling that is chosen, random ones, and all that becomes of the sums."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from altiplano_kernels.embed_norm.kernel import add_norm_parts
from altiplano_kernels.hopper import processors_of
from altiplano_kernels.sampling.kernel import DrawWorkspace, draw
from altiplano_kernels.swiglu.kernel import swiglu
from altiplano_kernels.tile_linear import kernel as tile
from altiplano_kernels.tile_linear import reference
from altiplano_kernels.tile_linear.kernel import DRAW, GATED, PARTS, TUNED, USUAL, WHOLE, Tiling

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU: wgmma has no other")]

ROWS = (1, 9, 17, 63, 64, 65, 129, 192, 256, 300)
GUARD = 1024  # numbers on each side of an output


def random_tilings(count: int) -> list[tuple[int, Tiling]]:
    """Of each kind in turn, such that accumulators fit into the registers and the ring into shared memory."""
    dice, found = random.Random(0), list[tuple[int, Tiling]]()
    while len(found) < count:
        kind = len(found) % 4
        tiling = Tiling(
            dice.choice((1, 2, 3)), dice.choice((1, 2)), dice.choice((64, 128)), dice.choice((1, 2, 3, 8)) if kind == PARTS else 1,
            dice.randint(2, 8), dice.choice((1, 1, 2)), dice.choice((64, 128)),
        )  # fmt: skip
        accumulators = tiling.resident * tiling.rows * tiling.columns
        if tiling.rows <= 256 and accumulators <= 2**15 and tile.fits(tiling, tiling.columns, tiling.depth * tiling.splits):
            found.append((kind, tiling))
    return found


TABLES = {(kind, tiling) for (kind, _, _), row in TUNED.items() for tiling in row if tiling is not None}
TABLES |= {(kind, tiling) for kind, row in USUAL.items() for tiling in row if tiling is not None}
TILINGS = sorted({*TABLES, *random_tilings(8)})


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """All at once: each takes seconds, and needs no GPU. A draw is held against parts of the same tiling."""
    wanted = {*TILINGS, *((PARTS, tiling) for kind, tiling in TILINGS if kind == DRAW)}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(tile.compile_tiling, [tiling for _, tiling in wanted], [kind for kind, _ in wanted]))


class Guarded:
    """torch.empty whose results lie in the middle of something larger; all of it is poison."""

    def __init__(self) -> None:
        self.whole: list[torch.Tensor] = []

    def empty(self, *shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        sizes = shape[0] if isinstance(shape[0], tuple) else shape
        count = int(torch.Size(sizes).numel())
        poison = float("nan") if dtype.is_floating_point else -7
        self.whole.append(torch.full((count + 2 * GUARD,), poison, dtype=dtype, device=device))
        return self.whole[-1][GUARD:-GUARD].view(sizes)

    def check(self) -> None:
        """Every output is whole, and nothing beside it was written."""
        assert self.whole
        for whole in self.whole:
            poison = whole.isnan() if whole.dtype.is_floating_point else whole == -7
            assert bool(poison[:GUARD].all()) and bool(poison[-GUARD:].all()), "something beside the output was written"
            assert not bool(poison[GUARD:-GUARD].any()), "something of the output was not"


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    given = Guarded()
    monkeypatch.setattr(torch, "empty", given.empty)
    yield given
    given.check()


def poisoned(rows: int, k: int, spread: float = 1.0) -> torch.Tensor:
    """Random bf16 [rows, k], as a part of something larger that is NaN."""
    whole = torch.full((rows + 400, k), float("nan"), dtype=torch.bfloat16, device="cuda")
    whole[64 : 64 + rows] = torch.randn(rows, k, device="cuda") * spread
    return whole[64 : 64 + rows]


def sizes(tiling: Tiling, dice: random.Random) -> tuple[int, int, int]:
    """Rows, n and k: any number of tiles, at most 8 192 deep."""
    unit = tiling.depth * tiling.splits
    k = unit * dice.choice((1, 2, 3, tiling.stages, tiling.stages + 1, 8192 // unit))
    return dice.choice(ROWS), tiling.columns * dice.randint(1, 20), min(k, 8192 // unit * unit)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("kind", "tiling"), [one for one in TILINGS if one[0] != DRAW], ids=str)
def test_products_are_those_of_float64(kind: int, tiling: Tiling, guarded: Guarded) -> None:
    dice = random.Random(str((kind, tiling)))
    torch.manual_seed(dice.randrange(1000))
    for _ in range(4):
        rows, n, k = sizes(tiling, dice)
        x, w = poisoned(rows, k), poisoned(2 * n if kind == GATED else n, k, spread=0.1)
        if kind == WHOLE:
            assert error(tile.linear(x, w, tiling), reference.linear(x, w)) < 3e-3, (rows, n, k)
        elif kind == GATED:
            assert error(tile.swiglu_linear(x, w, tiling), reference.swiglu_linear(x, w)) < 4e-3, (rows, n, k)
        else:
            parts, share = tile.linear_parts(x, w, tiling), k // tiling.splits
            assert parts.shape == (tiling.splits, rows, n) and parts.dtype is torch.float32
            for part in range(tiling.splits):  # each is the sum over a share of k of its own
                of = slice(part * share, (part + 1) * share)
                assert error(parts[part], reference.linear(x[:, of], w[:, of])) < 1e-5, (rows, n, k, part)


@pytest.mark.parametrize("rows", ROWS)
def test_any_number_of_rows(rows: int, guarded: Guarded) -> None:
    """Of one block and of several, whole and cut off."""
    torch.manual_seed(rows)
    x, w = poisoned(rows, 512), poisoned(256, 512, spread=0.1)
    for tiling in sorted({tiling for kind, tiling in TABLES if kind == PARTS and tile.fits(tiling, 256, 512)}):
        assert error(tile.linear_parts(x, w, tiling).sum(0), reference.linear(x, w)) < 1e-5, tiling


class Slots:
    """Settings of more slots than there are rows, and which of them each row draws for."""

    def __init__(self, rows: int, dice: random.Random) -> None:
        count = rows + 5
        self.rows = torch.tensor(dice.sample(range(count), rows), dtype=torch.int32, device="cuda")
        self.temperatures = torch.tensor([dice.choice((0.0, 0.3, 1.0, 2.5)) for _ in range(count)], device="cuda")
        self.seeds = torch.tensor([dice.randrange(-(2**62), 2**62) for _ in range(count)], device="cuda")
        self.steps = torch.tensor([dice.randrange(5000) for _ in range(count)], dtype=torch.int32, device="cuda")

    @property
    def settings(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.rows, self.temperatures, self.seeds, self.steps


def best(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 [rows]: of equals the lowest, as `advance` has it."""
    return ids.long().where(values == values.amax(1, keepdim=True), 1 << 30).amin(1)


def plain_draw(logits: torch.Tensor, slots: Slots) -> torch.Tensor:
    work = DrawWorkspace(len(logits), logits.shape[1], "cuda")
    draw(logits, *slots.settings, work)
    return best(work.values.view(len(logits), -1), work.ids.view(len(logits), -1))


@pytest.mark.parametrize("tiling", [tiling for kind, tiling in TILINGS if kind == DRAW], ids=str)
def test_tokens_are_those_of_a_draw_from_logits(tiling: Tiling, guarded: Guarded) -> None:
    dice = random.Random(str(tiling))
    torch.manual_seed(dice.randrange(1000))
    for _ in range(4):
        rows, n, k = sizes(tiling, dice)
        slots, x, w = Slots(rows, dice), poisoned(rows, k), poisoned(n, k, spread=k**-0.5)
        values, ids = tile.linear_draw(x, w, tiling, *slots.settings)
        assert values.shape == ids.shape == (rows, tile.draw_blocks(rows, n, tiling, processors_of(x.device)))
        found, logits = best(values, ids), tile.linear_parts(x, w, tiling)[0]
        wanted, at = plain_draw(logits, slots), slots.rows.long()
        cold = slots.temperatures[at] == 0
        assert torch.equal(found[cold], wanted[cold]), "the sums are the same to the bit"
        scores = reference.scores(x, w, slots.temperatures[at], slots.seeds[at], slots.steps[at].long())
        # Noise and sums differ in their last digits, so two tokens that are as near as those may change places.
        lost = scores.amax(1) - scores.gather(1, found[:, None])[:, 0]
        assert float(lost.max()) < 1e-3 and int((found != wanted).sum()) <= 1
        assert float((values - scores.gather(1, ids.long())).abs().max()) < 1e-3
        assert bool((ids.sort(1).values.diff(dim=1) > 0).all()), "each block has columns of its own"


@pytest.mark.parametrize("tiling", [tiling for kind, tiling in TILINGS if kind == DRAW], ids=str)
def test_blocks_that_draw_take_turns_until_no_column_is_left(tiling: Tiling, guarded: Guarded) -> None:
    """Whose last turn may be narrow: in each row, cold or hot, another column is far above the others."""
    torch.manual_seed(3)
    rows, k = 67, 2 * tiling.depth
    room = tile.draw_blocks(rows, 1 << 30, tiling, processors_of(torch.device("cuda")))
    for extra in (1, room // 2, int(room * 0.6), room - 1, room):  # tiles of the last turn
        n = (2 * room + extra) * tiling.columns
        slots, x, w = Slots(rows, random.Random(extra)), poisoned(rows, k), poisoned(n, k, spread=0.01)
        edges = {0, n // 2, 2 * room * tiling.columns - 1, 2 * room * tiling.columns, n - 1, *range(n - 40 * 41, n, 41)}
        wins = torch.tensor([*edges, *random.Random(extra).sample(sorted({*range(n)} - edges), rows - len(edges))], device="cuda")
        w[wins] = x
        assert torch.equal(best(*tile.linear_draw(x, w, tiling, *slots.settings)), wins), (extra, n)


@pytest.mark.parametrize("tiling", [tiling for kind, tiling in TILINGS if kind == DRAW], ids=str)
def test_of_equal_tokens_the_lowest_is_drawn(tiling: Tiling) -> None:
    """In one lane, in two lanes of a row, in two blocks, and in two tiles of a block."""
    torch.manual_seed(1)
    k, turn = 2 * tiling.depth, tile.draw_blocks(5, 1 << 30, tiling, processors_of(torch.device("cuda"))) * tiling.columns
    n = 2 * turn
    slots, x, w = Slots(5, random.Random(1)), poisoned(5, k), poisoned(n, k, spread=0.01)
    slots.temperatures.zero_()
    equals = [
        (8, 9),
        (tiling.columns + 3, tiling.columns + 12),
        (5, n - 1),
        (tiling.columns - 1, tiling.columns),
        (20, turn + 20),
    ]
    for row, places in enumerate(equals):
        w[list(places)] = x[row]
    values, ids = tile.linear_draw(x, w, tiling, *slots.settings)
    assert best(values, ids).tolist() == [min(places) for places in equals]


@pytest.mark.parametrize("rows", [17, 64, 130])
def test_in_a_graph_each_kernel_waits_for_what_it_reads(rows: int) -> None:
    """A kernel that reads before the one before has written would show here: each replay has rows of its own.

    Nothing lies between the kernels of a layer, as in a step: what comes after one of ours starts while it still runs.
    """
    torch.manual_seed(rows)
    hidden, wide, heads = 2048, 8192, 3072
    shapes = ((hidden, wide), (2 * wide, hidden), (heads, hidden))
    down, gate_up, qkv = (torch.randn(*shape, device="cuda").bfloat16() * 0.02 for shape in shapes)
    weight, given = torch.ones(hidden, dtype=torch.bfloat16, device="cuda"), poisoned(rows, 2 * wide)
    residual, normed = (torch.zeros(rows, hidden, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    of_parts, of_gates, of_whole = (tile.choose(rows, *w) for w in ((down, PARTS), (gate_up, GATED), (qkv, WHOLE)))
    assert of_parts is not None and of_gates is not None and of_whole is not None

    def layers(early: bool) -> list[torch.Tensor]:
        residual.zero_()
        x = torch.empty(rows, wide, dtype=torch.bfloat16, device="cuda")
        swiglu(given, x, pdl=early)
        found = [x]
        for _ in range(3):
            add_norm_parts(tile.linear_parts(x, down, of_parts, early), residual, weight, normed, 1e-5, pdl=early)
            found.append(tile.linear(normed, qkv, of_whole, early))
            x = tile.swiglu_linear(normed, gate_up, of_gates, early)
            found.append(x)
        return found

    layers(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layers(True)
    for _ in range(5):
        given.copy_(torch.randn(rows, 2 * wide, device="cuda"))
        graph.replay()
        for one, wanted in zip(found, layers(False), strict=True):
            assert torch.equal(one, wanted)
