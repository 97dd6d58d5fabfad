"""How far the engine's next-token distributions are from transformers in float32, for bf16 and for every quantization.

usage: PYTHONPATH=platform:kernels python benchmarks/engine/quality.py MODEL [--only bf16,kv-fp8,…] [--checkpoint FOLDER] [--out FILE]
       [--commit HASH]; prints one JSON record per line and keeps them in FILE.

Weights are random with the public shape and a standard deviation of 0.02; each run draws other tokens. Teacher forcing: all systems
read the same random tokens, and what they say after each of the last 64 is compared. `quality-kl` is the mean of KL(float32 || ours)
over these positions, `quality-kl-max` the largest; `quality-logprob` and `…-max` are the absolute error of the next token's
log-probability; all in nats. Behind the slash is the path of the rows: `prefill`, or decode steps of 1, 8 or 32 rows, whose logits
are those that draws see: float32. The system `transformers` is transformers in bf16. Where the mean KL of a run is above its bound, the program says
so and fails.
"""

import argparse
import gc
import platform
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from checkpoint import write_checkpoint  # noqa: E402
from definitions import RUNS, SHAPES, Records, model_config  # noqa: E402

# kernels.py in this folder would pass for the package of that name, which transformers looks for.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]

if TYPE_CHECKING:
    from altiplano.engine.cuda.runner import CudaRunner

SEQUENCES, LENGTH, JUDGED = 32, 512, 64
AT_ONCE = 8  # sequences of one forward pass
DECODES = (1, 8, 32)
PAGE = 32
# Variants, and the mean KL that no run may exceed, by model: about one and a half times what was measured when each was new. 3B, which
# has 28 layers of random weights and not 16, has 2.5 to 5.6 times the KL of 1B.
MOST_KL = {
    "bf16": {"1b": 0.0005, "3b": 0.002},
    "kv-fp8": {"1b": 0.008, "3b": 0.045},
    "kv-int8": {"1b": 0.0009, "3b": 0.0045},
    "w-int8": {"1b": 0.003, "3b": 0.011},
    "w-int4": {"1b": 0.4, "3b": 0.95},
    "w8a8-fp8": {"1b": 0.065, "3b": 0.24},
    "w8a8-int8": {"1b": 0.012, "3b": 0.047},
}
VARIANTS = tuple(MOST_KL)


@dataclass
class Errors:
    """Of each judged position, in nats: KL(reference || found), and the absolute error of the next token's log-probability."""

    kl: torch.Tensor
    logprob: torch.Tensor

    def measures(self) -> dict[str, float]:
        return {
            "quality-kl": float(self.kl.mean()),
            "quality-kl-max": float(self.kl.max()),
            "quality-logprob": float(self.logprob.mean()),
            "quality-logprob-max": float(self.logprob.max()),
        }


def compare(reference: torch.Tensor, found: torch.Tensor, targets: torch.Tensor) -> Errors:
    """Logits of any float type against logits of any other: [rows, vocab] both; targets: int64 [rows]. In float64."""
    kls, logprobs = [], []
    # Rows of the vocabulary are long: a few at a time keep the float64 copies small.
    for first in range(0, len(targets), JUDGED):
        some = slice(first, first + JUDGED)
        p, q = (logits[some].double().log_softmax(-1) for logits in (reference, found))
        kls.append((p.exp() * (p - q)).sum(-1))
        logprobs.append((p - q).gather(1, targets[some, None])[:, 0].abs())
    return Errors(torch.cat(kls), torch.cat(logprobs))


@torch.inference_mode()
def reference_logits(checkpoint: Path, tokens: Sequence[torch.Tensor], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """transformers' logits after the last `JUDGED` of each sequence, float32 [sequences * JUDGED, vocab].

    tokens: one int64 [sequences, length] per run; the last token of each is a target only.
    """
    from transformers import LlamaForCausalLM

    torch.set_float32_matmul_precision("highest")
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype, device_map=device).eval()
    found = []
    for ids in tokens:
        parts = []
        for first in range(0, len(ids), AT_ONCE):
            some = ids[first : first + AT_ONCE, :-1].to(device)
            hidden = model.model(some, use_cache=False).last_hidden_state[:, -JUDGED:]
            parts.append(model.lm_head(hidden).float().flatten(0, 1))
        found.append(torch.cat(parts))
    return found


