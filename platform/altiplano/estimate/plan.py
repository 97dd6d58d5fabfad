"""From a pipeline and its token counts to memory, speed, hours and money."""

from dataclasses import dataclass

from altiplano import spec
from altiplano.estimate.hardware import Hardware
from altiplano.estimate.memory import Memory, memory
from altiplano.estimate.shape import ModelShape

# The model of FLOPs is exact to a few percent; the share of the peak that a stack reaches is not. Band around the estimate.
UNCERTAINTY = 0.35
# Packing a worker with more tokens than this at once brings nothing: the matrix products are large enough.
LARGEST_MICRO_BATCH = 16_384


class DoesNotFitError(ValueError):
    """Not even one row fits in memory."""


@dataclass(frozen=True)
class Plan:
    """What a run needs. Times are for all workers together; `low` and `high` bound the hours."""

    hardware: str
    num_workers: int
    micro_batch_tokens: int
    memory: Memory
    tokens_per_second: float
    train_tokens: int
    tune_tokens: int
    hours: float
    hours_low: float
    hours_high: float
    usd: float | None


def plan(
    pipeline: spec.Pipeline, shape: ModelShape, hardware: Hardware, epoch_tokens: int, usd_per_worker_hour: float | None = None
) -> Plan:
    """Estimate `pipeline` on `hardware` with `epoch_tokens` tokens in one pass over the training data.

    Raises:
        DoesNotFitError: a row of data.max_length does not fit in the memory of one worker.
    """
    micro = pipeline.training.micro_batch_tokens or _largest_that_fits(pipeline, shape, hardware)
    need = memory(pipeline, shape, micro)
    if need.total > hardware.memory_bytes:
        raise DoesNotFitError(_advice(pipeline, need, hardware, micro))
    speed = hardware.flops * hardware.useful_share / flops_per_token(pipeline, shape)
    train = int(epoch_tokens * pipeline.training.num_train_epochs)
    tune = _tune_tokens(pipeline)
    workers = pipeline.scaling.num_workers
    concurrent = pipeline.tune.max_concurrent_trials if pipeline.tune else 1
    hours = (train / (speed * workers) + tune / (speed * concurrent)) / 3600
    paid = (train / speed + tune / speed) / 3600
    return Plan(
        hardware=hardware.name,
        num_workers=workers,
        micro_batch_tokens=micro,
        memory=need,
        tokens_per_second=speed * workers,
        train_tokens=train,
        tune_tokens=tune,
        hours=hours,
        hours_low=hours * (1 - UNCERTAINTY),
        hours_high=hours / (1 - UNCERTAINTY),
        usd=None if usd_per_worker_hour is None else paid * usd_per_worker_hour,
    )


def flops_per_token(pipeline: spec.Pipeline, shape: ModelShape) -> float:
    """Useful FLOPs of one training token: forward and backward through frozen weights, the adapter, causal attention.

    No weight gradients of the base; recomputation by gradient checkpointing is work, but not useful work, and counts here
    because it takes time.
    """
    heads = shape.num_attention_heads * shape.head_dim
    attention = 2 * shape.num_hidden_layers * heads * pipeline.data.max_length / 2
    forward = 2 * (shape.body + shape.head) + attention
    backward = 2 * (shape.body + shape.head) + 2 * attention
    again = 2 * shape.body + attention if pipeline.training.gradient_checkpointing else 0
    return forward + backward + again + 6 * shape.adapter(pipeline.lora.r)


def _largest_that_fits(pipeline: spec.Pipeline, shape: ModelShape, hardware: Hardware) -> int:
    """The most tokens of one forward pass: a power-of-two multiple of a row, within memory, the step and usefulness."""
    row = pipeline.data.max_length
    limit = max(row, min(LARGEST_MICRO_BATCH, pipeline.training.tokens_per_step // pipeline.scaling.num_workers))
    tokens = row
    while tokens * 2 <= limit and memory(pipeline, shape, tokens * 2).total <= hardware.memory_bytes:
        tokens *= 2
    return tokens


def _tune_tokens(pipeline: spec.Pipeline) -> int:
    """Tokens of the sweep if halving works as planned: each rung keeps one trial in `reduction_factor`."""
    tune = pipeline.tune
    if tune is None:
        return 0
    total, alive, reached, rung = 0.0, float(tune.num_samples), 0, tune.scheduler.grace_period
    while rung < tune.scheduler.max_t:
        total += alive * (rung - reached)
        alive, reached = max(1.0, alive / tune.scheduler.reduction_factor), rung
        rung *= tune.scheduler.reduction_factor
    return int(total + alive * (tune.scheduler.max_t - reached))


def _advice(pipeline: spec.Pipeline, need: Memory, hardware: Hardware, micro: int) -> str:
    gib = 1 << 30
    parts = ", ".join(
        f"{name} {getattr(need, name) / gib:.1f}" for name in ("weights", "adapter", "activations", "logits", "fixed")
    )
    ways = ["lower data.max_length"]
    if micro > pipeline.data.max_length:
        ways.insert(0, f"set training.micro_batch_tokens={pipeline.data.max_length}")
    if not pipeline.training.gradient_checkpointing:
        ways.insert(0, "set training.gradient_checkpointing=true")
    if not pipeline.model.load_in_4bit:
        ways.append("set model.load_in_4bit=true")
    return (
        f"the run needs {need.total / gib:.1f} GiB per worker ({parts}), and {hardware.name} has {hardware.memory_bytes / gib:.1f} GiB: "
        + ", or ".join(ways)
    )
