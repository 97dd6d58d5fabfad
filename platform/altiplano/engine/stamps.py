"""The pattern that free pages carry for `Canary`: bytes that no step writes."""

from collections.abc import Iterable, Sequence

import torch


@torch.inference_mode()
def stamp(caches: Iterable[torch.Tensor], pages: Sequence[int]) -> None:
    """Overwrite `pages` of caches [layers, pages, ...] of any dtype, or of their scales."""
    if not pages:
        return
    for cache in caches:
        at = torch.tensor(pages, device=cache.device)
        for layer in cache.view(torch.uint8):
            layer[at] = _pattern(cache.dtype)


@torch.inference_mode()
def written(caches: Iterable[torch.Tensor], pages: Sequence[int]) -> list[int]:
    """Those of `pages` that do not carry the pattern in every byte of every cache; waits for the device."""
    if not pages:
        return []
    found = set[int]()
    for cache in caches:
        at = torch.tensor(pages, device=cache.device)
        differs = torch.zeros(len(pages), dtype=torch.bool, device=cache.device)
        for layer in cache.view(torch.uint8):  # a layer at a time: the cache may have taken nearly all memory
            differs |= (layer[at] != _pattern(cache.dtype)).flatten(1).any(1)
        found.update(page for page, differ in zip(pages, differs.tolist(), strict=True) if differ)
    return sorted(found)


def _pattern(kind: torch.dtype) -> int:
    """All ones are NaN in float32, bf16, float16 and e4m3. The codes of int8 end at -127, and 0x80 is -128."""
    return 0xFF if kind.is_floating_point else 0x80
