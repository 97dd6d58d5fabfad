"""Every kernel at the shapes of Llama 3.2, against what it must move and do: microseconds, and percent of the card's limit.

usage: PYTHONPATH=kernels python benchmarks/engine/kernels.py [NAME …] [--model 1b|3b] [--out FILE] [--commit HASH] [--build]; NAME: a folder
       of altiplano_kernels, or gemm for the library's product; all of them without one. Prints one JSON record per line and writes them
       to FILE; of a case that fails the record has "error", and FILE has nothing. --build launches each case once without the clock:
       several such processes, of other names or models, fill the caches of compiled kernels faster.

What is launched and what is counted say the modules of kernel_benches. torch and triton are enough.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import triton
from kernel_benches import adapters, attention, draws, eight_bits, few_rows, products, rows
from kernel_benches.case import MODELS, Bench, Case, Model
from kernel_benches.timing import measure

BENCHES: dict[str, Bench] = {
    "gemm": products.gemm,
    "few_rows": few_rows.few_rows,
    "tile_linear": products.tile_linear,
    "steady_linear": products.steady_linear,
    "w8a8": eight_bits.w8a8,
    "multi_lora": adapters.multi_lora,
    "cluster_attention": attention.cluster_attention,
    "paged_attention": attention.paged_attention,
    "prefill_attention": attention.prefill_attention,
    "steady_attention": attention.steady_attention,
    "kv_write": attention.kv_write,
    "embed_norm": rows.embed_norm,
    "swiglu": rows.swiglu,
    "sampling": draws.sampling,
    "filtered_sampling": draws.filtered_sampling,
    "guessing": draws.guessing,
}


def cases(names: Iterable[str], models: Iterable[Model] = MODELS) -> Iterator[Case]:
    """All cases of `names`; those that know no model once."""
    seen = set()
    for name in names:
        for model in models:
            for case in BENCHES[name](model):
                key = case.kernel, case.model, case.shape
                if key not in seen:
                    yield case
                seen.add(key)


def record(case: Case, times: list[float], commit: str) -> dict[str, object]:
    """What is kept of a case that took `times` microseconds."""
    us = statistics.median(times)
    return {
        "suite": "kernels", "kernel": case.kernel, "model": case.model, "shape": case.shape, "us": round(us, 3),
        "min": round(min(times), 3), "max": round(max(times), 3), "runs": len(times), "bytes": case.bytes, "flops": case.flops,
        "percent": round(case.percent(us), 2), "limit": case.limit,
        "command": f"python benchmarks/engine/kernels.py {case.kernel}", "commit": commit, "hardware": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }  # fmt: skip


def run(chosen: Iterable[Case], commit: str, out: Path | None) -> list[Case]:
    """Measure, print and write; returns the cases that failed."""
    kept, failed = list[dict[str, object]](), list[Case]()
    for case in chosen:
        try:
            found = record(case, measure(case), commit)
            kept.append(found)
        except Exception as error:
            failed.append(case)
            found = {"kernel": case.kernel, "model": case.model, "shape": case.shape, "error": repr(error)[:300]}
        print(json.dumps(found, ensure_ascii=False), flush=True)
        if out is not None:
            out.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    return failed


def build(chosen: Iterable[Case]) -> list[Case]:
    """Launch each case once; returns those that failed."""
    failed = list[Case]()
    for case in chosen:
        try:
            case.prepare("cuda", 1)[0]()
            torch.cuda.synchronize()
        except Exception as error:
            failed.append(case)
            print(f"{case.kernel}, {case.model}, {case.shape}: {error!r}", file=sys.stderr, flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--model", choices=[model.name for model in MODELS])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--build", action="store_true")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(BENCHES)):
        parser.error(f"no bench {', '.join(unknown)}: use some of {', '.join(BENCHES)}")
    torch.manual_seed(0)
    chosen = cases(options.names or BENCHES, [model for model in MODELS if options.model in (None, model.name)])
    failed = build(chosen) if options.build else run(chosen, options.commit, options.out)
    if failed:
        sys.exit(f"without a result: {'; '.join(f'{case.kernel}, {case.model}, {case.shape}' for case in failed)}")


if __name__ == "__main__":
    main()
