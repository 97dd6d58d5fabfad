"""What a GPU's engine does while nobody waits: it captures the graphs that steps may come to need, before a step has to stop for them."""

import logging
from collections.abc import Sequence

import torch

from altiplano.engine.cuda.graphs import DecodeGraphs, Kind
from altiplano.engine.cuda.stepper import Stepper

COMPILING_S = 0.1  # that one look at kernels which are being compiled takes at most

log = logging.getLogger("altiplano.engine")


class IdleCaptures:
    """Captures of `graphs` of `stepper`, one at a time, while the GPU has `reserve` bytes free for a step and as much again for a graph:
    the KV cache leaves room for steps, and none for graphs."""

    def __init__(self, graphs: DecodeGraphs, stepper: Stepper, reserve: int) -> None:
        self._graphs, self._stepper, self._reserve = graphs, stepper, reserve
        self._left = set[tuple[int, Kind]]()  # to the steps that need them

    def capture_next(self, wanted: Sequence[tuple[int, Kind]]) -> bool:
        """Capture the first of the buckets and kinds that is missing. False when there is none, or no memory."""
        missing = [graph for graph in self._graphs.missing(wanted) if graph not in self._left]
        if not missing:
            return False
        bucket, kind = missing[0]
        few, rows = self._stepper.few, bucket * (kind.guesses + 1)
        # Who captures beside the thread that compiles would compile the same kernels, for seconds, while a request may come.
        if (few is None or kind.adapted or rows > few.most_rows) and self._stepper.model.is_compiling(COMPILING_S):
            return True
        torch.cuda.empty_cache()  # as every capture does: else what steps have left behind counts as taken
        free = torch.cuda.mem_get_info()[0]
        if free < 2 * self._reserve:
            self._left.update(missing)
            sizes = free / 2**30, 2 * self._reserve / 2**30
            log.warning("no more graphs are captured ahead: the GPU has %.1f GiB free, and that needs %.1f GiB", *sizes)
            return False
        try:
            with torch.inference_mode():
                self._graphs.ensure(bucket, kind)
        except Exception as error:  # of any kind: the step that needs the graph meets it again, and somebody hears of it
            self._left.update(missing if isinstance(error, torch.OutOfMemoryError) else missing[:1])
            what = f"{bucket} rows, {kind}: {type(error).__name__}: {error}"
            log.warning("a graph was not captured ahead and is left to the step that needs it (%s)", what)
        return True
