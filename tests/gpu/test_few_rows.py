"""The kernels for 1 to 16 rows against float64: every fusion, ragged lengths, page edges, poisoned free pages."""

import random

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA C++ has no interpreter"),
]

from altiplano_kernels.cluster_attention.kernel import Shape, decode_clusters  # noqa: E402
from altiplano_kernels.few_rows import kernel as few  # noqa: E402
from altiplano_kernels.few_rows import reference  # noqa: E402
from altiplano_kernels.few_rows.quantized import Packed, dequantize, pack, quantize  # noqa: E402
from altiplano_kernels.kv_write.kernel import rope_and_write  # noqa: E402
from altiplano_kernels.rope.reference import cos_sin as tables_of  # noqa: E402
from altiplano_kernels.rope.reference import inverse_frequencies  # noqa: E402
from altiplano_kernels.sampling.kernel import RING, advance  # noqa: E402
from altiplano_kernels.sampling.reference import gumbel  # noqa: E402

PAGE, EPS = 32, 1e-5
ROWS = [1, 2, 7, 8, 9, 16]
MOST_BLOCKS = 528  # of a plan that draws


def bf16(*shape: int, spread: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * spread).bfloat16()


def weights(
    n: int, k: int, bits: int, head_dim: int = 16, halves: bool = False, spread: float = 0.05
) -> tuple[few.Weight, torch.Tensor]:
    """What the kernels take, and what it stands for: [n, k]."""
    w = bf16(n, k, spread=spread)
    if bits == 16:
        return w, w
    codes, scales = quantize(w, bits)
    return pack(codes, scales, bits, head_dim, halves), dequantize(codes, scales)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert bool(found.isfinite().all())
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("k", [256, 768, 2048, 3072, 8192])
@pytest.mark.parametrize("rows", ROWS)
def test_products(rows: int, k: int) -> None:
    torch.manual_seed(rows * k)
    x, w, residual = bf16(rows, k), bf16(112, k, spread=0.05), bf16(rows, 112)
    out = torch.full((rows, 112), float("nan"), dtype=torch.bfloat16, device="cuda")
    few.linear(x, w, out)
    product = reference.linear(x, w)
    assert error(out, product) < 3e-3
    wanted = residual.double() + product
    few.add_linear(x, w, residual)
    assert error(residual, wanted) < 3e-3


@pytest.mark.parametrize("k", [256, 768, 2048, 3072])
@pytest.mark.parametrize("rows", ROWS)
def test_products_of_normed_rows(rows: int, k: int) -> None:
    torch.manual_seed(rows + k)
    x, gamma = bf16(rows, k, spread=3.0), 1 + bf16(k, spread=0.2)
    w, gate_up = bf16(112, k, spread=0.05), bf16(2 * 88, k, spread=0.05)
    out = torch.full((rows, 112), float("nan"), dtype=torch.bfloat16, device="cuda")
    few.linear(x, w, out, gamma, EPS)
    assert error(out, reference.linear(x, w, gamma, EPS)) < 5e-3
    wide = torch.full((rows, 88), float("nan"), dtype=torch.bfloat16, device="cuda")
    few.norm_swiglu(x, gate_up, gamma, EPS, wide)
    assert error(wide, reference.norm_swiglu(x, gate_up, gamma, EPS)) < 6e-3


def test_a_block_that_takes_many_tiles() -> None:
    torch.manual_seed(5)
    x, gamma, w = bf16(5, 2048), 1 + bf16(2048, spread=0.1), bf16(16 * 11, 2048, spread=0.05)
    for depth in (1, 2, 4):
        out = torch.full((5, 176), float("nan"), dtype=torch.bfloat16, device="cuda")
        few.linear(x, w, out, gamma, EPS, few.Plan(8, depth, blocks=3))
        assert error(out, reference.linear(x, w, gamma, EPS)) < 5e-3
        few.linear(x, w, out, plan=few.Plan(8, depth, blocks=4))
        assert error(out, reference.linear(x, w)) < 3e-3


