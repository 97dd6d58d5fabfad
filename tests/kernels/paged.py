"""Ragged sequences in pages at random places. What no sequence has written is poison: NaN, or codes and scales that become one."""

import random
from dataclasses import dataclass

import torch

KINDS = [torch.bfloat16, torch.int8, torch.float8_e4m3fn]


@dataclass(frozen=True)
class Sizes:
    kv_heads: int
    group: int
    dim: int
    page: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


def random_sizes(dice: random.Random) -> Sizes:
    return Sizes(dice.randint(1, 3), dice.choice((1, 2, 3, 4, 8)), dice.choice((16, 32, 64)), dice.choice((16, 32)))


def random_lengths(dice: random.Random, page: int, count: int) -> list[int]:
    """The edges of pages, and what lies between."""
    return [dice.choice((1, page - 1, page, page + 1, 2 * page, dice.randint(1, 5 * page))) for _ in range(count)]


def poisoned(blocks: int, sizes: Sizes, kind: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A cache [blocks, 2, kv_heads, page, dim] and its scales that nothing may be read from."""
    shape = (blocks, 2, sizes.kv_heads, sizes.page, sizes.dim)
    if kind is torch.bfloat16:
        return torch.full(shape, float("nan"), dtype=kind, device=device), None
    # 0x7F is NaN in e4m3.
    cache = torch.full(shape, 0x7F, dtype=torch.int8, device=device).view(kind)
    return cache, torch.full(shape[:-1], float("nan"), dtype=torch.float16, device=device)


class Pages:
    """Sequences of `lengths` tokens, sequence i in slot i.

    cache, scales, tables: as the kernels take them, poisoned where no token is; behind the pages of a sequence its table has one of
    those. clean: float64, what the codes stand for, zero where no token is.
    """

    def __init__(self, sizes: Sizes, lengths: list[int], kind: torch.dtype, dice: random.Random, device: str) -> None:
        self.sizes, self.lengths = sizes, lengths
        needed = [-(-n // sizes.page) for n in lengths]
        blocks = sum(needed) + 3
        order = dice.sample(range(blocks), blocks)
        self.cache, self.scales = poisoned(blocks, sizes, kind, device)
        self.clean = torch.zeros(self.cache.shape, dtype=torch.float64)
        tables = torch.full((len(lengths), max(needed) + 1), order.pop(), dtype=torch.int32)
        for slot, n in enumerate(lengths):
            for index in range(needed[slot]):
                tables[slot, index] = block = order.pop()
                count = min(sizes.page, n - index * sizes.page)
                self._fill(block, count, kind, device)
        self.tables = tables.to(device)

    def _fill(self, block: int, count: int, kind: torch.dtype, device: str) -> None:
        shape = (2, self.sizes.kv_heads, count, self.sizes.dim)
        if self.scales is None:
            values = torch.randn(shape).to(kind)
            exact = values.double()
        else:
            values = torch.randint(-127, 128, shape).to(torch.int8) if kind is torch.int8 else (torch.randn(shape) * 50).to(kind)
            scale = (0.005 + 0.02 * torch.rand(shape[:-1])).half()
            exact = values.double() * scale.double()[..., None]
            self.scales[block, :, :, :count] = scale.to(device)
        self.cache[block, :, :, :count] = values.to(device)
        self.clean[block, :, :, :count] = exact
