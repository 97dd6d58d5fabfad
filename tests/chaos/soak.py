"""`make soak`: twenty minutes of mixed traffic on two replicas, and memory, file descriptors and KV pages that must stay where they are.

Clients stream, ask for whole answers, leave in mid-stream and send nonsense. Numbers of every replica and engine are read every few
seconds. What a warm-up of a quarter of the time leaves behind is the level; the last quarter must not be above it by more than the
tolerance. Prints one line per sample, then the verdict; ends with code 1 when something has grown.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import httpx
import psutil

from altiplano import spec
from altiplano.cluster import local_ray
from altiplano.cluster.processes import free_port
from altiplano.serve import deploy

from .conftest import SETTINGS, Platform, body, eventually, running_ray

CLIENTS = 12
SAMPLE_EVERY_S = 5.0
MIB = 1 << 20
# Allocators keep some of what they once needed, and a connection may be between two requests at one sample.
TOLERANCE = {"memory_mib": 48.0, "files": 16.0, "pages": 0.25}


@dataclass(frozen=True)
class Sample:
    """Sums over replicas and engines; `pages` is the largest share of a KV cache that requests hold (0 to 1)."""

    memory_mib: float
    files: float
    pages: float


def grown(samples: Sequence[Sample]) -> dict[str, float]:
    """By how much each number's median in the last quarter is above that in the second, where that is more than tolerated."""
    quarter = len(samples) // 4
    if not quarter:
        raise ValueError(f"{len(samples)} samples are too few to compare two quarters: let it run for at least 20 s")
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    growth = {
        entry.name: statistics.median(getattr(s, entry.name) for s in late)
        - statistics.median(getattr(s, entry.name) for s in early)
        for entry in fields(Sample)
    }
    return {name: more for name, more in growth.items() if more > TOLERANCE[name]}


def sample(platform: Platform) -> Sample:
    """How it is now."""
    replicas = platform.replicas()
    found = [*map(psutil.Process, replicas), *map(platform.engine, replicas)]
    return Sample(
        memory_mib=sum(process.memory_info().rss for process in found) / MIB,
        files=sum(process.num_fds() for process in found),
        pages=max(platform.gauges("altiplano_kv_cache_usage_perc")),
    )


async def traffic(url: str, seen: Counter[str], stop: threading.Event) -> None:
    """Every kind of client, until `stop`."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        await asyncio.gather(*(_client(http, seen, stop) for _ in range(CLIENTS)))


async def _client(http: httpx.AsyncClient, seen: Counter[str], stop: threading.Event) -> None:
    draw = random.Random()
    while not stop.is_set():
        kind = draw.choice(("streams", "streams", "whole", "leaves", "nonsense"))
        wanted = body(draw.randint(4, 200)) | {"prompt": f"A note of {draw.random()}", "stream": kind in ("streams", "leaves")}
        with suppress(httpx.HTTPError):
            if kind == "nonsense":
                answer = await http.post("/v1/completions", json=wanted | {"max_tokens": -1})
                seen[kind] += answer.status_code == 400
            else:
                async with http.stream("POST", "/v1/completions", json=wanted) as answer:
                    async for _ in answer.aiter_bytes():
                        if kind == "leaves":
                            break
                seen[kind] += answer.status_code == 200
            seen["5xx"] += answer.status_code >= 500


def soak(platform: Platform, minutes: float) -> tuple[list[Sample], Counter[str]]:
    """Traffic for so long: (samples, answers by kind of client)."""
    stop, seen, samples = threading.Event(), Counter[str](), list[Sample]()
    thread = threading.Thread(target=lambda: asyncio.run(traffic(platform.url, seen, stop)))
    began = time.monotonic()
    thread.start()
    try:
        while time.monotonic() - began < 60 * minutes:
            stop.wait(SAMPLE_EVERY_S)
            samples.append(sample(platform))
            last = samples[-1]
            print(
                f"{time.monotonic() - began:6.0f} s {last.memory_mib:8.0f} MiB {last.files:6.0f} files {last.pages:6.1%} of the pages "
                f"{seen.total():8d} answers",
                flush=True,
            )
    finally:
        stop.set()
        thread.join()
    return samples, seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory(prefix="altiplano-soak-") as folder:
        workspace = Path(folder)
        try:
            control = running_ray(workspace)
            two = spec.ServeAutoscaling(min_replicas=2, max_replicas=2)
            endpoint = spec.Serve(port=free_port(), max_num_seqs=8, max_model_len=512, kv_cache_tokens=16384, autoscaling=two)
            deploy(SETTINGS, endpoint, control)
            platform = Platform(control, endpoint).wait()
            before = platform.replicas()
            samples, seen = soak(platform, minutes)
            eventually(lambda: not any(platform.stats().values()), 60)
            eventually(lambda: max(platform.gauges("altiplano_kv_cache_usage_perc")) == 0, 60)
            same = platform.replicas() == before
        finally:
            local_ray.stop(workspace)
    more = grown(samples)
    print(
        f"{dict(seen)}; " + (f"grown: {more}" if more else "memory, files and pages are flat, and all pages are free at the end")
    )
    if not same:
        print("a replica was replaced on the way")
    return 1 if more or not same or seen["5xx"] else 0


if __name__ == "__main__":
    sys.exit(main())
