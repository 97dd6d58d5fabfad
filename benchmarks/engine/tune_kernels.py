"""Attention and 8-bit products in the ways that they can be launched, tried one after another: what their choices follow.

usage: PYTHONPATH=kernels python benchmarks/engine/tune_kernels.py decode|prefill|w8a8 MODEL [ROWS,ROWS…]; one JSON object per line: a case, the
       choice that the kernel makes itself, and all that were tried, fastest first, with their microseconds.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import product

import torch
from kernel_benches import attention, eight_bits
from kernel_benches.case import MODELS, Case, Model
from kernel_benches.timing import measure

from altiplano_kernels.cluster_attention.kernel import choose_shape
from altiplano_kernels.paged_attention.kernel import choose_splits, choose_tiling
from altiplano_kernels.prefill_attention.kernel import QUERY_TILE
from altiplano_kernels.w8a8 import kernel as w8a8

Choice = tuple[int, ...]
# A case, what its kernel chooses itself, what else there is, and the case with one of those.
Task = tuple[Case, Choice, Iterable[Choice], Callable[[Choice], Case]]
ROWS = {"decode": (16, 64, 256), "prefill": (1024,), "w8a8": (16, 64, 256)}


def decode(model: Model, rows: int) -> Iterator[Task]:
    """Both kernels: clusters, depth and warps; splits, tile, stages and warps."""
    sizes = rows, model.kv_heads, model.dim
    for context, kind in product(model.contexts, attention.KINDS):
        for kernel, own, others in (
            ("cluster_attention", choose_shape(*sizes, 2 if kind == "bf16" else 1), product((1, 2, 4, 8), (1, 2), (2, 4, 8))),
            (
                "paged_attention",
                (choose_splits(*sizes), *choose_tiling(*sizes)),
                ((splits, *rest) for splits in (1, 2, 4, 8) for rest in ((64, 3, 2), (32, 4, 1), (64, 3, 4))),
            ),
        ):

            def chosen(choice: Choice, kernel: str = kernel, context: int = context, kind: str = kind) -> Case:
                return attention.decode_case(kernel, model, rows, context, kind, choice)

            yield chosen(()), own, others, chosen


def prefill(model: Model, rows: int) -> Iterator[Task]:
    """Rows and keys of a tile, stages, warps; eight prompts of `rows` tokens."""
    others = [(128, 64, 3, 8), (128, 64, 3, 4), (128, 128, 2, 8), (64, 64, 3, 4), (128, 64, 2, 4), (128, 128, 2, 4)]
    for kind in attention.KINDS:

        def chosen(choice: Choice, kind: str = kind) -> Case:
            tile, keys, stages, warps = choice
            return attention.prefill_case(model, 8, rows, 0, kind, (tile, keys, stages, warps))

        own = (QUERY_TILE, 64, 3, 4)
        yield chosen(own), own, others, chosen


def eight(model: Model, rows: int) -> Iterator[Task]:
    """Tilings of codes; what a norm follows may stay in parts."""
    shapes = {
        w8a8.FEW,
        w8a8.FEW._replace(swapped=False),
        w8a8.NARROW,
        w8a8.SOME,
        w8a8.MANY,
        w8a8.LARGE,
        w8a8.Tiling(64, 128, 128, 4, 4),
    }
    for kind, name in product(eight_bits.KINDS, ("qkv", "o", "gate_up", "down")):
        splits = (1, 2, 4, 8) if name in ("o", "down") else (1,)
        others = [tiling._replace(splits=count) for tiling in sorted(shapes) for count in splits]

        def chosen(choice: Choice, kind: str = kind, name: str = name) -> Case:
            return eight_bits.product_case(model, name, rows, kind, w8a8.Tiling(*choice))  # type: ignore[arg-type]

        own = eight_bits.choose(model, name, rows, kind)
        yield chosen(own), own, others, chosen


TASKS = {"decode": decode, "prefill": prefill, "w8a8": eight}


def tried(task: Task) -> dict[str, object]:
    """One line of the output. A choice that does not compile, or needs more than a processor has, is left out."""
    case, own, others, chosen = task
    found = list[tuple[float, Choice]]()
    for choice in dict.fromkeys((tuple(own), *map(tuple, others))):
        try:
            found.append((round(statistics.median(measure(chosen(choice))), 2), choice))
        except Exception as error:
            print(f"{case.kernel} {choice}: {error!r}"[:200], file=sys.stderr, flush=True)
    return {"kernel": case.kernel, "model": case.model, "shape": case.shape, "chosen": tuple(own), "all": sorted(found)[:8]}


def main(name: str, model: str, sizes: str = "") -> None:
    torch.manual_seed(0)
    of = next(one for one in MODELS if one.name == model)
    for rows in map(int, sizes.split(",")) if sizes else ROWS[name]:
        for task in TASKS[name](of, rows):
            print(json.dumps(tried(task)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
