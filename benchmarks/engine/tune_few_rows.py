"""Plans of the few-row kernels, found by descent on whole decode steps: microseconds of a step in a CUDA graph.

usage: PYTHONPATH=platform:kernels python benchmarks/engine/tune_few_rows.py MODEL ROWS[,ROWS…] none|int8|int4 [CONTEXT [PRODUCT,…]]

One product after another, in two rounds or as they are named (gate_up, o, head, down, qkv), takes the plan under which the sum over the
numbers of rows is smallest; plans of a product are timed in turns, because a card drifts. What is fastest for a kernel alone is not for the
step: neighbours share processors and caches.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import decode_steps
import torch
from definitions import SHAPES
from workloads import model_directory

from altiplano.engine import EngineConfig
from altiplano.engine.cuda.quantized import BITS, HEAD_BITS
from altiplano.engine.cuda.runner import CudaRunner
from altiplano_kernels import cuda_program
from altiplano_kernels.few_rows import kernel as few
from altiplano_kernels.few_rows.kernel import CHUNK, DRAW, MOST_ROWS, QKV, RESIDUAL, SWIGLU, Plan, choose_plan

STEPS, ROUNDS, REPLAYS = 4, 2, 3
LEAST_GAIN = 0.0015
PRODUCTS = ("gate_up", "o", "head", "down", "qkv")
Plans = dict[str, Plan]


def candidates(mode: int, k: int, rows: int, bits: int) -> list[Plan]:
    """Plans of a product whose sums are over k."""
    found, chunk = [], CHUNK[bits]
    walks = mode in (SWIGLU, DRAW)
    for warps in (4, 6, 8, 12, 16):
        if k % (warps * chunk) or warps * 32 < (64 if rows <= 8 else 128):
            continue
        for depth in (1, 2, 3, 4, 6):
            if k // (warps * chunk) % depth or not (8 if bits == 16 else 4) <= depth * warps <= 56:
                continue
            for blocks in (() if mode == DRAW else (0,)) + ((132, 264, 396, 528) if walks else ()):
                # So many blocks that no processor could hold its share of them, or so few that it would starve.
                if blocks * warps > 132 * 48 or 0 < blocks * warps < 132 * 12:
                    continue
                found += [Plan(warps, depth, blocks, turns) for turns in ((False, True) if blocks else (False,))]
    if mode == RESIDUAL:
        found += [plan._replace(staged=True) for plan in found]
    if not walks and bits < 16:
        found += [plan._replace(ahead=True) for plan in found if k // (plan.warps * chunk) == plan.depth]
    return found + [plan._replace(room=room) for plan in found for room in (44, 72)]


class Tuner:
    """A runner, and steps of it under plans."""

    def __init__(self, model: str, quantization: str, context: int) -> None:
        self.width, self.position = decode_steps.pages_per_slot(context), context - 1
        config = EngineConfig(
            model=model_directory(model), dtype="bfloat16", device="cuda", load_format="dummy", max_model_len=context + 64, max_num_seqs=16,
            num_blocks=16 * self.width,
        )  # fmt: skip
        self.runner = CudaRunner(config, quantization=quantization)
        for layer in self.runner.model.cache:  # zeros would take less power, and so less time
            layer.copy_(torch.randn(layer.shape, dtype=torch.bfloat16, device="cuda"))
        steps = self.runner.stepper.few
        assert steps is not None
        self.steps, shape, bits = steps, self.runner.model.config, BITS.get(quantization, 16)
        hidden, heads = shape.hidden_size, shape.num_attention_heads * shape.head_dim
        sizes = (
            (SWIGLU, 2 * shape.intermediate_size, hidden, bits),
            (RESIDUAL, hidden, heads, bits),
            (DRAW, shape.vocab_size, hidden, HEAD_BITS.get(bits, 16)),
            (RESIDUAL, hidden, shape.intermediate_size, bits),
            (QKV, heads + 2 * shape.num_key_value_heads * shape.head_dim, hidden, bits),
        )
        self.products = dict(zip(PRODUCTS, sizes, strict=True))

    def compile(self, rows: int, names: Sequence[str]) -> None:
        """All candidates' kernels of some products, on all processors of the host at once."""
        wanted: dict[tuple[tuple[str, int], ...], Path] = {}

        class Nothing:
            def allow(self, shared: int) -> None: ...
            def launch(self, *_: object, **__: object) -> None: ...

        def note(source: Path, name: str, options: tuple[tuple[str, int], ...], device: int) -> Nothing:
            wanted[options] = source
            return Nothing()

        with patch.object(few, "build", note):
            for name in dict.fromkeys(names):
                mode, _, k, bits = self.products[name]
                for plan in candidates(mode, k, rows, bits):
                    self.steps.plans = {name: plan}
                    self.steps.step(self.place(rows))
        self.steps.plans = {}
        major, minor = torch.cuda.get_device_capability()
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda one: cuda_program.compile_source(one[1], dict(one[0]), f"sm_{major}{minor}a"), wanted.items()))

    def place(self, count: int) -> torch.Tensor:
        decode_steps.place(self.runner, count, self.width, self.position)
        return torch.arange(count, dtype=torch.int32, device="cuda")

    def compare(
        self, count: int, variants: Mapping[str, Plans], rounds: int = ROUNDS, replays: int = REPLAYS
    ) -> dict[str, float]:
        """Median microseconds of a step of `count` rows under each variant's plans; not of those that the card refuses."""
        rows, graphs = self.place(count), {}
        for name, plans in variants.items():
            self.steps.plans = plans
            try:
                graphs[name] = decode_steps.capture(lambda: self.steps.step(rows), STEPS)
            except cuda_program.KernelBuildError as error:
                print(f"  {name} {plans}: {error}", file=sys.stderr)
        positions = self.runner.slots.positions.clone()
        times = {name: list[float]() for name in graphs}
        for _ in range(rounds):
            for name, graph in graphs.items():
                decode_steps.replayed(self.runner, graph, STEPS, positions)  # the first after another graph is slower
                times[name] += (decode_steps.replayed(self.runner, graph, STEPS, positions) for _ in range(replays))
        return {name: statistics.median(found) for name, found in times.items()}

    def descend(self, counts: list[int], names: Sequence[str]) -> Plans:
        current = {name: choose_plan(mode, n, k, max(counts), bits) for name, (mode, n, k, bits) in self.products.items()}
        for name in names:
            mode, _, k, bits = self.products[name]
            tried = {str(tuple(plan)): plan for plan in candidates(mode, k, max(counts), bits)}
            variants = {"now": current, **{key: {**current, name: plan} for key, plan in tried.items()}}
            found = [self.compare(count, variants) for count in counts]
            total = {key: sum(times[key] for times in found) for key in found[0] if all(key in times for times in found)}
            best = min(total, key=lambda key: total[key])
            if best != "now" and total[best] < total["now"] * (1 - LEAST_GAIN):
                current[name] = tried[best]
                print(f"  {name}: {tried[best]}, {total[best] - total['now']:+.1f} us", flush=True)
        return current


