"""Tilings of `tile_linear`, tried one product after another on whole decode steps: what each makes of the time of a step.

A graph with the new tiling and one with the present choice take turns, because a card that works hard gets slower within seconds.

usage: PYTHONPATH=platform:kernels python benchmarks/engine/tune_tiles.py MODEL ROWS[,ROWS…] CONTEXT [TEMPERATURE]
"""

import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import decode_steps
import torch
from workloads import model_directory

from altiplano.engine import EngineConfig
from altiplano.engine.cuda.graphs import PLAIN
from altiplano.engine.cuda.model import KINDS
from altiplano.engine.cuda.runner import CudaRunner
from altiplano_kernels.tile_linear import kernel as tile
from altiplano_kernels.tile_linear.kernel import Tiling

STEPS, TURNS, SHOWN = 3, 7, 5
PROCESSORS = 132
SHAPES = ((1, 1), (2, 1), (1, 2), (3, 1), (4, 1), (2, 2))  # groups, tiles of a group
RINGS = (
    (8, 1, 64),
    (6, 1, 64),
    (5, 1, 64),
    (4, 1, 64),
    (6, 2, 64),
    (4, 2, 64),
    (3, 2, 64),
    (4, 3, 64),
    (6, 1, 128),
    (4, 1, 128),
    (3, 2, 128),
)


def candidates(kind: int, rows: int, n: int, k: int) -> Iterator[Tiling]:
    """Tilings that waste few rows and have about as many blocks as the card has room for."""
    for (groups, tiles), columns, splits, (stages, resident, depth) in product(SHAPES, (64, 128), (1, 2, 3, 4, 8), RINGS):
        tiling = Tiling(groups, tiles, columns, splits, stages, resident, depth)
        down = -(-rows // tiling.rows)
        blocks, room = down * (n // columns) * splits, PROCESSORS * resident
        many = kind == tile.DRAW or room / 3 <= blocks <= 2.1 * room
        if tile.fits(tiling, n, k) and many and down * tiling.rows < 1.5 * max(rows, 48) and (splits == 1 or kind == tile.PARTS):
            yield tiling


def graph_of(runner: CudaRunner, rows: int) -> torch.cuda.CUDAGraph:
    return decode_steps.capture(lambda: runner._decode_step(rows, PLAIN), STEPS)


def against(runner: CudaRunner, new: torch.cuda.CUDAGraph, old: torch.cuda.CUDAGraph) -> tuple[float, float]:
    """Time of `new` over that of `old`, and its microseconds a step."""
    positions = runner.slots.positions.clone()

    def once(graph: torch.cuda.CUDAGraph) -> float:
        return decode_steps.replayed(runner, graph, STEPS, positions)

    rounds = [(once(old), once(new), once(new), once(old)) for _ in range(TURNS)]
    return statistics.median((b + c) / (a + d) for a, b, c, d in rounds), statistics.median(b for _, b, _, _ in rounds)


def tune(runner: CudaRunner, model: str, size: int) -> None:
    """Each product's best beside the others' best so far, all of them twice; prints the fastest."""
    layer, weights = runner.model.weights.layers[0], runner.model.weights
    products = {name: (kind, getattr(layer, name)) for name, kind in KINDS.items()} | {"head": (tile.DRAW, weights.head)}
    tries = {name: list(candidates(kind, size, *w.shape)) for name, (kind, w) in products.items()}
    with ThreadPoolExecutor(16) as pool:
        list(
            pool.map(
                lambda one: tile.compile_tiling(*one), [(t, products[name][0]) for name, some in tries.items() for t in some]
            )
        )
    first, chosen = graph_of(runner, size), tile.choose
    present: dict[str, Tiling | None] = {name: chosen(size, w, kind) for name, (kind, w) in products.items()}

    def choose(rows: int, w: torch.Tensor, kind: int) -> Tiling | None:
        name = next(name for name, (k, like) in products.items() if k == kind and like.shape == w.shape)
        return present[name] if rows == size else chosen(rows, w, kind)

    tile.choose = choose
    try:
        for name in [*products, *products]:
            kept, found = present[name], []
            for tiling in dict.fromkeys((kept, None, *tries[name])):
                present[name] = tiling
                runner.model.tilings.clear()
                found.append((*against(runner, graph_of(runner, size), first), tiling))
            found.sort(key=lambda one: one[0])
            present[name], tries[name] = found[0][2], [tiling for _, _, tiling in found[:SHOWN] if tiling is not None]
            print(
                f"  {name}: "
                + "; ".join(f"{share:.4f} {us:.0f} us {tiling and tuple(tiling)}" for share, us, tiling in found[:SHOWN]),
                flush=True,
            )
        share, us = against(runner, graph_of(runner, size), first)
        print(f"{model} {size} rows: {share:.4f} of the time before, {us:.0f} us with {present}", flush=True)
    finally:
        tile.choose = chosen
        runner.model.tilings.clear()


def main(model: str, sizes: list[int], context: int, temperature: float = 0.0) -> None:
    width, most = decode_steps.pages_per_slot(context), max(sizes)
    config = EngineConfig(
        model=model_directory(model), dtype="bfloat16", device="cuda", load_format="dummy", max_model_len=context, max_num_seqs=most,
        num_blocks=most * width,
    )  # fmt: skip
    runner = CudaRunner(config)
    for rows in sizes:
        decode_steps.place(runner, rows, width, context - 8, temperature)
        runner.slots.upload_rows(range(rows), rows)
        with torch.inference_mode():
            tune(runner, model, rows)


if __name__ == "__main__":
    main(sys.argv[1], [int(rows) for rows in sys.argv[2].split(",")], int(sys.argv[3]), *map(float, sys.argv[4:]))
