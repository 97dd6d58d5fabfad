"""Who waits for whom in a mixed load: seconds that the host waited for the GPU, seconds of its own work, and what it launched.

usage: PYTHONPATH=platform:kernels python benchmarks/engine/host_share.py MODEL REQUESTS
"""

import sys
import time
from collections import Counter

from workloads import Bench

from altiplano.engine.cuda.overlap import OverlappedEngine
from altiplano.engine.cuda.runner import CudaRunner, Ticket


def main(model: str, requests: int) -> None:
    bench = Bench(model, "bf16", "")
    spent: Counter[str] = Counter()
    steps: Counter[int] = Counter()

    def watch(owner: type, name: str, label: str) -> None:
        kept = getattr(owner, name)

        def timed(*values: object, **named: object) -> object:
            started = time.perf_counter()
            found = kept(*values, **named)
            spent[label] += time.perf_counter() - started
            return found

        setattr(owner, name, timed)

    watch(Ticket, "tokens", "waiting for tokens")
    watch(CudaRunner, "launch_prefill", "launching prompts")
    watch(OverlappedEngine, "_launch_burst", "launching bursts")
    watch(OverlappedEngine, "_book_burst", "booking tokens")
    watch(CudaRunner, "publish", "publishing")
    decode = CudaRunner.launch_decode

    def counted(self: CudaRunner, slots: list[int], times: int) -> None:
        steps[len(slots) // 32 * 32] += times
        decode(self, slots, times)

    CudaRunner.launch_decode = counted  # type: ignore[method-assign]
    prompts = [bench.ids(bench._dice.randint(100, 1024)) for _ in range(requests)]
    lengths = [bench._dice.randint(100, 1024) for _ in range(requests)]
    bench.engine.runner.warm_up(range(1, min(requests, 1024) + 1))  # type: ignore[attr-defined]
    for _ in range(2):
        spent.clear()
        steps.clear()
        seconds = bench.seconds(prompts, lengths, 0.6)
    print(
        f"{model} {requests} requests: {seconds:.2f} s, {sum(lengths) / seconds:.0f} output tok/s, {sum(map(len, prompts))} prompt tokens"
    )
    print({label: round(value, 3) for label, value in spent.most_common()})
    print(f"{sum(steps.values())} steps by rows:", dict(sorted(steps.items())), "preemptions", bench.engine.stats().preemptions)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