def make_runner(checkpoint: Path, variant: str) -> "CudaRunner":
    from altiplano.engine import EngineConfig
    from altiplano.engine.backends import create_engine
    from altiplano.engine.cuda.runner import CudaRunner

    kind, _, name = variant.partition("-")
    config = EngineConfig(
        model=checkpoint, dtype="bfloat16", device="cuda", max_model_len=LENGTH + PAGE, max_num_seqs=SEQUENCES, block_size=PAGE,
        num_blocks=SEQUENCES * (LENGTH // PAGE + 1), enable_prefix_caching=False, kv_cache_dtype=name if kind == "kv" else "auto",
        quantization={"w": name, "w8a8": variant}.get(kind, "none"),
    )  # fmt: skip
    runner = create_engine(config).runner
    assert isinstance(runner, CudaRunner), "the device is cuda"
    return runner


@torch.inference_mode()
def prefill_logits(runner: "CudaRunner", ids: torch.Tensor) -> torch.Tensor:
    """Logits after the last `JUDGED` of each sequence, as prompts are scored: float32 [sequences * JUDGED, vocab]. ids: [sequences, length]."""
    from altiplano_kernels.prefill_attention.kernel import list_tiles

    _, length = ids.shape
    found = []
    for first in range(0, len(ids), AT_ONCE):
        some = range(first, min(first + AT_ONCE, len(ids)))
        tiles = list_tiles([(row * length, length, 0, slot) for row, slot in enumerate(some)])
        positions = torch.arange(length).expand(len(some), length)
        slots_of = torch.tensor(list(some))[:, None].expand(len(some), length)
        hidden = runner.model.prefill_hidden(
            _upload(ids[some.start : some.stop]), _upload(positions), _upload(slots_of), _upload(torch.tensor(tiles))
        )
        judged = hidden.view(len(some), length, -1)[:, -JUDGED:].flatten(0, 1)
        found.append(torch.mm(judged, runner.model.weights.head.T, out_dtype=torch.float32))
    return torch.cat(found)


@torch.inference_mode()
def decode_logits(runner: "CudaRunner", ids: torch.Tensor, batch: int) -> torch.Tensor:
    """Logits of the first `batch` sequences' last `JUDGED` tokens, fed one by one over the cache that prefill has left,
    as draws see them: float32."""
    from altiplano.engine.cuda.few_rows import FewRows
    from altiplano.engine.cuda.quantized import CodedWeights
    from altiplano_kernels.few_rows.kernel import MOST_ROWS

    model, slots = runner.model, list(range(batch))
    rows = torch.tensor(slots, dtype=torch.int32, device="cuda")
    few = FewRows(model) if batch <= MOST_ROWS and not isinstance(model.weights, CodedWeights) else None
    steps = []
    for position in range(ids.shape[1] - JUDGED, ids.shape[1]):
        zeros = [0] * batch
        runner.slots.write(slots, ids[:batch, position].tolist(), [position] * batch, zeros, [0.0] * batch, zeros)
        # Kernels of a step start before the one ahead of them has ended; what is written here must be there.
        torch.cuda.synchronize()
        logits = runner.stepper.logits(model.decode_hidden(rows)) if few is None else few.logits(rows)
        steps.append(logits.clone())
    return torch.stack(steps, 1).flatten(0, 1)


def paths(runner: "CudaRunner", ids: torch.Tensor) -> Iterator[tuple[str, int, Callable[[], torch.Tensor]]]:
    """(name, sequences, how to get the logits) of each path; `prefill` comes first, because the others read its cache."""
    pages = LENGTH // PAGE + 1
    for slot in range(len(ids)):
        runner.slots.set_pages(slot, range(slot * pages, (slot + 1) * pages), fresh=True)
    with torch.inference_mode():
        runner.slots.upload_tables()
    yield "prefill", len(ids), lambda: prefill_logits(runner, ids)
    for batch in DECODES:
        yield f"decode-{batch}", batch, lambda batch=batch: decode_logits(runner, ids, batch)  # type: ignore[misc]


def measure(
    records: Records, checkpoint: Path, variant: str, tokens: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]
) -> None:
    """Records of one variant, over all runs."""
    runner = make_runner(checkpoint, variant)
    found: dict[str, list[Errors]] = {}
    for ids, reference in zip(tokens, wanted, strict=True):
        targets = judged_targets(ids).to(reference.device)
        for path, sequences, logits in paths(runner, ids[:, :-1]):
            rows = sequences * JUDGED
            try:
                errors = compare(reference[:rows], logits(), targets[:rows])
                found.setdefault(path, []).append(errors)
            except Exception:
                print(f"{variant} {path} failed:", file=sys.stderr)
                traceback.print_exc()
                if path == "prefill":
                    break  # the others would read a cache that nobody has filled
    for path, over_runs in found.items():
        add(records, variant, path, over_runs)


