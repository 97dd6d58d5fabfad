"""The same fine-tunes by TRL's own trainer alone, beside `baseline.py`: same weights, same tokens a step, same LoRA, one GPU.

python benchmarks/training/peers.py [--size 1b] [--variants bf16-lora qlora-gc …] [--steps N] [--out FILE] [--commit HASH]

Settings are those that a reader of TRL's documentation ends up with, and those of ours where its own would change the work: every token
supervised, no warm-up, fused AdamW. `tiny` is a size for trying the program on a CPU.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from baseline import VARIANTS, arguments, make_model, random_rows, records_of, speeds_of
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):  # type: ignore[misc]
    """The moment (s) at which each step has ended on the device."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def main() -> None:
    alone = sorted(name for name, (workers, _, _) in VARIANTS.items() if workers == 1)
    options = arguments(__doc__, alone, alone)
    with tempfile.TemporaryDirectory(prefix="altiplano-peers-") as work:
        model = make_model(options.size, Path(work) / "model")
        records: list[dict[str, Any]] = []
        for name in options.variants:
            records += measure(name, model, Path(work) / name, options)
            if options.out:
                options.out.write_text(json.dumps(records, indent=1) + "\n")


def measure(name: str, model: Path, out: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train with one variant and return its records."""
    _, quantized, checkpointing = VARIANTS[name]
    gpu = torch.cuda.is_available()
    codes = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True
    )
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, device_map={"": 0 if gpu else "cpu"}, attn_implementation="sdpa", quantization_config=codes if quantized else None
    )  # fmt: skip
    settings = SFTConfig(
        output_dir=str(out), per_device_train_batch_size=options.rows, gradient_accumulation_steps=1, max_steps=options.steps,
        learning_rate=1e-4, lr_scheduler_type="constant", warmup_steps=0, optim="adamw_torch_fused", bf16=True, use_cpu=not gpu,
        gradient_checkpointing=checkpointing, max_length=options.length, dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    clock = Clock()
    trainer = SFTTrainer(
        model=base,
        args=settings,
        train_dataset=Dataset.from_dict({"input_ids": random_rows(options, options.rows * options.steps)}),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock],
    )
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    speeds = speeds_of(clock.ends, options.rows * options.length)
    peak = torch.cuda.max_memory_allocated() if gpu else 0
    loss = next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry)
    print(f"{name:16s} {statistics.median(speeds):10,.0f} tok/s  {peak / 1e9:6.2f} GB  loss {loss:.4f}", flush=True)
    return records_of(options, name, "trl", speeds, peak, loss, options.steps)


if __name__ == "__main__":
    main()
