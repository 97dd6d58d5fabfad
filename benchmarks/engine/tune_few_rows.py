"""Plans of the few-row kernels, tried one after another on whole decode steps: microseconds of a graph replay.

usage: PYTHONPATH=platform:kernels python benchmarks/engine/tune_few_rows.py MODEL ROWS CONTEXT none|int8|int4 [quick]
"""

import sys

import decode_steps
import torch
from workloads import model_directory

from altiplano.engine import EngineConfig
from altiplano.engine.cuda.quantized import BITS
from altiplano.engine.cuda.runner import CudaRunner
from altiplano_kernels.cluster_attention.kernel import Shape
from altiplano_kernels.few_rows.kernel import CHUNK, DRAW, QKV, RESIDUAL, SWIGLU, Plan, choose_plan

STEPS = 8
MODES = {"gate_up": SWIGLU, "head": DRAW, "down": RESIDUAL, "o": RESIDUAL, "qkv": QKV}


def timed(runner: CudaRunner, rows: torch.Tensor, replays: int = 25) -> float:
    """Median microseconds of a step, in graphs of STEPS as the engine has them."""
    few = runner.stepper.few
    assert few is not None
    return decode_steps.timed(runner, lambda: few.step(rows), STEPS, replays)


def explain(runner: CudaRunner, rows: torch.Tensor, whole: float) -> None:
    """What the step gains when one kind of kernel is left out."""
    from altiplano.engine.cuda import few_rows as module

    owners = {
        "begin": module.few,
        "norm_qkv": module.few,
        "decode_clusters": module,
        "add_linear": module.few,
        "norm_swiglu": module.few,
    }
    found = []
    for name, owner in {**owners, "advance": module}.items():
        kept = getattr(owner, name)
        setattr(owner, name, lambda *_, **__: None)
        found.append(f"{name} {whole - timed(runner, rows, 9):.1f}")
        setattr(owner, name, kept)
    print("  left out, gains:", ", ".join(found), flush=True)


def candidates(mode: int, k: int, rows: int, bits: int) -> list[Plan]:
    found, chunk = [], CHUNK[bits]
    for warps in (4, 6, 8, 12, 16):
        if k % (warps * chunk) or warps * 32 < (64 if rows <= 8 else 128):
            continue
        steps = k // (warps * chunk)
        for depth in (1, 2, 3, 4, 6):
            if steps % depth or depth * warps > 64 or depth * warps < (12 if bits == 16 else 4) or depth > 6:
                continue
            for blocks in (0, 132, 264, 396, 528) if mode in (SWIGLU, DRAW) else (0,):
                if not (mode == DRAW and blocks == 0) and not (blocks == 132 and warps < 8):
                    found.append(Plan(warps, depth, blocks))
    return found


def main(model: str, count: int, context: int, quantization: str, quick: bool) -> None:
    bits = BITS.get(quantization, 16)
    width = decode_steps.pages_per_slot(context)
    config = EngineConfig(
        model=model_directory(model), dtype="bfloat16", device="cuda", load_format="dummy", max_model_len=context, max_num_seqs=16,
        num_blocks=16 * width,
    )  # fmt: skip
    runner = CudaRunner(config, quantization=quantization)
    decode_steps.place(runner, count, width, context - 1)
    rows = torch.arange(count, dtype=torch.int32, device="cuda")
    few, shape = runner.stepper.few, runner.model.config
    assert few is not None
    with torch.inference_mode():
        best = timed(runner, rows)
        print(f"{model} {quantization} rows {count} context {context}: defaults {best:.1f} us", flush=True)
        tried = []
        for few.shape in (Shape(c, d, w) for c in (4, 8, 16) for d in (1, 2) for w in (1, 2, 4)):
            tried.append((timed(runner, rows), few.shape))
        print("  cluster, depth, warps:", [(round(us, 1), *c) for us, c in sorted(tried)[:8]], flush=True)
        few.shape = min(tried)[1]
        best = min(tried)[0]
        explain(runner, rows, best)
        sums = {"gate_up": shape.hidden_size, "head": shape.hidden_size, "qkv": shape.hidden_size}
        qkv = (shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim
        wide = {"gate_up": 2 * shape.intermediate_size, "head": shape.vocab_size, "qkv": qkv}
        wide |= {"down": shape.hidden_size, "o": shape.hidden_size}
        sums |= {"down": shape.intermediate_size, "o": shape.num_attention_heads * shape.head_dim}
        for name, mode in MODES.items():
            results = []
            for plan in [] if quick else candidates(mode, sums[name], count, 8 if bits < 16 and name == "head" else bits):
                few.plans[name] = plan
                try:
                    results.append((timed(runner, rows, 9), plan))
                except Exception as error:
                    print("  failed", name, plan, repr(error)[:90])
            few.plans.pop(name, None)
            results.sort()
            for us, plan in results[:4]:
                print(f"  {name}: {us:.1f} {tuple(plan)}", flush=True)
            if results and results[0][0] < best:
                few.plans[name] = results[0][1]
                best = timed(runner, rows)
            print(
                f"  {name}: default {tuple(choose_plan(mode, wide[name], sums[name], count, bits))}, step now {best:.1f}",
                flush=True,
            )
        explain(runner, rows, best)
        print(f"{model} rows {count}: {timed(runner, rows):.1f} us with {few.plans}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], len(sys.argv) > 5)