def add(records: Records, variant: str, path: str, errors: Sequence[Errors]) -> None:
    """One record per measure, with a value per run."""
    command = f"python benchmarks/engine/quality.py {records.model} --only {variant}"
    for name in errors[0].measures():
        values = [one.measures()[name] for one in errors]
        records.add(f"{name}/{path}", variant, values, "nats", False, command)


def above_bounds(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What exceeds `MOST_KL` in the worst of its runs, in words."""
    return [
        f"{record['model']} {record['variant']} {record['workload']}: {record['max']}, and {most} is allowed"
        for record in records
        if record["workload"].startswith("quality-kl/") and record["max"] > (most := MOST_KL[record["variant"]][record["model"]])
    ]


def judged_targets(ids: torch.Tensor) -> torch.Tensor:
    """The tokens that follow the judged ones: int64 [sequences * JUDGED]."""
    return ids[:, -JUDGED:].flatten()


def draw_tokens(run: int, vocab: int = 128000) -> torch.Tensor:
    """int64 [SEQUENCES, LENGTH + 1] of one run."""
    return torch.randint(vocab, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(run))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, in this order")
    parser.add_argument("--checkpoint", type=Path, help="made here if there is none; a temporary folder by default")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    variants = [name for name in options.only.split(",") if name]
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        parser.error(f"no variant {', '.join(unknown)}: use some of {', '.join(VARIANTS)}")
    checkpoint = options.checkpoint or Path(tempfile.mkdtemp())
    try:
        if not (checkpoint / "config.json").exists():
            write_checkpoint(model_config(options.model), checkpoint)
        records = run(options.model, checkpoint, variants, options.commit, options.out)
    finally:
        if options.checkpoint is None:
            shutil.rmtree(checkpoint, ignore_errors=True)
    sys.exit("\n".join(above_bounds(records)) or 0)


def run(model: str, checkpoint: Path, variants: Sequence[str], commit: str, out: Path | None) -> list[dict[str, Any]]:
    import transformers
    import triton

    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    versions["transformers"] = transformers.__version__
    records = Records(model, "altiplano", commit, torch.cuda.get_device_name(), versions, out)
    tokens = [draw_tokens(seed) for seed in range(RUNS)]
    wanted = reference_logits(checkpoint, tokens, torch.float32, "cuda")
    _free()
    yardstick = [
        compare(reference, given, judged_targets(ids).cuda())
        for ids, reference, given in zip(
            tokens, wanted, reference_logits(checkpoint, tokens, torch.bfloat16, "cuda"), strict=True
        )
    ]
    records.system = "transformers"
    add(records, "bf16", "prefill", yardstick)
    records.system = "altiplano"
    for variant in variants:
        _free()
        try:
            measure(records, checkpoint, variant, tokens, wanted)
        except Exception:
            print(f"{variant} failed:", file=sys.stderr)
            traceback.print_exc()
    return records.rows


def _upload(values: torch.Tensor) -> torch.Tensor:
    """Flat int32 on the GPU."""
    return values.flatten().to(dtype=torch.int32, device="cuda")


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
