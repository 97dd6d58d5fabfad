"""Launches as the engine has them: in a graph, whose kernels start early and whose replays find other numbers in the same places."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def captured(launch: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of what `launch` launches, after one launch outside that compiles, and what it returned: each replay writes there."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = launch()
    return graph, found
