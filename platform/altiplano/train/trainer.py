"""TRL's SFTTrainer on global steps of a constant number of tokens.

One step of the trainer is one global step of the schedule: each rank runs its micro-batches, gradients are summed as token
sums over the whole step and divided by its supervised tokens once, so any number of workers gives the same update.
"""

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from altiplano import spec
from altiplano.data import Example
from altiplano.data.batches import Step, collate, plan_steps, shard, supervised
from altiplano.models.loading import attach_lora, load_base, load_tokenizer
from altiplano.train.sink import MetricSink

MAX_SKIPPED_STEPS = 3
DEFAULT_MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}


class NonFiniteLossError(RuntimeError):
    """Several steps in a row gave gradients that are not finite."""


class TokenBudgetTrainer(SFTTrainer):
    """SFTTrainer over a schedule of global steps."""

    def __init__(
        self, *, examples: Sequence[Example], schedule: Sequence[Step], micro_batch_tokens: int, **arguments: Any
    ) -> None:
        self._examples, self._schedule, self._micro_batch_tokens = examples, schedule, micro_batch_tokens
        self._lengths = [len(example.input_ids) for example in examples]
        sizes = [sum(self._lengths[i] for pack in step for i in pack) for step in schedule]
        self._tokens_until = [0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()]
        self._skipped = 0
        self.last_loss = math.nan
        super().__init__(**arguments)

    @property
    def tokens_seen(self) -> int:
        """Tokens of the steps that are done, on all workers."""
        return self.tokens_until(self.state.global_step)

    def tokens_until(self, step: int) -> int:
        """Tokens of the first `step` global steps."""
        return int(self._tokens_until[step])

    def get_train_dataloader(self) -> DataLoader[Any]:
        # The schedule already says what each rank does: accelerate must not split it again.
        return DataLoader(list(range(len(self._schedule))), batch_size=1, shuffle=False, collate_fn=self._collate)  # type: ignore[arg-type]

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One global step: returns the mean loss per supervised token over all ranks."""
        model.train()
        world, micro_batches, tokens = self.accelerator.num_processes, inputs["micro_batches"], max(1, inputs["supervised"])
        total = torch.zeros((), device=self.args.device)
        for index, micro in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            quiet = contextlib.nullcontext() if last or world == 1 else model.no_sync()
            with quiet, self.compute_loss_context_manager():
                batch = {name: tensor.to(self.args.device, non_blocking=True) for name, tensor in micro.items()}
                summed = -model(**batch, use_cache=False, fused_lm_head=True).log_probs.sum()
                # DDP averages over ranks: multiply by their number, so that the sum is what counts.
                (summed * (world / tokens)).backward()
            total += summed.detach()
        if world > 1:
            dist.all_reduce(total)
        self._skip_if_not_finite(model)
        loss: torch.Tensor = total / tokens
        self.last_loss = float(loss)
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers would look for input_ids, which are inside the micro-batches

    def held_out_loss(self, examples: Sequence[Example]) -> float:
        """Mean loss per supervised token of `examples`, each rank taking its share."""
        model, rank, world = self.model_wrapped, self.accelerator.process_index, self.accelerator.num_processes
        model.eval()
        lengths = [len(example.input_ids) for example in examples]
        step = plan_steps(lengths, tokens_per_step=1 << 62, max_length=max(lengths), packing=False, seed=0, epochs=1)[0]
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for micro in shard(
                step, lengths, rank=rank, world_size=world, micro_batch_tokens=max(max(lengths), self._micro_batch_tokens)
            ):
                batch = {name: tensor.to(self.args.device) for name, tensor in collate(micro, examples).items()}
                sums[0] -= self.model(**batch, use_cache=False, fused_lm_head=True).log_probs.sum()
                sums[1] += (batch["labels"] != -100).sum()
        if world > 1:
            dist.all_reduce(sums)
        model.train()
        return float(sums[0] / sums[1].clamp(min=1))

    def _collate(self, steps: list[int]) -> dict[str, Any]:
        step = self._schedule[steps[0]]
        shares = shard(
            step,
            self._lengths,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            micro_batch_tokens=self._micro_batch_tokens,
        )
        return {
            "micro_batches": [collate(micro, self._examples) for micro in shares],
            "supervised": supervised(step, self._examples),
        }

    def _skip_if_not_finite(self, model: Any) -> None:
        """Drop the gradients of a step that is not finite (all ranks see the same sums); give up after several in a row."""
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if not grads or bool(torch.stack([g.detach().float().sum() for g in grads]).isfinite().all()):
            self._skipped = 0
            return
        self._skipped += 1
        model.zero_grad(set_to_none=True)
        if self._skipped >= MAX_SKIPPED_STEPS:
            raise NonFiniteLossError(
                f"{MAX_SKIPPED_STEPS} steps in a row (up to {self.state.global_step + 1}) had gradients that are not finite: lower training.learning_rate"
            )


class ReportMetrics(TrainerCallback):
    """Sends losses and speeds to the sink, on rank 0."""

    def __init__(self, sink: MetricSink) -> None:
        self._sink, self._started, self._from = sink, time.perf_counter(), 0
        self.trainer: TokenBudgetTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self._started, self._from = time.perf_counter(), self.trainer.tokens_seen

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        assert self.trainer is not None
        seen = self.trainer.tokens_seen
        metrics = {
            "train/loss": logs["loss"],
            "train/learning_rate": logs["learning_rate"],
            "train/grad_norm": float(logs["grad_norm"]),
            "train/tokens_seen": float(seen),
            "train/tokens_per_second": (seen - self._from) / max(1e-9, time.perf_counter() - self._started),
        }
        self._sink.log_metrics(metrics, state.global_step)


def build_trainer(
    pipeline: spec.Pipeline,
    examples: Sequence[Example],
    output_dir: Path,
    sink: MetricSink,
    *,
    total_tokens: int | None = None,
    save_steps: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TokenBudgetTrainer:
    """A trainer for this process (a rank of a process group, or alone).

    `total_tokens` ends the schedule there (the budget of a trial); otherwise training.num_train_epochs decides. `save_steps`
    None saves nothing.
    """
    training, device = pipeline.training, "cuda" if pipeline.scaling.use_gpu else "cpu"
    schedule = make_schedule(pipeline, examples, total_tokens)
    base = load_base(pipeline.model, f"cuda:{torch.cuda.current_device()}" if device == "cuda" else "cpu")
    model = attach_lora(base, pipeline.lora, training.seed)
    warmup = max(1, round(training.warmup_ratio * len(schedule))) if training.warmup_ratio else 0
    arguments = SFTConfig(
        output_dir=str(output_dir),
        max_steps=len(schedule),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=warmup,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        logging_steps=training.logging_steps,
        logging_first_step=True,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        save_total_limit=2,
        report_to=[],
        use_cpu=device == "cpu",
        # Adapters are float32 master copies: without autocast their products would run in float32 on the GPU.
        bf16=device == "cuda" and pipeline.model.dtype == "bfloat16",
        optim="adamw_torch_fused" if device == "cuda" else "adamw_torch",
        activation_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing=False,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=0,
    )
    report = ReportMetrics(sink)
    trainer = TokenBudgetTrainer(
        examples=examples,
        schedule=schedule,
        micro_batch_tokens=training.micro_batch_tokens or max(pipeline.data.max_length, DEFAULT_MICRO_BATCH_TOKENS[device]),
        model=model,
        args=arguments,
        # SFTTrainer wants a data set to look at; batches come from the schedule.
        train_dataset=Dataset.from_dict({"input_ids": [examples[0].input_ids], "labels": [examples[0].labels]}),
        processing_class=load_tokenizer(pipeline.model),
        callbacks=[report, *callbacks],
    )
    report.trainer = trainer
    return trainer


def make_schedule(pipeline: spec.Pipeline, examples: Sequence[Example], total_tokens: int | None) -> list[Step]:
    """The global steps of a run."""
    lengths = [len(example.input_ids) for example in examples]
    training = pipeline.training
    epochs = training.num_train_epochs if total_tokens is None else math.ceil(total_tokens / max(1, sum(lengths)))
    steps = plan_steps(
        lengths,
        tokens_per_step=training.tokens_per_step,
        max_length=pipeline.data.max_length,
        packing=pipeline.data.packing,
        seed=training.seed,
        epochs=epochs,
    )
    if total_tokens is None:
        return steps
    seen, kept = 0, []
    for step in steps:
        if seen >= total_tokens:
            break
        kept.append(step)
        seen += sum(lengths[i] for pack in step for i in pack)
    return kept
