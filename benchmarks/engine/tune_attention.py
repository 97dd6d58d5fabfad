"""Kernels of decode attention, tried on whole steps: microseconds of a step under each, the fastest first.

The contexts are those that W3 has left when so many of its 256 requests still run, or all the same: what is best for one is not for the other,
because a long row may be left alone at the end.

usage: PYTHONPATH=platform:kernels python benchmarks/engine/tune_attention.py MODEL ROWS[,ROWS…] [--context TOKENS] [--kv-cache-dtype auto|fp8|int8]

Fewer rows than 9 take the few-row kernels, whose attention has no tilings.
"""

import argparse
import random
import statistics
from collections.abc import Sequence
from unittest.mock import patch

import decode_steps
import torch
from definitions import SHAPES as MODELS
from workloads import model_directory

from altiplano.engine import EngineConfig
from altiplano.engine.cuda import model as models
from altiplano.engine.cuda.graphs import PLAIN
from altiplano.engine.cuda.loading import CACHE_DTYPES
from altiplano.engine.cuda.runner import CudaRunner
from altiplano_kernels.cluster_attention import kernel as clusters
from altiplano_kernels.cluster_attention.kernel import Shape
from altiplano_kernels.paged_attention.kernel import DecodeWorkspace
from altiplano_kernels.tile_linear.kernel import LEAST_ROWS

STEPS, TURNS, REPLAYS, SHOWN = 3, 4, 2, 6
LONGEST, MOST_SPLITS = 2112, 4
SHAPES = [
    Shape(*sizes) for sizes in ((1, 2, 2), (1, 1, 4), (1, 1, 2), (1, 2, 4), (1, 3, 2), (2, 1, 2), (2, 1, 4), (2, 2, 2), (4, 1, 4))
]
# Splits, tile, stages and warps.
TILINGS = (
    (1, 32, 4, 1),
    (1, 64, 3, 2),
    (1, 32, 6, 1),
    (1, 32, 4, 2),
    (1, 128, 2, 4),
    (2, 32, 4, 1),
    (2, 64, 3, 2),
    (4, 32, 4, 1),
)


def contexts_of(rows: int, context: int | None) -> list[int]:
    """Tokens behind each row, `context` of them or those of a W3 that has only so many requests left."""
    if context is not None:
        return [context] * rows
    dice = random.Random(rows)
    said = max(30, 1024 - 924 * rows // 256)  # by all who are left: answers have 100 to 1,024 tokens
    return [dice.randint(100, 1024) + said for _ in range(rows)]


def pages_of(context: int) -> int:
    """Pages of a row whose steps end with `context` tokens."""
    return -(-context // decode_steps.PAGE)


def blocks_of(counts: Sequence[int], context: int | None) -> int:
    """Pages of a cache for so many rows, and for the one request of any length that an engine must have room for."""
    most = max(sum(map(pages_of, contexts_of(rows, context))) for rows in counts)
    return max(most, pages_of(LONGEST))


def place(runner: CudaRunner, contexts: Sequence[int], blocks: int) -> torch.Tensor:
    """A row for each context, longest first, its pages anywhere; returns where all steps begin: int32 [slots], positions from which `STEPS` of them
    fill the context. A warm-up moves the slots' own."""
    free, rows = random.Random(0).sample(range(blocks), blocks), len(contexts)
    for slot, context in enumerate(contexts):
        runner.slots.set_pages(slot, [free.pop() for _ in range(pages_of(context))], fresh=True)
    runner.slots.upload_tables()
    slots = list(range(rows))
    positions = [context - STEPS for context in contexts]
    runner.slots.write(slots, [1] * rows, positions, [0] * rows, [0.6] * rows, [0] * rows)
    runner.slots.upload_rows(runner.slots.longest_first(slots), rows)
    return runner.slots.positions.clone()


def captured(runner: CudaRunner, rows: int, positions: torch.Tensor, choice: Sequence[int] | None) -> torch.cuda.CUDAGraph:
    """Steps from `positions` on under the kernels' own choice, a shape of clusters, or a tiling."""
    runner.slots.positions.copy_(positions)

    def capture() -> torch.cuda.CUDAGraph:
        return decode_steps.capture(lambda: runner._decode_step(rows, PLAIN), STEPS)

    if choice is None:
        return capture()
    if isinstance(choice, Shape):
        with patch.object(models, "is_fastest", lambda *_: True), patch.object(clusters, "choose_shape", lambda *_: choice):
            return capture()
    splits, *tiling = choice
    with (
        patch.object(models, "is_fastest", lambda *_: False),
        patch.object(models, "choose_splits", lambda *_: splits),
        patch.object(models, "choose_tiling", lambda *_: tuple(tiling)),
    ):
        return capture()


def counts_of(text: str) -> list[int]:
    """Numbers of rows, which attention can be tuned for."""
    counts = [int(rows) for rows in text.split(",")]
    if min(counts) < LEAST_ROWS:
        raise argparse.ArgumentTypeError(
            f"steps of fewer than {LEAST_ROWS} rows take the few-row kernels, which have no tilings: ask for more than {min(counts)}"
        )
    return counts


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("rows", type=counts_of)
    parser.add_argument("--context", type=int)
    parser.add_argument("--kv-cache-dtype", default="auto", choices=CACHE_DTYPES)
    options = parser.parse_args(arguments)
    if options.context is not None and not STEPS <= options.context <= LONGEST:
        parser.error(f"--context must be between {STEPS} and the {LONGEST} tokens that a slot holds, not {options.context}")
    return options


def main() -> None:
    options = options_of()
    most, blocks = max(options.rows), blocks_of(options.rows, options.context)
    config = EngineConfig(
        model=model_directory(options.model), dtype="bfloat16", device="cuda", load_format="dummy", max_model_len=LONGEST, max_num_seqs=most,
        num_blocks=blocks,
    )  # fmt: skip
    runner = CudaRunner(config, kv_cache_dtype=options.kv_cache_dtype)
    cache, scales = runner.model.cache, runner.model.scales
    runner.model._workspace = DecodeWorkspace(most, cache.shape[3], cache.shape[5], "cuda", MOST_SPLITS)
    for layer in cache:  # zeros would take less power, and so less time
        layer.copy_(torch.randn(layer.shape, device="cuda") * (50 if layer.dtype == torch.int8 else 1))
    if scales is not None:
        scales.fill_(0.01)
    for rows in options.rows:
        contexts = contexts_of(rows, options.context)
        with torch.inference_mode():
            positions = place(runner, contexts, blocks)
            choices: list[Sequence[int] | None] = [None, *SHAPES, *(() if scales is not None else TILINGS)]
            graphs = {choice: captured(runner, rows, positions, choice) for choice in choices}
            times = {choice: list[float]() for choice in choices}
            for _ in range(TURNS):
                for choice, graph in graphs.items():
                    decode_steps.replayed(runner, graph, STEPS, positions)  # the first after another graph is slower
                    times[choice] += (decode_steps.replayed(runner, graph, STEPS, positions) for _ in range(REPLAYS))
        found = sorted((statistics.median(taken), str(choice or "as chosen")) for choice, taken in times.items())
        own, mean = statistics.median(times[None]), sum(contexts) // rows
        print(
            f"{options.model} {rows} rows, mean context {mean}: as chosen {own:.0f} us; "
            + "; ".join(f"{name} {us:.0f}" for us, name in found[:SHOWN])
        )


if __name__ == "__main__":
    main()
