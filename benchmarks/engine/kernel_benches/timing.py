"""Microseconds of a launch, on a GPU."""

from collections.abc import Sequence

import torch

from kernel_benches.case import Case, Launch

REPLAYS = 7
LEAST_US = 500  # of a graph, so that its own start is lost in it
MOST_LAUNCHES = 256
MOST_KEPT_BYTES = 40e9  # of earlier cases, by torch's allocator


def measure(case: Case) -> list[float]:
    """Microseconds per launch of each of REPLAYS replays of a CUDA graph in which all sets of inputs take their turns.

    Before each timed replay another one runs, so that the GPU is never waiting for the host when the clock starts.
    """
    if torch.cuda.memory_reserved() > MOST_KEPT_BYTES:
        torch.cuda.empty_cache()
    launches = case.prepare("cuda", case.turns)
    order = in_turns(launches, case.floor_us)
    with torch.inference_mode():
        for launch in launches[:3]:  # builds the kernels
            launch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in order:
                launch()
        marks = [(_mark(), _mark()) for _ in range(REPLAYS)]
        for start, end in marks:
            graph.replay()
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 / len(order) for start, end in marks]


def _mark() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def in_turns(launches: Sequence[Launch], floor_us: float) -> list[Launch]:
    """All launches, over again until they take LEAST_US at a third of the limit's speed, but never more than MOST_LAUNCHES."""
    rounds = max(1, int(min(LEAST_US / (3 * floor_us), MOST_LAUNCHES) / len(launches)))
    return list(launches) * rounds
