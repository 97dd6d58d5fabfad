"""One load from several processes, where one cannot follow all streams."""

import asyncio
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

from altiplano.client.bench.load import Record, Run, raise_file_limit, run_load
from altiplano.client.endpoint import Endpoint

# Between the last process being ready and the first request.
LEAD_S = 0.1


async def run_parts(
    endpoint: Endpoint,
    connect_timeout_s: float,
    path: str,
    bodies: Sequence[dict[str, Any]],
    schedule: Sequence[float],
    max_concurrency: int | None,
    processes: int,
) -> Run:
    """What `run_load` does, with request i in process i % `processes`, each with its share of `max_concurrency`.

    Raises:
        ValueError: fewer places than processes.
        RuntimeError: a process died.
    """
    if max_concurrency is not None and max_concurrency < processes:
        raise ValueError(f"--max-concurrency {max_concurrency} cannot be shared by {processes} processes: use fewer")
    context = get_context("spawn")
    ends, children = [], []
    for i in range(processes):
        ours, theirs = context.Pipe()
        limit = None if max_concurrency is None else len(range(i, max_concurrency, processes))
        part = (theirs, endpoint, connect_timeout_s, path, bodies[i::processes], schedule[i::processes], limit)
        children.append(context.Process(target=_part, args=part, daemon=True))
        children[-1].start()
        theirs.close()
        ends.append(ours)
    try:
        await asyncio.gather(*(_receive(end) for end in ends))
        # perf_counter is the machine's monotonic clock: the same in every process.
        zero = perf_counter() + LEAD_S
        for end in ends:
            end.send(zero)
        parts: list[Run] = await asyncio.gather(*(_receive(end) for end in ends))
    finally:
        for child, end in zip(children, ends, strict=True):
            child.terminate()
            child.join()
            end.close()
    records = list[Record]()
    for i in range(len(bodies)):
        records.append(parts[i % processes].records[i // processes])
    return Run(records, max(part.cpu_share for part in parts), max(part.loop_lag for part in parts))


def _part(
    parent: Connection,
    endpoint: Endpoint,
    connect_timeout_s: float,
    path: str,
    bodies: Sequence[dict[str, Any]],
    schedule: Sequence[float],
    max_concurrency: int | None,
) -> None:
    async def main() -> Run:
        async with endpoint.open(None, connect_timeout_s) as client:
            parent.send("ready")
            return await run_load(client, path, bodies, schedule, max_concurrency, zero=parent.recv())

    raise_file_limit()
    parent.send(asyncio.run(main()))


async def _receive(end: Connection) -> Any:
    try:
        return await asyncio.to_thread(end.recv)
    except EOFError as error:
        raise RuntimeError("a process of the load generator died: nothing was measured") from error
