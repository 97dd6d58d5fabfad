"""Rotated queries, and keys and values in their pages, against float64: on a GPU where there is one, else by Triton's interpreter."""

import os
import random

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from altiplano_kernels.kv_write import reference  # noqa: E402
from altiplano_kernels.kv_write.kernel import rope_and_write  # noqa: E402
from altiplano_kernels.rope.reference import cos_sin, inverse_frequencies  # noqa: E402

from .interpreted import patch_rounding  # noqa: E402
from .paged import KINDS, Sizes, poisoned, random_sizes  # noqa: E402

ROUNDED = 2**-8  # half a step of bf16
HALF = {torch.int8: 0.501, torch.float8_e4m3fn: 2**-4}  # a step of what a code stands for: of the scale, and of the number itself
SLOTS, WIDTH = 4, 3


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_rounding(monkeypatch)


class Batch:
    """Tokens of several slots at random places, some at the edges of their pages, in rows that are part of something wider."""

    def __init__(self, sizes: Sizes, kind: torch.dtype, dice: random.Random, tokens: int = 7) -> None:
        self.sizes, self.kind = sizes, kind
        self.cache, self.scales = poisoned(SLOTS * WIDTH + 2, sizes, kind, DEVICE)
        order = dice.sample(range(SLOTS * WIDTH + 2), SLOTS * WIDTH)
        tables = torch.tensor(order, dtype=torch.int32).view(SLOTS, WIDTH)
        edges = [(slot, at) for slot in range(SLOTS) for at in (0, sizes.page - 1, sizes.page, WIDTH * sizes.page - 1)]
        rest = [(slot, at) for slot in range(SLOTS) for at in range(WIDTH * sizes.page) if (slot, at) not in edges]
        self.places = dice.sample(edges, tokens // 2) + dice.sample(rest, tokens - tokens // 2)
        slots, positions = (torch.tensor(column, dtype=torch.int32) for column in zip(*self.places, strict=True))
        angles = torch.arange(WIDTH * sizes.page)
        self.cos_sin = torch.cat(cos_sin(angles, inverse_frequencies(sizes.dim, 500000.0, None)), -1).to(DEVICE)
        self.slots, self.positions, self.tables = slots.to(DEVICE), positions.to(DEVICE), tables.to(DEVICE)
        width = (sizes.heads + 2 * sizes.kv_heads) * sizes.dim
        self.qkv = torch.randn(tokens, width + 8).bfloat16().to(DEVICE)[:, :width]

    def write(self) -> None:
        rope_and_write(self.qkv, self.positions, self.slots, self.tables, self.cos_sin, self.cache, self.scales, self.sizes.heads)

    def wanted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float64: the rows afterwards, and a cache that is NaN where nothing is written."""
        rows, table = self.qkv.double().cpu().contiguous(), self.tables.cpu()
        cache = torch.full(self.cache.shape, float("nan"), dtype=torch.float64)
        turned = self.cos_sin.double().cpu()
        reference.rope_and_write(rows, self.positions.cpu(), self.slots.cpu(), table, turned, cache, None, self.sizes.heads)
        return rows, cache


def stood_for(batch: Batch) -> torch.Tensor:
    """float64: the numbers in the cache."""
    found = batch.cache.cpu().double()
    return found if batch.scales is None else found * batch.scales.cpu().double()[..., None]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tokens_are_where_their_tables_say_and_nothing_else_is_touched(kind: torch.dtype, seed: int) -> None:
    dice = random.Random(seed)
    torch.manual_seed(seed)
    batch = Batch(random_sizes(dice), kind, dice)
    before = [None if tensor is None else tensor.clone() for tensor in (batch.cache, batch.scales)]
    rows, cache = batch.wanted()
    query, raw = batch.sizes.heads * batch.sizes.dim, batch.qkv.clone()
    batch.write()
    assert bool(((batch.qkv.cpu().double() - rows)[:, :query].abs() <= ROUNDED * rows[:, :query].abs() + 1e-6).all())
    assert batch.qkv[:, query:].equal(raw[:, query:]), "keys and values stay as they were in the rows"
    written = cache.isfinite()
    assert int(written.sum()) == len(batch.places) * 2 * batch.sizes.kv_heads * batch.sizes.dim
    off, exact = (stood_for(batch) - cache)[written].abs(), cache[written].abs()
    if batch.scales is None:
        assert bool((off <= ROUNDED * exact + 1e-6).all())
    else:
        scale = batch.scales.cpu().double()[..., None].expand(cache.shape)[written]
        bound = HALF[kind] * scale if kind is torch.int8 else HALF[kind] * exact + 2**-10 * scale
        assert bool((off <= bound).all())
        largest = cache.abs().amax(-1)[written[..., 0]] / reference.LARGEST[kind]
        assert batch.scales.cpu()[written[..., 0]].double() == pytest.approx(largest, rel=2**-10)
    for tensor, old in zip((batch.cache, batch.scales), before, strict=True):
        if tensor is not None and old is not None:
            untouched = ~written if tensor is batch.cache else ~written[..., 0]
            as_bits = torch.int16 if tensor.dtype in (torch.bfloat16, torch.float16) else torch.int8
            assert tensor.cpu().view(as_bits)[untouched].equal(old.cpu().view(as_bits)[untouched])


@pytest.mark.parametrize("kind", KINDS[1:], ids=str)
def test_a_small_vector_is_not_lost_beside_large_ones(kind: torch.dtype) -> None:
    """Each token and head has a scale of its own."""
    dice = random.Random(1)
    torch.manual_seed(1)
    batch = Batch(Sizes(2, 2, 16, 16), kind, dice, tokens=4)
    batch.qkv[1] *= 1e-3
    batch.qkv[2] *= 1e3
    _, cache = batch.wanted()
    batch.write()
    written = cache.isfinite()
    vectors = (stood_for(batch) - cache)[written].view(-1, 16).norm(dim=1) / cache[written].view(-1, 16).norm(dim=1)
    assert float(vectors.max()) < {torch.int8: 0.01, torch.float8_e4m3fn: 0.06}[kind]


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-6])
@pytest.mark.parametrize("kind", KINDS[1:], ids=str)
def test_a_vector_of_next_to_nothing_becomes_zeros(kind: torch.dtype, size: float) -> None:
    """Its scale is too small for float16."""
    batch = Batch(Sizes(2, 2, 16, 16), kind, random.Random(2), tokens=3)
    batch.qkv.fill_(size)
    _, cache = batch.wanted()
    batch.write()
    found = stood_for(batch)[cache.isfinite()]
    assert bool(found.isfinite().all()) and float(found.abs().max()) <= 2 * size + 1e-6