def counts_of(text: str) -> list[int]:
    """Numbers of rows that the kernels take."""
    counts = [int(rows) for rows in text.split(",")]
    if not 1 <= min(counts) <= max(counts) <= MOST_ROWS:
        raise argparse.ArgumentTypeError(f"the few-row kernels take 1 to {MOST_ROWS} rows, not {text}")
    return counts


def products_of(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PRODUCTS]:
        raise argparse.ArgumentTypeError(f"no product {', '.join(unknown)}: use some of {', '.join(PRODUCTS)}")
    return names


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("rows", type=counts_of)
    parser.add_argument("quantization", choices=("none", *BITS))
    parser.add_argument("context", type=int, nargs="?", default=640)
    parser.add_argument("products", type=products_of, nargs="?", default=[*PRODUCTS, *PRODUCTS])
    return parser.parse_args(arguments)


def main() -> None:
    options = options_of()
    counts, tuner = options.rows, Tuner(options.model, options.quantization, options.context)
    with torch.inference_mode():
        tuner.compile(max(counts), options.products)
        plans = tuner.descend(counts, options.products)
        for count in counts:
            found = tuner.compare(count, {"before": {}, "now": plans}, 5, 5)
            before, now = found["before"], found["now"]
            print(f"{options.model} {options.quantization} {count} rows: before {before:.1f}, now {now:.1f} us", flush=True)
    for name, plan in plans.items():
        print(f"  {name} {tuner.products[name]}: {plan}")


if __name__ == "__main__":
    main()
