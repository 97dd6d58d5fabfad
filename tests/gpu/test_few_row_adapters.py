"""Adapters in the kernels for 1 to 16 rows: every fusion against float64, rows without an adapter to the bit, and whole steps beside those of
other kernels."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA C++ has no interpreter"),
]

from altiplano.engine import EngineConfig, SamplingParams  # noqa: E402
from altiplano.engine.cuda.adapter_pool import AdapterPool  # noqa: E402
from altiplano.engine.cuda.few_rows import FewRows  # noqa: E402
from altiplano.engine.cuda.overlap import OverlappedEngine  # noqa: E402
from altiplano.engine.cuda.runner import CudaRunner  # noqa: E402
from altiplano_kernels.few_rows import kernel as few  # noqa: E402
from altiplano_kernels.few_rows import reference  # noqa: E402
from altiplano_kernels.few_rows.quantized import dequantize, pack, quantize  # noqa: E402
from altiplano_kernels.few_rows.shrink import LowRank, shrink, splits_of  # noqa: E402
from altiplano_kernels.multi_lora.kernel import DECODE, list_tiles, most_tiles  # noqa: E402
from altiplano_kernels.multi_lora.reference import add_adapters  # noqa: E402
from altiplano_kernels.rms_norm.reference import rms_norm  # noqa: E402
from altiplano_kernels.rope.reference import rotate  # noqa: E402
from altiplano_kernels.swiglu.reference import swiglu  # noqa: E402

from .captured import captured  # noqa: E402
from .test_adapters import answers, requests, write_adapters  # noqa: E402
from .test_guesses import Always, without  # noqa: E402

EPS, PAGE = 1e-5, 32
Bounds = tuple[int, ...]


def bf16(*shape: int, spread: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * spread).bfloat16()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert bool(found.isfinite().all())
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def same_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.equal(found.view(torch.int16), wanted.view(torch.int16))


class Pool:
    """Adapters of some ranks for products of one shape, as the engine keeps them: zeros behind an adapter's rank."""

    def __init__(self, k: int, bounds: Bounds, ranks: list[int], rank: int, tuned_norms: bool) -> None:
        count, n = len(ranks), bounds[-1]
        self.bounds, self.ranks = bounds, ranks
        self.down, self.up = bf16(count, len(bounds) * rank, k, spread=0.05), bf16(count, n, rank, spread=0.2)
        for adapter, own in enumerate(ranks):
            self.up[adapter, :, own:] = 0
            for module in range(len(bounds)):
                self.down[adapter, module * rank + own : (module + 1) * rank] = 0
        self.gain = 1 + bf16(count, n, spread=0.3) if tuned_norms else torch.ones_like(self.up[:, :, 0])
        self.owners = torch.zeros(few.MOST_ROWS, 2, dtype=torch.int32, device="cuda")
        self.parts = torch.full((splits_of(k), few.MOST_ROWS, len(bounds) * rank), float("nan"), device="cuda")
        self.ones = torch.ones(k, dtype=torch.bfloat16, device="cuda")
        self.low = LowRank(self.owners, self.parts, self.up, self.gain, bounds)
        self.tiles = torch.zeros(most_tiles(few.MOST_ROWS, count, DECODE) * (3 + DECODE.rows), dtype=torch.int32, device="cuda")

    def set_rows(self, owners: list[int]) -> None:
        pairs = [[owner, self.ranks[owner - 1] if owner else 0] for owner in owners]
        self.owners[: len(owners)] = torch.tensor(pairs, dtype=torch.int32)
        count = most_tiles(few.MOST_ROWS, len(self.ranks), DECODE)
        self.tiles.copy_(torch.tensor(list_tiles(owners, self.ranks, DECODE, count), dtype=torch.int32))

    def shrunk(self, x: torch.Tensor, gamma: torch.Tensor | None = None, pdl: bool = True) -> LowRank:
        shrink(x, self.down, self.low, self.tiles, self.ones if gamma is None else gamma, pdl)
        return self.low

    def update(self, product: torch.Tensor, x: torch.Tensor, owners: list[int]) -> torch.Tensor:
        """float64 product of float64 rows x with the adapters of `owners`."""
        weights = (self.down.double(), self.up.double(), self.gain.double())
        add_adapters(product, x, *weights, self.bounds, owners, self.ranks)
        return product


def weight_of(n: int, k: int, bits: int, head_dim: int = 16, halves: bool = False) -> tuple[few.Weight, torch.Tensor]:
    """A weight in the kernels' form and in float64."""
    w = bf16(n, k, spread=0.05)
    if bits == 16:
        return w, w.double()
    codes, scales = quantize(w, bits)
    return pack(codes, scales, bits, head_dim, halves), dequantize(codes, scales).double()


