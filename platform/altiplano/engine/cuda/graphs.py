"""Whole decode steps as CUDA graphs, one per batch bucket, captured when first needed, in one memory pool."""

from collections.abc import Callable

import torch

UNROLLED = 8  # steps in one graph of a small bucket: the gap between two graphs costs as much as two kernels there
UNROLLED_ROWS = 16
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)


def bucket_of(batch: int) -> int:
    """The smallest bucket that holds `batch` rows; beyond the last one, the next multiple of 256."""
    return next((bucket for bucket in BUCKETS if bucket >= batch), -(-batch // 256) * 256)


class DecodeGraphs:
    """`step(bucket)` must only touch static tensors; what it allocates lives in the pool that all graphs share.

    Sharing is sound because graphs run one after another on one stream and leave nothing in the pool that a later one reads.
    """

    def __init__(self, step: Callable[[int], None], prepare: Callable[[int], None]) -> None:
        self._step, self._prepare = step, prepare
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def replay(self, bucket: int, times: int) -> None:
        """Launch `times` steps; the graphs must have been captured by `ensure` before the batch rows were written."""
        if bucket <= UNROLLED_ROWS:
            whole, times = divmod(times, UNROLLED)
            for _ in range(whole):
                self._graphs[bucket, UNROLLED].replay()
        for _ in range(times):
            self._graphs[bucket, 1].replay()

    def ensure(self, bucket: int) -> None:
        """Capture the bucket if it is new. `prepare(bucket)` must point all rows at scratch: the warm-up really runs."""
        if (bucket, 1) in self._graphs:
            return
        self._prepare(bucket)
        self._step(bucket)
        torch.cuda.synchronize()
        for steps in (1, UNROLLED) if bucket <= UNROLLED_ROWS else (1,):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                for _ in range(steps):
                    self._step(bucket)
            self._graphs[bucket, steps] = graph
