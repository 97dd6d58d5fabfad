"""The CUDA C++ kernels of a step of 1 to 16 rows: each reads its weight once, so bytes are its floor."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from altiplano_kernels.few_rows import kernel as few
from altiplano_kernels.few_rows.quantized import GROUP, Packed, pack
from kernel_benches.case import PAGE, Case, Launch, Model, bf16, copies, each, product_bytes, rows_of

EPS, BLOCKS = 1e-5, 1056  # blocks of the kernel that draws, at most
NAMES = {16: "bf16", 8: "int8", 6: "int6", 4: "int4"}
Multiply = Callable[[few.Weight], object]


def few_rows(model: Model) -> Iterator[Case]:
    for rows in (1, few.MOST_ROWS):
        yield begin_case(model, rows)
    layer = ("qkv", "o", "gate_up", "down")
    whole = (*layer, "head")
    # Of 4-bit models the head has 6 bits.
    for bits, counts, names in ((16, (1, 8, 16), whole), (8, (1,), whole), (4, (1, 8), layer), (6, (1, 8), ("head",))):
        for name in names:
            for rows in counts:
                yield product_case(model, name, rows, bits)
    yield unpack_case(model, "gate_up", 4)


def bytes_per_number(bits: int) -> float:
    return bits / 8 + (2 / GROUP if bits < 16 else 0)


def weights(model: Model, name: str, bits: int, device: str, turns: int) -> list[few.Weight]:
    n, k = model.weights[name]
    if bits == 16:
        return [*copies(bf16(n, k, device=device, spread=0.02), turns)]
    most = 2 ** (bits - 1) - 1
    codes = torch.randint(-most, most + 1, (n, k), dtype=torch.int8, device=device)
    scales = torch.full((n, k // GROUP), 0.02 / most, dtype=torch.float16, device=device)
    packed = pack(codes, scales, bits, model.dim if name == "qkv" else 16, halves=name == "gate_up")
    rest = (replace(packed, codes=packed.codes.clone(), scales=packed.scales.clone()) for _ in range(turns - 1))
    return [packed, *rest]


def step_of(model: Model, rows: int, device: str) -> few.Step:
    """As `begin` leaves it, each row in a page of its own."""
    step = few.Step(model.hidden, model.query, model.wide, model.dim, BLOCKS, device)
    step.lines[:rows] = torch.arange(rows, device=device) * 2 * model.kv_heads * PAGE + 5
    step.rope.uniform_(-1, 1)
    return step


def cache_of(model: Model, rows: int, device: str) -> torch.Tensor:
    return bf16(rows, 2, model.kv_heads, PAGE, model.dim, device=device)


def product_case(model: Model, name: str, rows: int, bits: int) -> Case:
    """The product of a layer with what is fused to it; the head draws."""
    n, k = model.weights[name]
    # Gate and up leave half as much as they multiply, and the head one candidate per block; residuals are read as well.
    out = {"gate_up": n // 2, "head": 0, "qkv": n}.get(name, 2 * n)

    def prepare(device: str, turns: int) -> list[Launch]:
        x = bf16(rows, k, device=device)
        multiply = fused(model, name, x, device)
        return each(multiply, weights(model, name, bits, device, turns))

    moved = product_bytes(rows, 0, k) + 2 * rows * out + int(n * k * bytes_per_number(bits))
    return Case("few_rows", model.name, f"{name}, {NAMES[bits]}, {rows_of(rows)}", moved, 2 * rows * n * k, prepare)


def fused(model: Model, name: str, x: torch.Tensor, device: str) -> Multiply:
    """The launch for a weight."""
    rows, k = x.shape
    gamma, step = torch.ones(k, dtype=torch.bfloat16, device=device), step_of(model, rows, device)
    if name == "qkv":
        cache = cache_of(model, rows, device)
        return lambda w: few.norm_qkv(x, w, gamma, EPS, step, cache, model.heads, first=False)
    if name == "gate_up":
        return lambda w: few.norm_swiglu(x, w, gamma, EPS, step.wide[:rows])
    if name == "head":
        slots, steps = (torch.arange(rows, dtype=torch.int32, device=device) for _ in range(2))
        seeds, temperatures = torch.arange(rows, device=device), torch.full((rows,), 0.7, device=device)
        return lambda w: few.norm_draw(x, w, gamma, EPS, slots, temperatures, seeds, steps, step)
    residual = bf16(rows, model.weights[name][0], device=device)
    return lambda w: few.add_linear(x, w, residual)


def begin_case(model: Model, rows: int) -> Case:
    def prepare(device: str, turns: int) -> list[Launch]:
        slots, at = (torch.arange(rows, dtype=torch.int32, device=device) for _ in range(2))
        tables = torch.arange(rows, dtype=torch.int32, device=device).view(rows, 1)
        embedding, cos_sin = bf16(model.vocab, model.hidden, device=device), torch.rand(PAGE, model.dim, device=device)
        step, cache = step_of(model, rows, device), cache_of(model, rows, device)
        drawn = [torch.randint(model.vocab, (rows,), dtype=torch.int32, device=device) for _ in range(turns)]
        return each(lambda tokens: few.begin(slots, tokens, at, tables, embedding, cos_sin, cache, step), drawn)

    moved = rows * (4 * model.hidden + 8 * model.dim)
    return Case("few_rows", model.name, f"begin, {rows_of(rows)}", moved, 0, prepare)


def unpack_case(model: Model, name: str, bits: int) -> Case:
    """To bf16, for products of more rows."""
    n, k = model.weights[name]

    def prepare(device: str, turns: int) -> list[Launch]:
        out = torch.empty(n, k, dtype=torch.bfloat16, device=device)
        packed = [w for w in weights(model, name, bits, device, turns) if isinstance(w, Packed)]
        return each(lambda w: few.unpack(w, out), packed)

    moved = int(n * k * (bytes_per_number(bits) + 2))
    return Case("few_rows", model.name, f"unpack {name}, {NAMES[bits]}", moved, n * k, prepare)