def deal(rows: int, most: int) -> list[int]:
    """Owners of rows, some of none."""
    return [random.Random(31 * rows + i).randrange(most + 1) for i in range(rows)]


MIXES = [(64, [8, 64, 16, 3, 33]), (16, [16, 8, 1])]
MATRIX = [
    pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16]),
    pytest.mark.parametrize("bits", [16, 8, 4]),
    pytest.mark.parametrize(("rank", "ranks"), MIXES, ids=["r64", "r16"]),
    pytest.mark.parametrize("tuned_norms", [False, True], ids=["lora", "dora"]),
]


def everywhere(test: Callable[..., None]) -> Callable[..., None]:
    for mark in MATRIX:
        test = mark(test)
    return test


@everywhere
def test_sums_onto_a_residual(rows: int, bits: int, rank: int, ranks: list[int], tuned_norms: bool) -> None:
    torch.manual_seed(rows)
    for n, k in ((2048, 2048), (3072, 8192), (112, 768 if bits == 16 else 1536)):
        (w, exact), pool, owners = weight_of(n, k, bits), Pool(k, (n,), ranks, rank, tuned_norms), deal(rows, len(ranks))
        pool.set_rows(owners)
        x, residual = bf16(rows, k), bf16(rows, n)
        wanted = residual.double() + pool.update(reference.linear(x, exact), x.double(), owners)
        plain, found = residual.clone(), residual.clone()
        few.add_linear(x, w, plain)
        few.add_linear(x, w, found, low=pool.shrunk(x))
        none = torch.tensor(owners, device="cuda") == 0
        assert error(found, wanted) < 4e-3 and same_bits(found[none], plain[none])


@everywhere
def test_gate_and_up_of_normed_rows(rows: int, bits: int, rank: int, ranks: list[int], tuned_norms: bool) -> None:
    torch.manual_seed(rows)
    turn = torch.zeros(1, dtype=torch.int32, device="cuda")
    for half, k in ((8192, 2048), (8192, 3072), (88, 1024)):
        (w, exact), gamma = weight_of(2 * half, k, bits, halves=True), 1 + bf16(k, spread=0.2)
        pool, owners, x = Pool(k, (half, 2 * half), ranks, rank, tuned_norms), deal(rows, len(ranks)), bf16(rows, k, spread=3.0)
        pool.set_rows(owners)
        normed = rms_norm(x.double(), gamma.double(), EPS)
        wanted = swiglu(pool.update(reference.linear(x, exact, gamma, EPS), normed, owners))
        plain, found = (torch.full((rows, half), float("nan"), dtype=torch.bfloat16, device="cuda") for _ in range(2))
        few.norm_swiglu(x, w, gamma, EPS, plain, turn=turn)
        few.norm_swiglu(x, w, gamma, EPS, found, turn=turn, low=pool.shrunk(x, gamma))
        none = torch.tensor(owners, device="cuda") == 0
        assert error(found, wanted) < 8e-3 and same_bits(found[none], plain[none])
        assert int(turn) == 0


