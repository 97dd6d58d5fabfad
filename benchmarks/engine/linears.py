"""Tilings of the products for 17 to 64 rows, tried one after another on whole decode steps: microseconds of a graph replay.

usage: PYTHONPATH=platform:kernels python benchmarks/engine/linears.py MODEL ROWS CONTEXT
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import decode_steps
import torch
from workloads import model_directory

from altiplano.engine import EngineConfig
from altiplano.engine.cuda.graphs import PLAIN
from altiplano.engine.cuda.runner import CudaRunner
from altiplano_kernels.linear import kernel as linear
from altiplano_kernels.linear.kernel import Tiling

STEPS, REPLAYS = 4, 15
PARTS = [
    Tiling(64, columns, depth, splits, stages, warps, early)
    for columns, depth, splits, stages, warps in (
        (64, 128, 4, 4, 4), (64, 128, 2, 4, 4), (64, 128, 8, 3, 4), (32, 128, 2, 4, 4), (32, 128, 1, 4, 4), (32, 256, 1, 3, 4),
        (128, 64, 8, 4, 4), (128, 128, 4, 3, 8), (64, 64, 4, 6, 4),
    )
    for early in (False, True)
]  # fmt: skip
WHOLE = [
    Tiling(64, columns, depth, 1, stages, 4, early)
    for columns, depth, stages in ((32, 128, 4), (64, 128, 4), (32, 256, 3), (64, 64, 6))
    for early in (False, True)
]
GATED = [
    Tiling(64, columns, depth, 1, stages, warps, early)
    for columns, depth, stages, warps in ((32, 128, 3, 4), (32, 128, 4, 4), (64, 64, 4, 4), (64, 128, 3, 8), (32, 256, 2, 4))
    for early in (False, True)
]


def candidates(name: str, n: int, k: int) -> list[Tiling]:
    of = {"o": PARTS, "down": PARTS, "qkv": WHOLE, "gate_up": GATED}[name]
    return [tiling for tiling in of if linear.fits(tiling, n // 2 if name == "gate_up" else n, k)]


def compile_one(name: str, n: int, k: int, rows: int, tiling: Tiling) -> str | None:
    """Leave the compiled kernel in the cache; returns what went wrong."""
    x, w = torch.zeros(rows, k, device="cuda", dtype=torch.bfloat16), torch.zeros(n, k, device="cuda", dtype=torch.bfloat16)
    try:
        if name == "gate_up":
            linear.swiglu_linear(x, w, tiling, pdl=True)
        elif name == "qkv":
            linear.linear(x, w, tiling, pdl=True)
        else:
            linear.linear_parts(x, w, tiling, pdl=True)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{name} {tuple(tiling)}: {error!r}"[:160]
    return None


def timed(runner: CudaRunner, rows: int) -> float:
    """Median microseconds of a step, in a new graph."""
    return decode_steps.timed(runner, lambda: runner._decode_step(rows, PLAIN), STEPS, REPLAYS)


def main(model: str, rows: int, context: int) -> None:
    width = decode_steps.pages_per_slot(context)
    config = EngineConfig(
        model=model_directory(model), dtype="bfloat16", device="cuda", load_format="dummy", max_model_len=context, max_num_seqs=rows,
        num_blocks=rows * width,
    )  # fmt: skip
    runner = CudaRunner(config)
    decode_steps.place(runner, rows, width, context - 8)
    runner.slots.upload_rows(range(rows), rows)
    layer = runner.model.weights.layers[0]
    shapes = {name: tuple(getattr(layer, name).shape) for name in ("down", "o", "gate_up", "qkv")}
    tasks = [(name, n, k, rows, tiling) for name, (n, k) in shapes.items() for tiling in candidates(name, n, k)]
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        failed = [error for error in pool.map(compile_one, *zip(*tasks, strict=True)) if error]
    print("failed:", failed, flush=True)
    with torch.inference_mode():
        best = timed(runner, rows)
        print(f"{model} rows {rows} context {context}: {best:.0f} us with {runner.model.tilings}", flush=True)
        for name, (n, k) in shapes.items():
            kept, found = dict(runner.model.tilings), []
            for tiling in candidates(name, n, k):
                runner.model.tilings[name] = tiling
                try:
                    found.append((timed(runner, rows), tiling))
                except Exception as error:
                    print("  failed", name, tiling, repr(error)[:90])
            found.sort(key=lambda one: one[0])
            for us, tiling in found[:4]:
                print(f"  {name}: {us:.1f} {tuple(tiling)}", flush=True)
            runner.model.tilings = {**kept, name: found[0][1]} if found[0][0] < best else kept
            best = min(best, found[0][0])
        print(f"{model} rows {rows}: {timed(runner, rows):.1f} us with {runner.model.tilings}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
