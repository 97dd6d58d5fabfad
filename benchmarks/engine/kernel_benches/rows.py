"""What is done to each row between products: norms and the gated activation."""

from collections.abc import Iterator

import torch

from altiplano_kernels.embed_norm.kernel import add_norm, add_norm_parts, embed_rows
from altiplano_kernels.swiglu import kernel as swiglu_kernel
from kernel_benches.case import Case, Launch, Model, bf16, each, rows_of

EPS, SPLITS = 1e-5, 4


def embed_norm(model: Model) -> Iterator[Case]:
    for rows in model.decodes:
        yield embed_case(model, rows)
    for rows in (1, *model.decodes, model.tokens):
        yield add_case(model, rows)
    yield parts_case(model, model.decodes[0])


def embed_case(model: Model, rows: int) -> Case:
    def prepare(device: str, turns: int) -> list[Launch]:
        table, weight = bf16(model.vocab, model.hidden, device=device), bf16(model.hidden, device=device)
        slots, positions, at = (torch.arange(rows, dtype=torch.int32, device=device) for _ in range(3))
        residual, out = (bf16(rows, model.hidden, device=device) for _ in range(2))
        drawn = [torch.randint(model.vocab, (rows,), dtype=torch.int32, device=device) for _ in range(turns)]
        return each(lambda tokens: embed_rows(tokens, positions, slots, table, weight, residual, out, at, EPS, pdl=True), drawn)

    return Case(
        "embed_norm", model.name, f"embed_rows, {rows_of(rows)}", 6 * rows * model.hidden, 5 * rows * model.hidden, prepare
    )


def add_case(model: Model, rows: int) -> Case:
    decodes = rows <= model.decodes[-1]

    def prepare(device: str, turns: int) -> list[Launch]:
        weight = bf16(model.hidden, device=device)
        pairs = [(bf16(rows, model.hidden, device=device), bf16(rows, model.hidden, device=device)) for _ in range(turns)]
        # In place, as in the engine.
        return each(lambda pair: add_norm(*pair, weight, pair[0], EPS, pdl=decodes), pairs)

    return Case("embed_norm", model.name, f"add_norm, {rows_of(rows)}", 8 * rows * model.hidden, 6 * rows * model.hidden, prepare)


def parts_case(model: Model, rows: int) -> Case:
    def prepare(device: str, turns: int) -> list[Launch]:
        weight, out = bf16(model.hidden, device=device), bf16(rows, model.hidden, device=device)
        pairs = [
            (torch.randn(SPLITS, rows, model.hidden, device=device), bf16(rows, model.hidden, device=device))
            for _ in range(turns)
        ]
        return each(lambda pair: add_norm_parts(*pair, weight, out, EPS, pdl=True), pairs)

    moved, flops = (4 * SPLITS + 6) * rows * model.hidden, (5 + SPLITS) * rows * model.hidden
    return Case("embed_norm", model.name, f"add_norm_parts, {SPLITS} parts, {rows_of(rows)}", moved, flops, prepare)


def swiglu(model: Model) -> Iterator[Case]:
    for rows in (*model.decodes, model.tokens):
        yield swiglu_case(model, rows)


def swiglu_case(model: Model, rows: int) -> Case:
    decodes = rows <= model.decodes[-1]

    def prepare(device: str, turns: int) -> list[Launch]:
        out = bf16(rows, model.wide, device=device)
        given = [bf16(rows, 2 * model.wide, device=device) for _ in range(turns)]
        return each(lambda gate_up: swiglu_kernel.swiglu(gate_up, out, pdl=decodes), given)

    return Case("swiglu", model.name, rows_of(rows), 6 * rows * model.wide, 5 * rows * model.wide, prepare)
