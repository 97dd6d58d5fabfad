"""Best-fit packing: several rows in one sequence, no row cut."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Groups of indices whose lengths sum to at most `capacity`: longest first, each into the fullest pack that has room.

    O(n log n) look-ups. Within a pack, and among packs, the order follows the input, so the result depends on `lengths` only.

    Raises:
        ValueError: a row is longer than `capacity`.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (space left, pack), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        need = lengths[index]
        if need > capacity:
            raise ValueError(f"row {index} has {need} tokens, more than {capacity}: raise data.max_length or remove the row")
        at = bisect_left(room, (need, -1))
        if at == len(room):
            packs.append([index])
            insort(room, (capacity - need, len(packs) - 1))
        else:
            left, pack = room.pop(at)
            packs[pack].append(index)
            insort(room, (left - need, pack))
    return sorted((sorted(pack) for pack in packs), key=lambda pack: pack[0])
