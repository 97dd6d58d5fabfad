"""Whole decode steps as CUDA graphs, one per batch bucket and kind of step, captured ahead or when first needed, in one memory pool."""

import gc
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)


def bucket_of(batch: int) -> int:
    """The smallest bucket that holds `batch` rows; beyond the last one, the next multiple of 256."""
    return next((bucket for bucket in BUCKETS if bucket >= batch), -(-batch // 256) * 256)


class Kind(NamedTuple):
    """What a step must do beyond the plain one, because one of its rows asks for it; and guesses for each of its requests."""

    filtered: bool = False
    adapted: bool = False
    guesses: int = 0


PLAIN = Kind()


def buckets_for(batch: int) -> list[int]:
    """Those of all batches of up to `batch` rows, from small to large."""
    largest = bucket_of(batch)
    return [*(bucket for bucket in BUCKETS if bucket <= largest), *range(BUCKETS[-1] + 256, largest + 1, 256)]


def unrolled(bucket: int, kind: Kind = PLAIN) -> int:
    """Steps in one graph: the gap between two graphs costs as much as several kernels of a small batch, and little of a large one."""
    return 8 if bucket <= 16 and not kind.guesses else 1


class DecodeGraphs:
    """`step(bucket, kind)` must only touch static tensors; what it allocates lives in the pool that all graphs share.

    Sharing is sound because graphs run one after another on one stream and leave nothing in the pool that a later one reads.
    """

    def __init__(self, step: Callable[[int, Kind], None], prepare: Callable[[int, Kind], None]) -> None:
        self._step, self._prepare = step, prepare
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, int, Kind], torch.cuda.CUDAGraph] = {}

    def replay(self, bucket: int, times: int, kind: Kind = PLAIN) -> None:
        """Launch `times` steps; the graphs must have been captured by `ensure` before the batch rows were written."""
        steps = unrolled(bucket, kind)
        for _ in range(times // steps):
            self._graphs[bucket, steps, kind].replay()
        for _ in range(times % steps):
            self._graphs[bucket, 1, kind].replay()

    def missing(self, wanted: Sequence[tuple[int, Kind]]) -> list[tuple[int, Kind]]:
        """Those of the buckets and kinds that `ensure` would capture now, in their order."""
        return [(bucket, kind) for bucket, kind in wanted if (bucket, 1, kind) not in self._graphs]

    def ensure(self, bucket: int, kind: Kind = PLAIN) -> None:
        """Capture the bucket if it is new. `prepare(bucket, kind)` must point all rows at scratch: the warm-up really runs."""
        if (bucket, 1, kind) in self._graphs:
            return
        self._prepare(bucket, kind)
        self._step(bucket, kind)
        torch.cuda.synchronize()
        # One step last: with it the bucket counts as captured, and a capture ahead may fail in between.
        for steps in sorted({1, unrolled(bucket, kind)}, reverse=True):
            self._graphs[bucket, steps, kind] = self._capture(bucket, steps, kind)

    def forget(self) -> None:
        """Give up all graphs and the memory that they share: what they point to moves. They are captured again when needed."""
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()

    def _capture(self, bucket: int, steps: int, kind: Kind) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # A collection in the middle could free another engine's graphs, which the driver forbids during a capture.
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                for _ in range(steps):
                    self._step(bucket, kind)
        finally:
            if collecting:
                gc.enable()
        return graph
