"""The batched kernels against float64 over random shapes: ragged lengths, page edges, poisoned free pages.

Runs on a GPU, or slowly on the CPU under TRITON_INTERPRET=1.
"""

import os
import random

import pytest
import torch

pytest.importorskip("triton")
from altiplano_kernels.embed_norm.kernel import add_norm, embed_rows
from altiplano_kernels.kv_write.kernel import rope_and_write
from altiplano_kernels.paged_attention.kernel import DecodeWorkspace, choose_splits, decode
from altiplano_kernels.prefill_attention.kernel import list_tiles, prefill_triton
from altiplano_kernels.rms_norm.reference import rms_norm
from altiplano_kernels.rope.reference import cos_sin as tables_of
from altiplano_kernels.rope.reference import inverse_frequencies
from altiplano_kernels.sampling.kernel import RING, DrawWorkspace, advance, draw
from altiplano_kernels.sampling.reference import gumbel
from altiplano_kernels.swiglu.kernel import swiglu
from altiplano_kernels.swiglu.reference import swiglu as swiglu_reference
from altiplano_kernels.w8a8.reference import LARGEST

from ..kernels.paged import chosen_for_many_rows

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"),
]
PAGE = 32
PRODUCTS = torch.bfloat16 if GPU else torch.float32  # the interpreter has no bf16 product
SHAPES = [(32, 8, 64), (24, 8, 128), (4, 2, 32)] if GPU else [(6, 2, 32)]
CACHES = [torch.bfloat16, torch.int8, torch.float8_e4m3fn] if GPU else [torch.bfloat16, torch.int8]
CHOSEN = sorted({(shape if GPU else SHAPES[0], splits, tiling) for shape, splits, tiling in chosen_for_many_rows()})


