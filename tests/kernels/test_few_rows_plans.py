"""Plans of the kernels for few rows, without a GPU: what linear.cu asserts of each launch holds, and a block fits into shared memory."""

import ctypes
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from altiplano_kernels.few_rows import kernel as few
from altiplano_kernels.few_rows.kernel import CHUNK, DRAW, LOGITS, PLAIN, QKV, RESIDUAL, SWIGLU, TUNED, Plan
from altiplano_kernels.few_rows.quantized import GROUP, Packed

SHARED = 227 * 1024  # bytes that a block may have, static and dynamic
MOST_BLOCKS = 1056  # that a kernel which draws has places for: altiplano.engine.cuda.few_rows
ASSERTS = re.findall(r'static_assert\((.+), "(.+)"\);', few.LINEAR.read_text())
# Mode, n and k of each product of a model, by the sizes of its heads.
PRODUCTS = {
    (32, 8, 64): [(QKV, 3072, 2048), (RESIDUAL, 2048, 2048), (SWIGLU, 16384, 2048), (RESIDUAL, 2048, 8192), (DRAW, 128256, 2048)],
    (24, 8, 128): [
        (QKV, 5120, 3072),
        (RESIDUAL, 3072, 3072),
        (SWIGLU, 16384, 3072),
        (RESIDUAL, 3072, 8192),
        (DRAW, 128256, 3072),
    ],
}
HEADS = {product: heads for heads, products in PRODUCTS.items() for product in products}


class Launch(NamedTuple):
    """What the kernel is compiled with, and launched: blocks, threads and bytes of dynamic shared memory."""

    options: Mapping[str, int]
    blocks: int
    threads: int
    shared: int


