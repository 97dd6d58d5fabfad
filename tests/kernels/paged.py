"""Ragged sequences in pages at random places. What no sequence has written is poison: NaN, or codes and scales that become one."""

import random
from dataclasses import dataclass

import torch

from altiplano_kernels.paged_attention import reference

KINDS = [torch.bfloat16, torch.int8, torch.float8_e4m3fn]
# Of queries, for the interpreter has no product of bf16; and how far an answer may be from float64.
QUERY, BOUND = (torch.bfloat16, 8e-3) if torch.cuda.is_available() else (torch.float32, 3e-3)


@dataclass(frozen=True)
class Sizes:
    kv_heads: int
    group: int
    dim: int
    page: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


def chosen_for_many_rows() -> set[tuple[tuple[int, int, int], int, tuple[int, int, int]]]:
    """Heads, KV heads and their size; splits; tile, stages and warps: what decode attention takes for steps of many rows of both models."""
    from altiplano_kernels.paged_attention.kernel import choose_splits, choose_tiling

    return {
        (shape, choose_splits(rows, *shape[1:]), choose_tiling(rows, *shape[1:]))
        for shape in ((32, 8, 64), (24, 8, 128))
        for rows in (24, 64, 192, 256, 512)
    }


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

    def error(self, query: torch.Tensor, found: torch.Tensor, slot: int, start: int) -> float:
        """How far what is `found` for the tokens of a sequence from `start` on is from float64, relative to it. query, found: [tokens, heads * dim]."""
        found = found.double().cpu()
        assert bool(found.isfinite().all()), ("poison was read", slot, start)
        asked = query.cpu().double().reshape(-1, self.sizes.heads, self.sizes.dim)
        wanted = reference.prefill(asked, self.clean, self.tables.cpu().long()[slot], start).flatten(1)
        return float((found - wanted).norm() / wanted.norm())


class LastRows:
    """What decode kernels take and leave: a row for the last token of the sequence in each of `slots`.

    query, out: bf16 [rows, heads * dim], parts of something wider, as in a buffer of queries, keys and values; positions, rows: int32
    [rows]. `kind`: of queries where they cannot be bf16.
    """

    def __init__(self, pages: Pages, slots: list[int], kind: torch.dtype = torch.bfloat16) -> None:
        device, self._pages, self._slots = pages.tables.device, pages, slots
        self._lengths = torch.tensor([pages.lengths[slot] for slot in slots], device=device)
        self.query, self.out = (
            wider(len(slots), pages.sizes.heads * pages.sizes.dim, dtype, device) for dtype in (kind, torch.bfloat16)
        )
        self.positions, self.rows = self._lengths.int() - 1, torch.tensor(slots, dtype=torch.int32, device=device)

    def ask(self) -> None:
        """Ask anew: other queries, and poison where the answer goes."""
        self.query.copy_(torch.randn(self.query.shape).bfloat16())
        self.out.fill_(float("nan"))

    def errors(self) -> torch.Tensor:
        """How far the answer of each row is from float64, relative to it: float64 [rows]."""
        sizes = self._pages.sizes
        asked, tables = self.query.double().reshape(-1, sizes.heads, sizes.dim), self._pages.tables.long()[self._slots]
        wanted = reference.decode(asked, self._pages.clean.to(tables.device), tables, self._lengths).flatten(1)
        found = self.out.double()
        assert bool(found.isfinite().all()), "poison was read"
        errors: torch.Tensor = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
        return errors


def wider(rows: int, width: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Poisoned [rows, width] as a part of something wider."""
    return torch.full((rows, width + 64), float("nan"), dtype=dtype, device=device)[:, :width]