class Paged:
    """A random paged cache of ragged sequences, written by the kernel under test, beside dense float32 keys and values."""

    def __init__(self, heads: int, kv_heads: int, dim: int, lengths: list[int], kind: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.heads, self.kv_heads, self.dim, self.lengths = heads, kv_heads, dim, lengths
        width = max(-(-n // PAGE) for n in lengths)
        blocks = sum(-(-n // PAGE) for n in lengths) + 3
        order = random.Random(seed).sample(range(blocks), blocks)
        self.cache = torch.empty(blocks, 2, kv_heads, PAGE, dim, dtype=kind, device=DEVICE)
        self.scales = None
        if kind in LARGEST:
            self.cache.view(torch.int8).fill_(0x7F)  # NaN in e4m3
            self.scales = torch.full((blocks, 2, kv_heads, PAGE), float("nan"), dtype=torch.float16, device=DEVICE)
        else:
            self.cache.fill_(float("nan"))
        tables = torch.zeros(len(lengths), width, dtype=torch.int32)
        for row, n in enumerate(lengths):
            for at in range(-(-n // PAGE)):
                tables[row, at] = order.pop()
        self.tables = tables.to(DEVICE)
        tokens = sum(lengths)
        self.qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=generator).to(torch.bfloat16).to(DEVICE)
        self.slots = torch.tensor([row for row, n in enumerate(lengths) for _ in range(n)], dtype=torch.int32, device=DEVICE)
        self.positions = torch.tensor([at for n in lengths for at in range(n)], dtype=torch.int32, device=DEVICE)
        self.raw = self.qkv.clone()
        frequencies = inverse_frequencies(dim, 500000.0, None)
        self.cos_sin = torch.cat(tables_of(torch.arange(max(lengths)), frequencies), -1).to(DEVICE)
        rope_and_write(self.qkv, self.positions, self.slots, self.tables, self.cos_sin, self.cache, self.scales, heads)

    def rotated(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float64 q, k, v [tokens, heads, dim] of the raw rows."""
        q, k, v = self.raw.double().cpu().split([self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim], -1)
        angles = self.cos_sin.double().cpu()[self.positions.cpu().long()]
        cos, sin = angles.chunk(2, -1)

        def turn(x: torch.Tensor) -> torch.Tensor:
            first, second = x.view(len(x), -1, self.dim).chunk(2, -1)
            return torch.cat((first * cos[:, None] - second * sin[:, None], second * cos[:, None] + first * sin[:, None]), -1)

        return turn(q), turn(k), v.view(len(v), -1, self.dim)

    def dense(self, row: int, first: int) -> torch.Tensor:
        """float64 attention of the tokens from position `first` of sequence `row`, over unquantized keys and values."""
        q, k, v = self.rotated()
        begin = sum(self.lengths[:row])
        n = self.lengths[row]
        group = self.heads // self.kv_heads
        keys = k[begin : begin + n].repeat_interleave(group, 1).transpose(0, 1)
        values = v[begin : begin + n].repeat_interleave(group, 1).transpose(0, 1)
        queries = q[begin + first : begin + n].transpose(0, 1)
        score = queries @ keys.transpose(1, 2) * self.dim**-0.5
        hidden = torch.arange(n)[None, :] > torch.arange(first, n)[:, None]
        return (score.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(0, 1).reshape(n - first, -1)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found = found.double().cpu()
    return float((found - wanted).norm() / wanted.norm())


def bound(kind: torch.dtype) -> float:
    return {torch.bfloat16: 8e-3 if GPU else 1.5e-2, torch.int8: 2e-2, torch.float8_e4m3fn: 6e-2}[kind]


@pytest.mark.parametrize("kind", CACHES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_decode_attention_of_ragged_sequences(shape: tuple[int, int, int], kind: torch.dtype, splits: int) -> None:
    check_decode_attention(shape, kind, splits)


@pytest.mark.parametrize("kind", CACHES, ids=str)
@pytest.mark.parametrize(("shape", "splits", "tiling"), CHOSEN, ids=str)
def test_decode_attention_as_it_is_chosen(
    shape: tuple[int, int, int], splits: int, tiling: tuple[int, int, int], kind: torch.dtype
) -> None:
    check_decode_attention(shape, kind, splits, tiling)


def check_decode_attention(
    shape: tuple[int, int, int], kind: torch.dtype, splits: int, tiling: tuple[int, int, int] = (32, 4, 1)
) -> None:
    lengths = [1, 31, 32, 33, 64, 65, 200, 777] if GPU else [1, 32, 33, 90]
    paged = Paged(*shape, lengths, kind, seed=splits)
    last = torch.tensor(lengths).cumsum(0) - 1
    query = paged.qkv[last.to(DEVICE)].to(PRODUCTS)
    rows = torch.arange(len(lengths), dtype=torch.int32, device=DEVICE)
    at = torch.tensor([n - 1 for n in lengths], dtype=torch.int32, device=DEVICE)
    out = torch.full((len(lengths), shape[0] * shape[2]), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    work = DecodeWorkspace(len(lengths), shape[1], shape[2], DEVICE, splits)
    for _ in range(3):  # the arrival counts must return to zero
        out.fill_(float("nan"))
        decode(query, paged.cache, paged.scales, paged.tables, rows, at, out, work, shape[0], splits, *tiling)
        for row, n in enumerate(lengths):
            assert error(out[row], paged.dense(row, n - 1)[0]) < bound(kind), (row, n)


@pytest.mark.parametrize("kind", CACHES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_attention_of_chunks_with_offsets(shape: tuple[int, int, int], kind: torch.dtype) -> None:
    lengths = [5, 128, 129, 300, 700] if GPU else [3, 70]
    starts = [0, 0, 31, 37, 512] if GPU else [0, 33]
    paged = Paged(*shape, lengths, kind)
    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    rows = torch.cat([torch.arange(b + s, b + n) for b, s, n in zip(begins, starts, lengths, strict=True)]).to(DEVICE)
    query = paged.qkv[rows].to(PRODUCTS)
    chunks, first = [], 0
    for slot, (start, n) in enumerate(zip(starts, lengths, strict=True)):
        chunks.append((first, n - start, start, slot))
        first += n - start
    tiles = torch.tensor(list_tiles(chunks, 64 if GPU else 32), dtype=torch.int32, device=DEVICE)
    out = torch.full((first, shape[0] * shape[2]), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    prefill_triton(query, paged.cache, paged.scales, paged.tables, tiles, out, shape[0], rows=64 if GPU else 32)
    for (begin, count, start, slot), n in zip(chunks, lengths, strict=True):
        assert error(out[begin : begin + count], paged.dense(slot, start)) < bound(kind), (start, n)


def test_pages_of_others_are_left_alone() -> None:
    paged = Paged(*SHAPES[0], [33, 5], torch.bfloat16)
    used = set(paged.tables.flatten().tolist())
    free = [
        page
        for page in range(paged.cache.shape[0])
        if page not in {int(paged.tables[0, 0]), int(paged.tables[0, 1]), int(paged.tables[1, 0])}
    ]
    assert used and bool(paged.cache[free].isnan().all())
    assert not bool(paged.cache[int(paged.tables[0, 1])][:, :, :1].isnan().any())
    assert bool(paged.cache[int(paged.tables[0, 1])][:, :, 1:].isnan().all())


@pytest.mark.parametrize("hidden", [256, 2048, 3072] if GPU else [96])
def test_norms(hidden: int) -> None:
    torch.manual_seed(1)
    rows, vocab, slots = 7, 50, 9
    table = torch.randn(vocab, hidden).to(torch.bfloat16).to(DEVICE)
    weight = torch.randn(hidden).to(torch.bfloat16).to(DEVICE)
    tokens = torch.randint(vocab, (slots,), dtype=torch.int32, device=DEVICE)
    positions = torch.randint(99, (slots,), dtype=torch.int32, device=DEVICE)
    pick = torch.randperm(slots)[:rows].to(torch.int32).to(DEVICE)
    residual, out = (torch.full((rows, hidden), float("nan"), dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    at = torch.empty(rows, dtype=torch.int32, device=DEVICE)
    embed_rows(tokens, positions, pick, table, weight, residual, out, at, 1e-5)
    wanted = table[tokens[pick.long()].long()]
    assert torch.equal(residual, wanted) and torch.equal(at, positions[pick.long()])
    assert error(out, rms_norm(wanted.double(), weight.double(), 1e-5).cpu()) < 8e-3
    x = torch.randn(rows, hidden).to(torch.bfloat16).to(DEVICE)
    total = x + residual
    add_norm(x, residual, weight, x, 1e-5)
    assert error(residual, total.double().cpu()) < 8e-3
    assert error(x, rms_norm(total.double(), weight.double(), 1e-5).cpu()) < 8e-3


def test_swiglu() -> None:
    torch.manual_seed(2)
    gate_up = torch.randn(5, 2 * 1500).to(torch.bfloat16).to(DEVICE)
    out = torch.full((5, 1500), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    swiglu(gate_up, out)
    assert error(out, swiglu_reference(gate_up.double()).cpu()) < 8e-3


def test_draws_equal_the_reference_and_advance_the_slot() -> None:
    torch.manual_seed(3)
    rows, vocab, slots = 6, 20000, 9
    logits = torch.randn(rows, vocab).to(torch.bfloat16).to(DEVICE)
    logits[0, 77] = logits[0, 12345] = 50.0  # a tie goes to the lower id
    pick = torch.tensor([3, 0, 7, 8, 1, 5], dtype=torch.int32, device=DEVICE)  # 8 is scratch
    tokens, positions = (torch.zeros(slots, dtype=torch.int32, device=DEVICE) for _ in range(2))
    steps = torch.arange(slots, dtype=torch.int32, device=DEVICE) + RING - 3
    before = steps.clone()
    temperatures = torch.zeros(slots, device=DEVICE)
    temperatures[[0, 1, 5]] = torch.tensor([0.6, 1.0, 2.0], device=DEVICE)
    seeds = torch.tensor([2**40 + 9, 5, 0, 0, 0, -3, 0, 0, 0], dtype=torch.int64, device=DEVICE)
    ring = torch.full((slots, RING), -1, dtype=torch.int32, device=DEVICE)
    work = DrawWorkspace(rows, vocab, DEVICE)
    draw(logits, pick, temperatures, seeds, steps, work)
    advance(work.values, work.ids, work.parts, pick, tokens, positions, steps, ring)
    at = pick.long()
    hot = temperatures[at] > 0
    noise = gumbel(seeds[at], before[at].long(), vocab)
    scaled = torch.where(hot[:, None], logits.float() / temperatures[at].clamp(min=1e-5)[:, None] + noise, logits.float())
    wanted = scaled.argmax(-1)
    live = at != slots - 1
    assert int(tokens[3]) == 77
    assert torch.equal(tokens[at[live]].long(), wanted[live])
    assert torch.equal(ring[at[live], before[at[live]].long() % RING].long(), wanted[live])
    assert positions.tolist() == [1, 1, 0, 1, 0, 1, 0, 1, 0]
    assert torch.equal(steps, before + positions)


def test_splits_fill_the_card() -> None:
    assert [choose_splits(batch, 8, 64) for batch in (1, 32, 64, 256)] == [32, 4, 1, 1]
    assert [choose_splits(batch, 8, 128) for batch in (1, 16, 32, 256)] == [32, 8, 1, 1]
