"""Sleep, death, and what comes after."""

import asyncio
import contextlib
import os
import signal
import subprocess
import time

import torch

from altiplano.serve import messages as m
from altiplano.serve.engine_errors import AsleepError, EngineDiedError

from .bench import Bench, check, refused


async def sleep_and_wake(bench: Bench) -> str:
    await bench.client.load_adapter("tuned", str(bench.adapters["one"]))
    if bench.without_sleep or not torch.cuda.is_available():
        return await refused(bench.client.sleep.begin(1), "cannot sleep on this platform")
    await refused(bench.client.sleep.begin(2), "level 2")
    before, held = await bench.greedy(bench.prompts[0]), memory_used()
    await bench.client.sleep.begin(1)
    asleep = memory_used()
    await refused(bench.greedy(bench.prompts[0]), "sleeps", kind=AsleepError)
    await bench.client.sleep.end()
    after, tuned = await bench.greedy(bench.prompts[0]), await bench.greedy(bench.prompts[1], adapter="tuned")
    check(after.cached == 0, f"{after.cached} tokens of before the sleep were found")
    for answer in (before, after):
        await bench.same_choice(bench.prompts[0], answer)
    await bench.same_choice(bench.prompts[1], tuned, "one")
    if held is None or asleep is None:
        return "memory not measured here"
    check(asleep < held, f"{held} MiB awake, {asleep} MiB asleep")
    return f"{held} MiB awake, {asleep} MiB asleep"


async def death_of_the_engine(bench: Bench) -> str:
    async def broken_off() -> None:
        async for _ in bench.stream(bench.prompts[0], m.Sampling(max_tokens=400, temperature=0.0, ignore_eos=True)):
            if bench.client.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(bench.client.pid, signal.SIGKILL)

    return await refused(asyncio.wait_for(broken_off(), 20), "ended", kind=EngineDiedError)


async def a_new_life(bench: Bench) -> str:
    started = time.perf_counter()
    await bench.client.wait_until_ready()
    seconds = time.perf_counter() - started
    await bench.same_choice(bench.prompts[0], await bench.greedy(bench.prompts[0]))
    await bench.same_choice(bench.prompts[0], await bench.greedy(bench.prompts[0], adapter="tuned"), "one")
    return f"{seconds:.1f} s after its death it answers, with its adapter"


def memory_used() -> int | None:
    """MiB in use on the first card, by everybody."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()[0])
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        return None
