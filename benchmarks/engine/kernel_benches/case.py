"""What is measured: one launch at one shape, beside what it must move and do. Knows no GPU.

The floor of a launch is the larger of two times: its bytes at the speed of a device copy, and its operations at that of a large bf16
product, both measured on one H200. `bytes` counts every input and output once. `flops` counts a multiply-add as two, and of functions
such as exp one each: they never are the limit. Products of 8 bits are held against the limit of bf16 too, for theirs was not
measured: large ones may pass it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

COPY_BYTES_PER_S = 4.22e12  # one H200, a device copy: read and written bytes
FLOP_PER_S = 747e12  # one H200, bf16 product of 8192³
PAGE = 32  # tokens of a page, as in the engine
# Together, inputs that take turns are this many bytes: five times the L2 cache, so that none comes from it.
TURNS_BYTES = 256e6
MOST_TURNS = 128

T = TypeVar("T")
Launch = Callable[[], object]
# (device, how many sets of inputs take turns) to one launch per set.
Prepare = Callable[[str, int], Sequence[Launch]]


@dataclass(frozen=True)
class Model:
    """The sizes of a model and of what its kernels are measured at."""

    name: str
    hidden: int
    wide: int
    heads: int
    kv_heads: int
    dim: int
    vocab: int = 128256
    decodes: tuple[int, ...] = (64, 256)  # rows of a batched decode step
    prompts: tuple[int, int] = (8, 1024)  # of a prefill step: how many, and tokens of each
    contexts: tuple[int, int] = (640, 2048)  # tokens before a decode step, its own included: usual ones and many

    @property
    def tokens(self) -> int:
        """Rows of a prefill step."""
        return self.prompts[0] * self.prompts[1]

    @property
    def query(self) -> int:
        return self.heads * self.dim

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.dim

    @property
    def weights(self) -> dict[str, tuple[int, int]]:
        """[n, k] of the four weights of a layer, and of the head."""
        hidden, wide = self.hidden, self.wide
        layer = {"qkv": (self.qkv, hidden), "o": (hidden, self.query), "gate_up": (2 * wide, hidden), "down": (hidden, wide)}
        return layer | {"head": (self.vocab, hidden)}


MODELS = (Model("1b", 2048, 8192, 32, 8, 64), Model("3b", 3072, 8192, 24, 8, 128))


@dataclass(frozen=True)
class Case:
    """One measurement. kernel: a folder of altiplano_kernels, or "gemm" for the library's product; shape: in words, unique for its
    kernel and model; model: "any" where the kernel knows only the vocabulary."""

    kernel: str
    model: str
    shape: str
    bytes: int
    flops: int
    prepare: Prepare

    @property
    def floor_us(self) -> float:
        return 1e6 * max(self.bytes / COPY_BYTES_PER_S, self.flops / FLOP_PER_S)

    @property
    def limit(self) -> str:
        """Which of the two times is the floor."""
        return "bytes" if self.bytes / COPY_BYTES_PER_S >= self.flops / FLOP_PER_S else "operations"

    def percent(self, us: float) -> float:
        """Of the card's limit, for a launch of `us` microseconds."""
        return 100 * self.floor_us / us

    @property
    def turns(self) -> int:
        """Sets of inputs that take turns. The rows of a small step stay in the L2 cache all the same, as they do in the engine."""
        return int(min(MOST_TURNS, max(2, -(-TURNS_BYTES // self.bytes))))


Bench = Callable[[Model], Iterator[Case]]


def rows_of(count: int) -> str:
    """In words."""
    return f"{count:,} row{'s' if count > 1 else ''}".replace(",", " ")


def each(launch: Callable[[T], object], turns: Iterable[T]) -> list[Launch]:
    """`launch` with the inputs of each turn."""
    return [partial(launch, inputs) for inputs in turns]


def bf16(*shape: int, device: str, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16) * spread


def copies(tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    """`count` tensors of the same numbers in places of their own."""
    return [tensor, *(tensor.clone() for _ in range(count - 1))]


def product_bytes(rows: int, n: int, k: int, weight: float = 2) -> int:
    """Of bf16 [rows, n] = [rows, k] times [n, k], with `weight` bytes per number of the weight."""
    return int(n * k * weight) + 2 * rows * (n + k)
