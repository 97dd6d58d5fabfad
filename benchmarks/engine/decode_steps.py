"""Decode steps without the engine's loop: slots with pages in a row, and the time of a step in a graph. What the tuning programs share."""

import statistics
from collections.abc import Callable

import torch

from altiplano.engine.cuda.runner import CudaRunner

PAGE = 32


def pages_per_slot(context: int) -> int:
    """Of steps that begin at `context`."""
    return -(-(context + 64) // PAGE)


def place(runner: CudaRunner, count: int, width: int, position: int, temperature: float = 0.0) -> None:
    """Set the first `count` slots to a token at `position`, each with `width` pages of its own."""
    slots = list(range(count))
    for slot in slots:
        runner.slots.set_pages(slot, range(slot * width, (slot + 1) * width), fresh=True)
    runner.slots.upload_tables()
    runner.slots.write(slots, [1] * count, [position] * count, [0] * count, [temperature] * count, [0] * count)


def capture(step: Callable[[], object], steps: int) -> torch.cuda.CUDAGraph:
    """A graph of `steps` of them, after one that warms up."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(steps):
            step()
    return graph


def replayed(runner: CudaRunner, graph: torch.cuda.CUDAGraph, steps: int, positions: torch.Tensor) -> float:
    """Microseconds of a step of a graph of `steps`, which begin at `positions`: int32 [slots]."""
    runner.slots.positions.copy_(positions)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / steps * 1e3


def timed(runner: CudaRunner, step: Callable[[], object], steps: int, replays: int) -> float:
    """Median microseconds of `step`, in a new graph of `steps`, which all begin at the slots' present positions."""
    graph, positions = capture(step, steps), runner.slots.positions.clone()
    times = [replayed(runner, graph, steps, positions) for _ in range(replays)]
    runner.slots.positions.copy_(positions)
    return statistics.median(times)
