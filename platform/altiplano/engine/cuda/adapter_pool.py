"""All loaded adapters side by side on the GPU, at addresses that never change, so that captured steps can use any mix of them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from altiplano.engine.adapters import Adapter
from altiplano.engine.config import LlamaConfig
from altiplano.engine.errors import AdapterError
from altiplano_kernels.multi_lora.kernel import DECODE, HEADER, Shape, add_adapters, list_tiles, most_tiles

# Adds the adapters' share to a product of a layer, in place: (product as `Layer` names it, layer, input, output).
Update = Callable[[str, int, torch.Tensor, torch.Tensor], None]

PRODUCTS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


class _Product(NamedTuple):
    """down: [layers, adapters, modules * rank, in]; up: [layers, adapters, out, rank]; gain: [layers, adapters, out]."""

    down: torch.Tensor
    up: torch.Tensor
    gain: torch.Tensor
    bounds: tuple[int, ...]  # where each module's outputs end


class AdapterPool:
    """Room for `max_loras` adapters up to `max_rank`, in bf16. To load one is to copy it into its place, behind the steps under way.

    `shape`: of the tiles of decode steps; sums are in the same order as in prompts if it is that of prompts.

    Raises:
        AdapterError: the GPU has too little memory left; the message says how much is needed.
    """

    def __init__(
        self, config: LlamaConfig, max_loras: int, max_rank: int, max_batch: int, device: str, shape: Shape = DECODE
    ) -> None:
        self._rank = max(16, 1 << (max_rank - 1).bit_length())  # what Triton can address
        self._shape = shape
        self._names: list[str | None] = [None] * max_loras
        self._ranks = [0] * max_loras
        hidden, wide = config.hidden_size, config.intermediate_size
        query, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        sizes = {
            "qkv": (hidden, (query, kv, kv)),
            "o": (query, (hidden,)),
            "gate_up": (hidden, (wide, wide)),
            "down": (wide, (hidden,)),
        }
        lead, tiles = (config.num_hidden_layers, max_loras), most_tiles(max_batch, max_loras, shape) * (HEADER + shape.rows)
        try:
            self.products = {name: self._room(lead, inputs, outputs, device) for name, (inputs, outputs) in sizes.items()}
            self._tiles = torch.zeros(tiles, dtype=torch.int32, device=device)
        except torch.OutOfMemoryError as error:
            numbers = sum(len(outputs) * inputs + sum(outputs) for inputs, outputs in sizes.values()) * self._rank
            raise AdapterError(
                f"adapters need {numbers * lead[0] * lead[1] * 2 / 2**30:.1f} GiB at max_loras {max_loras} and max_lora_rank {max_rank}, "
                "and the GPU has less left: lower either of them, or num_blocks"
            ) from error

    def load(self, adapter: Adapter) -> None:
        """Copy an adapter into its place, or into a free one; there must be one."""
        at = self._names.index(adapter.name if adapter.name in self._names else None)
        for name, modules in PRODUCTS.items():
            product = self.products[name]
            for layer, pairs in enumerate(adapter.pairs):
                down, up, gain = product.down[layer, at], product.up[layer, at], product.gain[layer, at]
                # What the last owner of the place had and this one does not.
                down.zero_()
                up.zero_()
                gain.fill_(1)
                for module, first, end in zip(modules, (0, *product.bounds), product.bounds, strict=False):
                    if module in pairs:
                        low, high, strength = pairs[module]
                        start = modules.index(module) * self._rank
                        down[start : start + adapter.rank] = low
                        up[first:end, : adapter.rank] = high
                        if strength is not None:
                            gain[first:end] = strength
        self._names[at], self._ranks[at] = adapter.name, adapter.rank

    def unload(self, name: str) -> None:
        """Free an adapter's place."""
        self._names[self._names.index(name)] = None

    def tiles(self, owners: Sequence[str | None], shape: Shape) -> list[int]:
        """The tiles of rows whose adapters are `owners`."""
        return list_tiles(self._numbers(owners), self._ranks, shape)

    def set_rows(self, owners: Sequence[str | None], bucket: int) -> None:
        """Make `owners` the adapters of a decode step's rows, for `decode_update(bucket)`; asynchronous."""
        count = most_tiles(bucket, len(self._names), self._shape)
        tiles = torch.tensor(list_tiles(self._numbers(owners), self._ranks, self._shape, count), dtype=torch.int32)
        self._tiles[: len(tiles)].copy_(tiles.pin_memory() if self._tiles.is_cuda else tiles, non_blocking=True)

    def decode_update(self, bucket: int) -> Update:
        """The update of a decode step of `bucket` rows, by the list of the last `set_rows`. Capturable."""
        count = most_tiles(bucket, len(self._names), self._shape)
        return partial(self._add, self._tiles[: count * (HEADER + self._shape.rows)], self._shape, self._tiles.is_cuda)

    def update(self, tiles: torch.Tensor, shape: Shape) -> Update:
        """The update of rows by a list of `tiles`: int32, on the device."""
        return partial(self._add, tiles, shape, False)

    def _add(
        self, tiles: torch.Tensor, shape: Shape, pdl: bool, name: str, layer: int, x: torch.Tensor, out: torch.Tensor
    ) -> None:
        product = self.products[name]
        add_adapters(out, x, product.down[layer], product.up[layer], product.gain[layer], product.bounds, tiles, shape, pdl)

    def _numbers(self, owners: Sequence[str | None]) -> list[int]:
        """From 1; 0 for none."""
        numbers = {name: number for number, name in enumerate(self._names, 1) if name is not None}
        return [0 if owner is None else numbers[owner] for owner in owners]

    def _room(self, lead: tuple[int, int], inputs: int, outputs: tuple[int, ...], device: str) -> _Product:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*lead, *shape, dtype=torch.bfloat16, device=device)

        bounds = tuple(sum(outputs[: i + 1]) for i in range(len(outputs)))
        return _Product(zeros(len(outputs) * self._rank, inputs), zeros(bounds[-1], self._rank), zeros(bounds[-1]), bounds)