@pytest.mark.parametrize("bits", [16, 8, 6, 4])
@pytest.mark.parametrize("rows", [1, 3, 8, 13])
def test_rows_in_shared_memory_and_codes_turned_ahead_change_no_sum(rows: int, bits: int) -> None:
    torch.manual_seed(rows + bits)
    for k in (2048, 3072):
        x, gamma, residual = bf16(rows + 1, k + 8)[:rows, :k], 1 + bf16(k, spread=0.2), bf16(rows, 112)
        weight, w = weights(112, k, bits)
        plan = few.Plan(4, k // (4 * few.CHUNK[bits]))
        if bits == 16 or rows > 8:
            plan = plan._replace(depth=2)
        wanted = residual.clone()
        few.add_linear(x, weight, wanted, plan)
        assert error(wanted, residual.double() + reference.linear(x, w)) < 3e-3
        changes = [{"staged": True}]
        if plan.depth > 2:
            changes += [{"ahead": True}, {"staged": True, "ahead": True}]
            normed, ahead = (torch.full((rows, 112), float("nan"), dtype=torch.bfloat16, device="cuda") for _ in range(2))
            few.linear(x, weight, normed, gamma, EPS, plan)
            few.linear(x, weight, ahead, gamma, EPS, plan._replace(ahead=True))
            assert torch.equal(ahead, normed)
        for change in changes:
            # Blocks of several tiles share one staged x, and turn nothing ahead.
            for blocks in (0, 3):
                found = residual.clone()
                few.add_linear(x, weight, found, plan._replace(blocks=blocks, **change))
                assert torch.equal(found, wanted), (change, blocks)


@pytest.mark.parametrize("blocks", [1, 3, 10, 400])
def test_tiles_taken_in_turns_are_those_of_equal_shares(blocks: int) -> None:
    """Launch after launch, each a dependent of the one before, with one counter that nobody resets."""
    torch.manual_seed(blocks)
    turn = torch.zeros(1, dtype=torch.int32, device="cuda")
    x, gamma, w = bf16(5, 2048), 1 + bf16(2048, spread=0.1), bf16(16 * 401, 2048, spread=0.05)
    shares_of, plan = few.Plan(8, 2, blocks), few.Plan(8, 2, blocks, turns=True)
    shares, turns = (torch.full((5, len(w)), float("nan"), device="cuda") for _ in range(2))
    few.norm_logits(x, w, gamma, EPS, shares, shares_of)
    halves = len(w) // 2
    wide_shares, wide_turns = (torch.full((5, halves), float("nan"), dtype=torch.bfloat16, device="cuda") for _ in range(2))
    few.norm_swiglu(x, w, gamma, EPS, wide_shares, shares_of)
    for _ in range(20):
        turns.fill_(float("nan"))
        few.norm_logits(x, w, gamma, EPS, turns, plan, turn)
        few.norm_swiglu(x, w, gamma, EPS, wide_turns, plan, turn)
        assert torch.equal(turns, shares) and torch.equal(wide_turns, wide_shares)
    assert int(turn) == 0


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("k", [512, 2048, 3072, 8192])
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_quantized_products(rows: int, k: int, bits: int) -> None:
    torch.manual_seed(rows + k)
    x, gamma, residual = bf16(rows, k), 1 + bf16(k, spread=0.2), bf16(rows, 112)
    w, gate_up = bf16(112, k, spread=0.05), bf16(2 * 88, k, spread=0.05)
    codes, scales = quantize(w, bits)
    exact = dequantize(codes, scales).double()
    assert error(exact, w) < {8: 8e-3, 6: 0.03, 4: 0.11}[bits]
    packed = pack(codes, scales, bits)
    assert error(few.unpack(packed, torch.empty(112 * k + 5, dtype=torch.bfloat16, device="cuda")), exact) < 3e-3
    wanted = residual.double() + reference.linear(x, exact)
    few.add_linear(x, packed, residual)
    assert error(residual, wanted) < 3e-3
    if k <= 3072:
        out = torch.full((rows, 112), float("nan"), dtype=torch.bfloat16, device="cuda")
        few.linear(x, packed, out, gamma, EPS)
        assert error(out, reference.linear(x, exact, gamma, EPS)) < 5e-3
        codes, scales = quantize(gate_up, bits)
        packed, exact = pack(codes, scales, bits, halves=True), dequantize(codes, scales).double()
        assert error(few.unpack(packed, torch.empty_like(gate_up)), exact) < 3e-3
        wide = torch.full((rows, 88), float("nan"), dtype=torch.bfloat16, device="cuda")
        few.norm_swiglu(x, packed, gamma, EPS, wide)
        assert error(wide, reference.norm_swiglu(x, exact, gamma, EPS)) < 6e-3


@pytest.mark.parametrize("seed", range(8))
def test_random_shapes_write_their_own_outputs_and_nothing_else(seed: int) -> None:
    """Rows in and out are parts of something wider, which is poison."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    bits = (16, 8, 4, 6)[seed % 4]
    k = 4 * few.CHUNK[bits] * dice.choice((dice.randint(1, 12), 3))
    rows, n = dice.randint(1, 16), 16 * dice.randint(1, 40)

    def poisoned(width: int) -> torch.Tensor:
        return torch.full((rows + 2, width + 16), float("nan"), dtype=torch.bfloat16, device="cuda")

    given, gamma, w = poisoned(k), 1 + bf16(k, spread=0.2), bf16(n, k, spread=0.05)
    x = given[1 : 1 + rows, :k]
    x.copy_(bf16(rows, k))
    weight: few.Weight = w
    if bits < 16:
        codes, scales = quantize(w, bits)
        weight, w = pack(codes, scales, bits), dequantize(codes, scales)
    for norm in (None, gamma):
        whole = poisoned(n)
        out = whole[1 : 1 + rows, :n]
        few.linear(x, weight, out, norm, EPS)
        wanted = reference.linear(x, w, norm, EPS)
        assert error(out, wanted) < 5e-3, (rows, n, k, bits)
        residual = out.clone()
        if norm is None:
            few.add_linear(x, weight, out)
            assert error(out, residual.double() + wanted) < 5e-3
        out.fill_(float("nan"))
        assert bool(whole.isnan().all()), "something beside the output was written"


class Pages:
    """Slots with ragged lengths over a poisoned cache; `fill` writes all tokens but the last of each."""

    def __init__(self, heads: int, kv_heads: int, dim: int, positions: list[int], kind: torch.dtype) -> None:
        self.heads, self.kv_heads, self.dim, self.at = heads, kv_heads, dim, positions
        width = max(positions) // PAGE + 1
        blocks = len(positions) * width + 5
        self.cache = torch.empty(blocks, 2, kv_heads, PAGE, dim, dtype=kind, device="cuda")
        self.scales = None
        if kind is torch.bfloat16:
            self.cache.fill_(float("nan"))
        else:
            self.cache.view(torch.int8).fill_(0x7F)
            self.scales = torch.full((blocks, 2, kv_heads, PAGE), float("nan"), dtype=torch.float16, device="cuda")
        self.tables = torch.randperm(blocks)[: len(positions) * width].view(len(positions), width).int().cuda()
        frequencies = inverse_frequencies(dim, 500000.0, None)
        self.cos_sin = torch.cat(tables_of(torch.arange(max(positions) + 1), frequencies), -1).cuda()
        # Row i of a step belongs to slot order[i].
        self.order = torch.randperm(len(positions)).int().cuda()
        self.positions = torch.tensor(positions, dtype=torch.int32, device="cuda")

    def write(self, qkv: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        rope_and_write(qkv, positions, slots, self.tables, self.cos_sin, self.cache, self.scales, self.heads)

    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """float64 rotated heads of x: [tokens, n * dim] as [tokens, n, dim]."""
        cos, sin = self.cos_sin.double()[positions.long()].chunk(2, -1)
        first, second = x.double().view(len(x), -1, self.dim).chunk(2, -1)
        return torch.cat((first * cos[:, None] - second * sin[:, None], second * cos[:, None] + first * sin[:, None]), -1)


SHAPES = [(32, 8, 64), (24, 8, 128)]
POSITIONS = [0, 31, 32, 33, 63, 200, 640, 777, 1, 64, 127, 128, 500, 30, 5, 1023]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_queries_keys_and_values_of_a_step(shape: tuple[int, int, int], bits: int, rows: int) -> None:
    check_queries_keys_and_values(shape, 1024, rows, bits)


def check_queries_keys_and_values(shape: tuple[int, int, int], hidden: int, rows: int, bits: int, first: bool = True) -> None:
    torch.manual_seed(rows)
    vocab = 64
    pages = Pages(*shape, POSITIONS[-rows:], torch.bfloat16)
    heads, kv_heads, dim = shape
    tokens = torch.randint(vocab, (rows,), dtype=torch.int32, device="cuda")
    embedding, gamma = bf16(vocab, hidden), 1 + bf16(hidden, spread=0.1)
    weight, w = weights((heads + 2 * kv_heads) * dim, hidden, bits, dim)
    step = few.Step(hidden, heads * dim, 256, dim, 1, "cuda")
    few.begin(pages.order, tokens, pages.positions, pages.tables, embedding, pages.cos_sin, pages.cache, step)
    slots = pages.order.long()
    x, at = embedding[tokens[slots].long()], pages.positions[slots]
    assert torch.equal(step.residual[:rows], x) and torch.equal(step.positions[:rows], at)
    before = pages.cache.clone()
    if isinstance(weight, Packed):
        assert error(few.unpack(weight, torch.empty(w.numel(), dtype=torch.bfloat16, device="cuda")), w) < 3e-3
    few.norm_qkv(step.residual[:rows], weight, gamma, EPS, step, pages.cache, heads, first=first)
    q, k, v = reference.norm_qkv(x, w, gamma, EPS, pages.cos_sin[at.long()], heads, kv_heads)
    assert error(step.query[:rows].view(rows, heads, dim), q) < 5e-3
    page, place = pages.tables[slots, at.long() // PAGE].long(), at.long() % PAGE
    assert error(pages.cache[page, 0, :, place], k) < 5e-3
    assert error(pages.cache[page, 1, :, place], v) < 5e-3
    pages.cache[page, :, :, place] = before[page, :, :, place]
    assert torch.equal(pages.cache.view(torch.int16), before.view(torch.int16))  # nothing else was touched


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cluster", [1, 2, 4, 8, 16])
def test_attention_of_ragged_sequences(shape: tuple[int, int, int], kind: torch.dtype, cluster: int) -> None:
    torch.manual_seed(cluster)
    heads, kv_heads, dim = shape
    pages = Pages(*shape, POSITIONS, kind)
    lengths = [p + 1 for p in POSITIONS]
    slots = torch.tensor([s for s, n in enumerate(lengths) for _ in range(n)], dtype=torch.int32, device="cuda")
    at = torch.tensor([p for n in lengths for p in range(n)], dtype=torch.int32, device="cuda")
    qkv = bf16(len(at), (heads + 2 * kv_heads) * dim)
    raw = qkv.clone()
    pages.write(qkv, at, slots)
    ends = torch.tensor(lengths, device="cuda").cumsum(0)
    query = qkv[ends[pages.order.long()] - 1].contiguous()
    positions = pages.positions[pages.order.long()].contiguous()
    out = torch.full((len(lengths), heads * dim), float("nan"), dtype=torch.bfloat16, device="cuda")
    decode_clusters(
        query, pages.cache, pages.scales, pages.tables, pages.order, positions, out, heads, Shape(cluster, 128 // dim, 4)
    )
    q, k, v = raw.double().split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
    q, k, v = pages.turn(q, at), pages.turn(k, at), v.view(len(v), kv_heads, dim)
    for row, slot in enumerate(pages.order.tolist()):
        end, n = int(ends[slot]), lengths[slot]
        keys, values = (x[end - n : end].repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        score = torch.einsum("hd,thd->ht", q[end - 1], keys) * dim**-0.5
        wanted = torch.einsum("ht,thd->hd", score.softmax(-1), values).flatten()
        assert error(out[row], wanted) < {torch.bfloat16: 8e-3, torch.int8: 2e-2, torch.float8_e4m3fn: 6e-2}[kind], (slot, n)


@pytest.mark.parametrize("rows", [1, 6, 13])
def test_draws_from_hidden_states(rows: int) -> None:
    check_draws(rows, 16 * 999, 2048, 16)


def check_draws(rows: int, vocab: int, hidden: int, bits: int) -> None:
    torch.manual_seed(rows)
    slots = 14
    x, gamma, (weight, head) = bf16(rows, hidden), 1 + bf16(hidden, spread=0.1), weights(vocab, hidden, bits, spread=0.02)
    pick = torch.randperm(slots - 1)[:rows].int().cuda()
    tokens, positions = (torch.zeros(slots, dtype=torch.int32, device="cuda") for _ in range(2))
    steps = torch.arange(slots, dtype=torch.int32, device="cuda") + RING - 3
    temperatures = torch.tensor([0.0, 0.6, 1.0, 0.0, 2.0, 0.0, 0.3] * 2, device="cuda")
    seeds = torch.arange(slots, device="cuda") * (2**40 + 9) - 3
    ring = torch.full((slots, RING), -1, dtype=torch.int32, device="cuda")
    before, step = steps.clone(), few.Step(hidden, 256, 256, 64, MOST_BLOCKS, "cuda")
    blocks = few.norm_draw(x, weight, gamma, EPS, pick, temperatures, seeds, steps, step)
    advance(step.values, step.ids, blocks, pick, tokens, positions, steps, ring)
    at = pick.long()
    logits, heat = reference.linear(x, head, gamma, EPS).float(), temperatures[at][:, None]
    scores = torch.where(heat > 0, logits / heat.clamp(min=1e-5) + gumbel(seeds[at], before[at].long(), vocab), logits)
    drawn = tokens[at].long()
    # Sums in another order may swap near-equals, never more.
    assert float((scores.max(-1).values - scores.gather(1, drawn[:, None])[:, 0]).max()) < 0.05
    written = torch.full((rows, vocab), float("nan"), device="cuda")
    few.norm_logits(x, weight, gamma, EPS, written, turn=step.turn)
    assert int(step.turn) == 0
    assert error(written, logits) < 5e-3
    assert torch.equal(written.argmax(-1)[heat[:, 0] == 0], drawn[heat[:, 0] == 0]), "the same sums, to the bit"
    scores += (written - logits) / torch.where(heat > 0, heat, 1.0)
    assert float((scores.max(-1).values - scores.gather(1, drawn[:, None])[:, 0]).max()) < 1e-4
    assert torch.equal(ring[at, before[at].long() % RING].long(), drawn)
    assert torch.equal(steps - before, positions) and int(positions.sum()) == rows


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("key", few.TUNED, ids=str)
def test_plans_that_ship_at_the_sizes_that_they_are_for(key: tuple[int, int, int, int], rows: int) -> None:
    mode, n, k, bits = key
    torch.manual_seed(n + k + rows)
    if mode == few.QKV:
        [shape] = [(heads, kv_heads, dim) for heads, kv_heads, dim in SHAPES if (heads + 2 * kv_heads) * dim == n]
        for first in (True, False):  # the first layer's lets nobody start early
            check_queries_keys_and_values(shape, k, rows, bits, first=first)
    elif mode == few.DRAW:
        check_draws(rows, n, k, bits)
    elif mode == few.RESIDUAL:
        x, residual, (weight, w) = bf16(rows, k), bf16(rows, n), weights(n, k, bits)
        wanted = residual.double() + reference.linear(x, w)
        few.add_linear(x, weight, residual)
        assert error(residual, wanted) < 3e-3
    else:
        assert mode == few.SWIGLU
        x, gamma, (weight, w) = bf16(rows, k, spread=3.0), 1 + bf16(k, spread=0.2), weights(n, k, bits, halves=True)
        wanted, turn = reference.norm_swiglu(x, w, gamma, EPS), torch.zeros(1, dtype=torch.int32, device="cuda")
        for _ in range(2):  # the second takes its turns where the first has left the counter
            out = torch.full((rows, n // 2), float("nan"), dtype=torch.bfloat16, device="cuda")
            few.norm_swiglu(x, weight, gamma, EPS, out, turn=turn)
            assert error(out, wanted) < 6e-3 and int(turn) == 0
