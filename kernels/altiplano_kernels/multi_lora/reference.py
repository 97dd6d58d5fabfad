"""The same in torch: one adapter after the other."""

from collections.abc import Sequence

import torch

from altiplano_kernels.lora.reference import add_lora


def add_adapters(
    out: torch.Tensor,
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    gain: torch.Tensor,
    bounds: tuple[int, ...],
    owners: Sequence[int],
    ranks: Sequence[int],
) -> None:
    """out[i] = out[i] * gain + x[i] @ down.T @ up.T, in place, with the weights of adapter owners[i] - 1; 0 leaves a row alone.

    Shapes and dtypes as in `kernel.add_adapters`, or all float64; ranks[i]: rank of adapter i + 1.
    """
    width = up.shape[2]
    for owner in sorted(set(owners) - {0}):
        rows = torch.tensor([i for i, o in enumerate(owners) if o == owner], device=x.device)
        for module, (first, end) in enumerate(zip((0, *bounds[:-1]), bounds, strict=True)):
            low = down[owner - 1, module * width : module * width + ranks[owner - 1]]
            high = up[owner - 1, first:end, : ranks[owner - 1]]
            add_lora(out[:, first:end], x, low, high, gain[owner - 1, first:end], rows)
