"""Updates of eight adapters in one batch; every ninth row of a decode step has none, and each prompt has one."""

from collections.abc import Iterator

import torch

from altiplano_kernels.multi_lora import kernel as lora
from kernel_benches.case import Case, Launch, Model, bf16, copies, each, rows_of

ADAPTERS, RANK, POOL_RANK = 8, 16, 64


def multi_lora(model: Model) -> Iterator[Case]:
    for rows in (1, 8, *model.decodes):
        owners = [1 + i % 9 if i % 9 < ADAPTERS else 0 for i in range(rows)]
        for name in ("qkv", "down"):
            yield update_case(model, name, owners, lora.DECODE)
    owners = [1 + i // model.prompts[1] % ADAPTERS for i in range(model.tokens)]
    yield update_case(model, "gate_up", owners, lora.PREFILL)


def bounds_of(model: Model, name: str) -> tuple[int, ...]:
    """Where the outputs of each module end."""
    if name == "qkv":
        return model.query, model.query + model.kv_heads * model.dim, model.qkv
    return (model.wide, 2 * model.wide) if name == "gate_up" else (model.hidden,)


def update_case(model: Model, name: str, owners: list[int], shape: lora.Shape) -> Case:
    (n, k), bounds, rows = model.weights[name], bounds_of(model, name), len(owners)
    used, updated = len(set(owners) - {0}), sum(owner > 0 for owner in owners)

    def prepare(device: str, turns: int) -> list[Launch]:
        downs = copies(bf16(ADAPTERS, len(bounds) * POOL_RANK, k, device=device, spread=0.02), turns)
        ups = copies(bf16(ADAPTERS, n, POOL_RANK, device=device, spread=0.02), turns)
        gain = torch.ones(ADAPTERS, n, dtype=torch.bfloat16, device=device)
        listed = lora.list_tiles(owners, [RANK] * ADAPTERS, shape, lora.most_tiles(rows, ADAPTERS, shape))
        tiles = torch.tensor(listed, dtype=torch.int32, device=device)
        x, out = bf16(rows, k, device=device), bf16(rows, n, device=device)
        early = shape is lora.DECODE  # as the engine has it
        pools = zip(downs, ups, strict=True)
        return each(lambda pool: lora.add_adapters(out, x, *pool, gain, bounds, tiles, shape, early), pools)

    numbers = RANK * (len(bounds) * k + n)
    moved = 2 * (used * (numbers + n) + updated * (k + 2 * n))
    words = f"{name}, rank {RANK}, {rows_of(rows)}, {used} adapter{'s' if used > 1 else ''}"
    return Case("multi_lora", model.name, words, moved, updated * (2 * numbers + 2 * n), prepare)