def launched(mode: int, n: int, k: int, rows: int, bits: int, plan: Plan) -> Launch:
    """A product of x: [rows, k] and w: [n, k] as it would be launched, with all that plans may ask for."""
    heads, kv_heads, dim = HEADS.get((mode, n, k), (32, 8, 64))
    found: list[Launch] = []

    class Kernel:
        def __init__(self, options: tuple[tuple[str, int], ...]) -> None:
            self.options, self.allowed = dict(options), 0

        def allow(self, shared: int) -> None:
            self.allowed = shared

        def launch(self, grid: tuple[int, int, int], threads: int, arguments: ctypes.Structure, shared: int) -> None:
            assert shared == self.allowed and grid[1:] == (1, 1)
            found.append(Launch(self.options, grid[0], threads, shared))

    def build(source: Path, name: str, options: tuple[tuple[str, int], ...], device: int | None) -> Kernel:
        assert source == few.LINEAR and name == "few_rows_linear"
        return Kernel(options)

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, gamma, step = empty(rows, k), empty(k), few.Step(k, heads * dim, 8192, dim, MOST_BLOCKS, "meta")
    w: few.Weight = empty(n, k)
    if bits < 16:
        codes = empty(n // 16, k // GROUP, 32, 8 * bits, dtype=torch.uint8)
        w = Packed(codes, empty(n // 16, k // GROUP, 8, 2, dtype=torch.float16), bits, (n, k))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few, "build", build)
        if mode == PLAIN:
            few.linear(x, w, empty(rows, n), gamma, 1e-5, plan)
        if mode == RESIDUAL:
            few.add_linear(x, w, empty(rows, n), plan)
        if mode == QKV:
            few.norm_qkv(x, w, gamma, 1e-5, step, empty(3, 2, kv_heads, 32, dim), heads, plan)
        if mode == SWIGLU:
            few.norm_swiglu(x, w, gamma, 1e-5, empty(rows, n // 2), plan, step.turn)
        if mode == DRAW:
            numbers = empty(rows, dtype=torch.int32)
            few.norm_draw(x, w, gamma, 1e-5, numbers, numbers, numbers, numbers, step, plan)
        if mode == LOGITS:
            few.norm_logits(x, w, gamma, 1e-5, empty(rows, n, dtype=torch.float32), plan, step.turn)
    [launch] = found
    return launch


def holds(asserted: str, names: Mapping[str, int]) -> bool:
    """What a condition of C++ without a question mark says of these names."""
    python = re.sub(r"!(?!=)", " not ", asserted.replace("&&", " and ").replace("||", " or ").replace("/", "//"))
    return bool(eval(python, {"__builtins__": {}}, dict(names)))


def faults_of(launch: Launch) -> list[str]:
    """Why the launch would be refused, or would write where it must not."""
    options = launch.options
    warps, columns = options["WARPS"], 8 * options["NT"]
    chunk = CHUNK[options["BITS"]]
    names = {**options, "CHUNK": chunk, "THREADS": launch.threads, "STEPS": options["K"] // (warps * chunk)}
    found = [message for asserted, message in ASSERTS if not holds(asserted, names)]
    # Two buffers of sums, the squares of each row, and two turns.
    static = 4 * (2 * warps * 16 * columns + columns * warps + 2)
    if static + launch.shared > SHARED:
        found.append("too much shared memory")
    if launch.threads != 32 * warps or launch.threads > 1024:
        found.append("no such block")
    if options["MODE"] == DRAW and launch.blocks > MOST_BLOCKS:
        found.append("no place for what each block draws")
    return found


def faults(mode: int, n: int, k: int, rows: int, bits: int, plan: Plan) -> list[str]:
    """Those of the launch, and what would be asked for in vain."""
    launch = launched(mode, n, k, rows, bits, plan)
    assert (launch.options["WARPS"], launch.options["DEPTH"], launch.options["K"]) == (plan.warps, plan.depth, k)
    shares = launch.options["NORM"] or launch.options["STAGED"]
    assert launch.shared >= plan.room * 1024 and (not shares or launch.shared >= rows * (k + 32) * 2)
    vain = {"TURNS": "turns without a norm", "AHEAD": "several tiles ahead"}
    asked = {"TURNS": plan.turns, "AHEAD": plan.ahead}
    return faults_of(launch) + [vain[name] for name in vain if asked[name] and not launch.options[name]]


@pytest.mark.parametrize("key", TUNED, ids=str)
def test_what_was_tuned_can_be_launched(key: tuple[int, int, int, int]) -> None:
    mode, n, k, bits = key
    assert (mode, n, k) in HEADS, "nobody has a product of this size"
    for rows in range(1, 9):
        plan = few.choose_plan(mode, n, k, rows, bits)
        assert plan == TUNED[key][rows > 1]
        for kind in (DRAW, LOGITS) if mode == DRAW else (mode,):
            assert few.choose_plan(kind, n, k, rows, bits) == plan
            assert not faults(kind, n, k, rows, bits, plan), (rows, plan)


@pytest.mark.parametrize("bits", [16, 8, 6, 4])
@pytest.mark.parametrize("product", HEADS, ids=str)
def test_plans_of_both_models_can_be_launched_whatever_the_rows(product: tuple[int, int, int], bits: int) -> None:
    """PLAIN: queries, keys and values that an 8-bit cache takes from elsewhere."""
    mode, n, k = product
    for kind in {QKV: (QKV, PLAIN), DRAW: (DRAW, LOGITS)}.get(mode, (mode,)):
        steady = [few.steady_plan(kind, n, k, rows, bits) for rows in range(1, 17)]
        for rows, plan in enumerate(steady, 1):
            assert not faults(kind, n, k, rows, bits, plan), (kind, rows, plan)
            chosen = few.choose_plan(kind, n, k, rows, bits)
            assert not faults(kind, n, k, rows, bits, chosen), (kind, rows, chosen)
        assert len({plan.warps for plan in steady}) == 1, "the order of additions would depend on the rows"


def test_what_fits_eight_rows_is_not_asked_of_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    product = (RESIDUAL, 2048, 8192, 4)
    staged, ahead = Plan(8, 2, staged=True), Plan(16, 4, ahead=True)
    for plan in (staged, ahead):
        monkeypatch.setitem(TUNED, product, (plan, plan))
        assert few.steady_plan(*product[:3], 8, 4) == plan and not faults(*product[:3], 8, 4, plan)
        at_sixteen = few.steady_plan(*product[:3], 16, 4)
        assert at_sixteen.warps == plan.warps and not at_sixteen.staged and not at_sixteen.ahead
        assert not faults(*product[:3], 16, 4, at_sixteen)


@pytest.mark.parametrize(
    ("product", "rows", "plan", "fault"),
    [
        ((QKV, 3072, 2048, 16), 1, Plan(5, 1), "the chunks must divide K"),
        ((QKV, 3072, 2048, 16), 8, Plan(8, 3), "the chunks must divide K"),
        ((QKV, 3072, 2048, 8), 8, Plan(8, 4), "the chunks must divide K"),
        ((RESIDUAL, 2048, 2048, 16), 1, Plan(1, 4), "one thread per pair of sums"),
        ((RESIDUAL, 2048, 2048, 16), 9, Plan(2, 4), "one thread per pair of sums"),
        ((RESIDUAL, 2048, 2048, 16), 8, Plan(8, 4, turns=True), "turns without a norm"),
        ((RESIDUAL, 2048, 8192, 16), 8, Plan(64, 1), "no such block"),
        ((RESIDUAL, 2048, 8192, 16), 14, Plan(8, 2, staged=True), "too much shared memory"),
        ((QKV, 3072, 2048, 4), 1, Plan(8, 2, staged=True), "normed rows are in shared memory anyway"),
        ((RESIDUAL, 2048, 8192, 4), 1, Plan(8, 4, ahead=True), "only codes that are all on their way can be turned ahead"),
        ((RESIDUAL, 2048, 2048, 16), 1, Plan(8, 4, ahead=True), "only codes that are all on their way can be turned ahead"),
        ((SWIGLU, 16384, 2048, 4), 1, Plan(8, 2, 264, ahead=True), "several tiles ahead"),
        ((SWIGLU, 16384, 2048, 16), 1, Plan(8, 4, room=220), "too much shared memory"),
        ((DRAW, 128256, 3072, 16), 2, Plan(12, 2), "no place for what each block draws"),
    ],
)
def test_a_wrong_plan_is_found(product: tuple[int, int, int, int], rows: int, plan: Plan, fault: str) -> None:
    mode, n, k, bits = product
    assert faults(mode, n, k, rows, bits, plan) == [fault]


def test_the_kernels_own_assertions_are_read() -> None:
    assert len(ASSERTS) == few.LINEAR.read_text().count("static_assert") == 5
    launch = launched(RESIDUAL, 2048, 2048, 1, 16, Plan(8, 4))
    [message] = [message for asserted, message in ASSERTS if "TURNS" in asserted]
    assert faults_of(launch._replace(options={**launch.options, "TURNS": 1})) == [message]


def test_places_of_draws_are_those_of_the_engine() -> None:
    pytest.importorskip("triton")
    from altiplano.engine.cuda.few_rows import MOST_BLOCKS as places

    assert places == MOST_BLOCKS