@everywhere
def test_queries_keys_and_values(rows: int, bits: int, rank: int, ranks: list[int], tuned_norms: bool) -> None:
    torch.manual_seed(rows)
    for heads, kv_heads, dim, k in ((32, 8, 64, 2048), (24, 8, 128, 3072)):
        bounds = (heads * dim, (heads + kv_heads) * dim, (heads + 2 * kv_heads) * dim)
        (w, exact), gamma = weight_of(bounds[-1], k, bits, dim), 1 + bf16(k, spread=0.2)
        pool, owners, x = Pool(k, bounds, ranks, rank, tuned_norms), deal(rows, len(ranks)), bf16(rows, k)
        pool.set_rows(owners)
        angles = torch.rand(rows, dim // 2, device="cuda") * 6
        cos, sin = angles.cos(), angles.sin()
        normed = rms_norm(x.double(), gamma.double(), EPS)
        vectors = pool.update(reference.linear(x, exact, gamma, EPS), normed, owners).view(rows, -1, dim)
        none, found = torch.tensor(owners, device="cuda") == 0, list[tuple[torch.Tensor, torch.Tensor]]()
        for low in (None, pool.shrunk(x, gamma)):
            step, cache = few.Step(k, heads * dim, 256, dim, 1, "cuda"), bf16(rows, 2, kv_heads, PAGE, dim)
            step.lines[:rows] = torch.arange(rows, device="cuda") * 2 * kv_heads * PAGE + 5
            step.rope[:rows] = torch.cat((cos, sin), -1)
            few.norm_qkv(x, w, gamma, EPS, step, cache, heads, low=low)
            found.append((step.query[:rows], cache[:, :, :, 5]))
        (plain_query, plain_lines), (query, lines) = found
        assert same_bits(query[none], plain_query[none]) and same_bits(lines[none], plain_lines[none])
        wanted = rotate(vectors[:, : heads + kv_heads], cos.double(), sin.double())
        assert error(query.view(rows, heads, dim), wanted[:, :heads]) < 6e-3
        assert error(lines[:, 0], wanted[:, heads:]) < 6e-3
        assert error(lines[:, 1], vectors[:, heads + kv_heads :]) < 6e-3
        if dim == 64:  # what an 8-bit cache has instead: the product alone
            plain_w, flat = weight_of(bounds[-1], k, bits)
            out, base = (torch.full((rows, bounds[-1]), float("nan"), dtype=torch.bfloat16, device="cuda") for _ in range(2))
            few.linear(x, plain_w, base, gamma, EPS)
            few.linear(x, plain_w, out, gamma, EPS, low=pool.shrunk(x, gamma))
            assert error(out, pool.update(reference.linear(x, flat, gamma, EPS), normed, owners)) < 6e-3
            assert same_bits(out[none], base[none])


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_captured_products_that_start_early_follow_the_list_and_the_rows(rows: int) -> None:
    """Two pairs of products after each other, which share the sums between: new owners and new rows in each replay of one graph."""
    torch.manual_seed(rows)
    hidden, inner, ranks = 2048, 8192, [8, 64, 16, 3, 8, 33, 64, 1]
    gamma, (gate_up, _), (down, _) = 1 + bf16(hidden, spread=0.2), weight_of(2 * inner, hidden, 16), weight_of(hidden, inner, 16)
    pools = Pool(hidden, (inner, 2 * inner), ranks, 64, True), Pool(inner, (hidden,), ranks, 64, False)
    given = bf16(rows, hidden)

    def step(pdl: bool) -> torch.Tensor:
        residual, wide = given.clone(), torch.empty(rows, inner, dtype=torch.bfloat16, device="cuda")
        for _ in range(2):
            few.norm_swiglu(residual, gate_up, gamma, EPS, wide, low=pools[0].shrunk(residual, gamma, pdl))
            few.add_linear(wide, down, residual, low=pools[1].shrunk(wide, None, pdl))
        return residual

    graph, result = captured(lambda: step(True))
    for replay in range(8):
        owners = [(3 * row + replay) % (len(ranks) + 1) for row in range(rows)]
        for pool in pools:
            pool.set_rows(owners)
        given.normal_()
        graph.replay()
        found = result.clone()
        assert same_bits(found, step(False))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_row_and_its_adapter_decide_every_bit_under_steady_plans(bits: int) -> None:
    torch.manual_seed(bits)
    half, k, ranks = 512, 2048, [16, 40, 8]
    (w, _), gamma, x = weight_of(2 * half, k, bits, halves=True), 1 + bf16(k, spread=0.2), bf16(16, k)
    pool = Pool(k, (half, 2 * half), ranks, 64, True)

    def swiglus(rows: torch.Tensor, owners: list[int]) -> torch.Tensor:
        pool.set_rows(owners)
        given, out = x[rows].contiguous(), torch.empty(len(rows), half, dtype=torch.bfloat16, device="cuda")
        plan = few.steady_plan(few.SWIGLU, 2 * half, k, len(rows), bits)
        few.norm_swiglu(given, w, gamma, EPS, out, plan, low=pool.shrunk(given, gamma))
        return out

    owners = [i % 4 for i in range(16)]
    whole = swiglus(torch.arange(16, device="cuda"), owners)
    for row in range(16):
        assert same_bits(swiglus(torch.tensor([row], device="cuda"), [owners[row]])[0], whole[row])


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    return write_adapters(tmp_path_factory.mktemp("adapters"))


def make(
    where: tuple[Path, dict[str, Path]], few_rows: bool, quantization: str = "none", cache: str = "auto", guesses: int = 0
) -> OverlappedEngine:
    base, kinds = where
    config = EngineConfig(
        model=base,
        device="cuda",
        dtype="bfloat16",
        debug=True,
        max_model_len=512,
        max_num_seqs=16,
        num_blocks=600,
        num_speculative_tokens=guesses,
    )
    runner = CudaRunner(config, cache, quantization=quantization)
    assert runner.stepper.few is not None
    runner.stepper.few.takes_adapters = few_rows
    engine = OverlappedEngine(config, runner)
    for name, directory in kinds.items():
        engine.load_adapter(name, directory)
    return engine


def prepare(
    engine: OverlappedEngine, owners: list[str | None], some: list[int] | None = None
) -> tuple[CudaRunner, FewRows, AdapterPool, torch.Tensor]:
    """All rows, or `some`, before a greedy step behind random keys and values, which are the same each time."""
    runner = engine.runner
    assert isinstance(runner, CudaRunner) and runner.stepper.few is not None and runner._pool is not None
    torch.manual_seed(3)
    cache, count = runner.model.cache, len(owners)
    cache.copy_((torch.randn(cache.shape, device="cuda") * (40 if cache.dtype == torch.int8 else 1)).to(cache.dtype))
    if runner.model.scales is not None:
        runner.model.scales.fill_(0.02)
    slots = list(range(count))
    for slot in slots:
        runner.slots.set_pages(slot, range(4 * slot, 4 * slot + 4), fresh=True)
    runner.slots.upload_tables()
    runner.slots.write(slots, [9 * slot for slot in slots], [7 * slot + 2 for slot in slots], [0] * count, [0.0] * count, slots)
    some = slots if some is None else some
    runner._pool.set_rows([owners[slot] for slot in some], len(some))
    return runner, runner.stepper.few, runner._pool, torch.tensor(some, dtype=torch.int32, device="cuda")


def logits_of(engine: OverlappedEngine, owners: list[str | None], few_rows: bool, some: list[int] | None = None) -> torch.Tensor:
    """Of one step of all rows, or of `some`. More than eight rows are not always for these kernels, but they can do them."""
    runner, kernels, pool, rows = prepare(engine, owners, some)
    with torch.inference_mode():
        if few_rows:
            assert kernels.takes(min(len(rows), 8), pool)
            return kernels.logits(rows, 1, pool).clone()
        return runner.stepper.logits(runner.model.decode_hidden(rows, pool.decode_update(len(rows)))).float()


@pytest.mark.parametrize("count", [1, 8, 16])
@pytest.mark.parametrize(("quantization", "cache"), [("none", "auto"), ("none", "fp8"), ("int8", "auto"), ("int4", "int8")])
def test_steps_agree_with_those_of_other_kernels(
    adapters: tuple[Path, dict[str, Path]],
    quantization: str,
    cache: str,
    count: int,
) -> None:
    engine, names = make(adapters, True, quantization, cache), [None, *adapters[1]]
    owners = [names[(i + 1) % len(names)] for i in range(count)]
    found, wanted = (logits_of(engine, owners, few_rows) for few_rows in (True, False))
    none = torch.tensor([owner is None for owner in owners], device="cuda")
    runner, kernels, pool, rows = prepare(engine, owners)
    with torch.inference_mode():
        plain = kernels.logits(rows, 1).clone()
        prepare(engine, owners)
        kernels.step(rows, 1, pool)
    assert torch.equal(found[none], plain[none])
    assert torch.equal(runner.slots.tokens[rows.long()].long(), found.argmax(-1))
    apart = [error(found[i], wanted[i]) for i in range(count)]
    # The head of packed weights has codes in one of them and bf16 in the other.
    assert max(apart) < (0.05 if quantization == "none" else 0.08), apart
    assert min([1.0, *(error(plain[i], wanted[i]) for i in range(count) if not none[i])]) > 0.1, "adapters change logits"


@pytest.mark.parametrize("quantization", ["none", "int4"])
def test_requests_stay_on_these_kernels_only_where_that_is_asked_for(
    adapters: tuple[Path, dict[str, Path]],
    quantization: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched = list[bool]()
    launch = few._launch

    def watched(*args: object, **values: object) -> int:
        launched.append(values.get("low") is not None)
        return launch(*args, **values)  # type: ignore[arg-type]

    monkeypatch.setattr(few, "_launch", watched)
    assert all(len(tokens) == 20 for tokens in answers(make(adapters, False, quantization), requests(8)))
    assert not any(launched)
    found, again = (answers(make(adapters, True, quantization), requests(8)) for _ in range(2))
    assert any(launched) and found == again


def test_a_row_of_a_step_that_may_check_guesses_is_the_same_alone_and_among_sixteen(
    adapters: tuple[Path, dict[str, Path]],
) -> None:
    engine, names = make(adapters, True, guesses=3), [None, *adapters[1]]
    owners = [names[i % len(names)] for i in range(16)]
    whole = logits_of(engine, owners, True)
    for row in (0, 3, 9, 14):
        assert torch.equal(logits_of(engine, owners, True, [row])[0], whole[row])


def test_guesses_change_no_token_of_any_adapter(tmp_path: Path) -> None:
    narrow = write_adapters(tmp_path, 0.02)  # answers repeat themselves
    guessing, plain = (make(narrow, True, guesses=3) for _ in range(2))
    guessing._payoffs.of = lambda requests: Always()  # type: ignore[method-assign, assignment]
    without(plain)
    params = SamplingParams(max_tokens=48, temperature=0.0, ignore_eos=True)
    asked = [([5, 6, 7, 8] * 5, name, params) for name in (None, *narrow[1])]
    assert answers(guessing, asked) == answers(plain, asked)
    assert 0 < guessing.stats().accepted_tokens <= guessing.stats().guessed_tokens and plain.stats().guessed_tokens == 0
