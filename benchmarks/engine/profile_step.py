"""Where each microsecond of a decode step goes, by kernel over graph replays: a kernel has the time from the end of the one before to its own end,
for it starts while that one still runs.

usage: PYTHONPATH=platform:kernels python benchmarks/engine/profile_step.py MODEL BATCH CONTEXT [TEMPERATURE]
"""

import sys
from collections import defaultdict
from collections.abc import Iterable

import decode_steps
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from workloads import model_directory

from altiplano.engine import EngineConfig
from altiplano.engine.cuda.runner import CudaRunner

STEPS = 8


def shares(spans: Iterable[tuple[str, float, float]]) -> dict[str, list[float]]:
    """(name, start, end) of kernels in any order: for each name what its kernels added to the time at which all so far had ended."""
    found: dict[str, list[float]] = defaultdict(list)
    ended: float | None = None
    for name, start, end in sorted(spans, key=lambda span: span[2]):
        found[name].append(end - (start if ended is None else ended))
        ended = end
    return found


def main(model: str, batch: int, context: int, temperature: float = 0.0) -> None:
    width = decode_steps.pages_per_slot(context)
    config = EngineConfig(
        model=model_directory(model), dtype="bfloat16", device="cuda", load_format="dummy", max_model_len=context, max_num_seqs=batch,
        num_blocks=batch * width,
    )  # fmt: skip
    runner = CudaRunner(config)
    runner.warm_up([batch])
    slots = list(range(batch))

    def reset() -> None:
        decode_steps.place(runner, batch, width, context - 1, temperature)

    reset()
    runner.launch_decode(slots, 20)
    reset()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    runner.launch_decode(slots, 2)
    start.record()
    runner.launch_decode(slots, STEPS)
    end.record()
    torch.cuda.synchronize()
    print(f"{model} B={batch} context {context}: {start.elapsed_time(end) / STEPS * 1e3:.0f} us a step")
    reset()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        runner.launch_decode(slots, STEPS)
        torch.cuda.synchronize()
    kernels = (event for event in trace.events() if event.device_type == DeviceType.CUDA)
    times = shares((event.name, event.time_range.start, event.time_range.end) for event in kernels)
    for name, found in sorted(times.items(), key=lambda item: -sum(item[1])):
        print(f"{sum(found) / STEPS:9.1f} us  {len(found) / STEPS:6.1f} x {sum(found) / len(found):7.2f}  {name[:110]}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *map(float, sys.argv[4:]))
