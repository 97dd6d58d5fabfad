"""One front end under uvicorn in a process of its own, as a replica of Ray Serve has it: prints its port, ends with its standard input.

python benchmarks/serving/front_end.py endpoint             # the application with the real engine's process and cria
python benchmarks/serving/front_end.py endpoint --step-s 0  # with the fake engine
python benchmarks/serving/front_end.py bare --step-s 0.02   # nothing but uvicorn: a stream of as many chunks
"""

import argparse
import asyncio
import gc
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from altiplano import spec
from altiplano.models.cria import cria_path
from altiplano.serve import ServeSettings, engine_client
from altiplano.serve.app import create_app
from altiplano.serve.deployment import make_generator
from altiplano.serve.governance import Governance

STREAMS = 64
FAKE_STEP_S = "ALTIPLANO_FAKE_STEP_S"
AS_RAY = ["nice", "-n", "15"]  # Ray's workers run so: nobody who is compared may come before them
SETTINGS = ServeSettings(
    model_path=str(cria_path()), served_model_name="cria", max_model_len=2048, max_num_seqs=STREAMS, kv_cache_tokens=65536
)
CHUNK = b'data: {"id":"cmpl-0","object":"text_completion","created":0,"model":"cria","choices":[{"index":0,"text":" word"}]}\n\n'


def fake_engine(step_s: float) -> list[str]:
    """The command of a fake engine."""
    return [sys.executable, str(Path(__file__).with_name("fake_engine.py")), "--step-s", str(step_s)]


class Steps:
    """The fake engine's clock: one step for all who wait, `step_s` seconds after the first of them began to."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._next: asyncio.Event | None = None

    async def wait(self) -> None:
        if self._next is None:
            self._next = asyncio.Event()
            asyncio.get_running_loop().call_later(self._step_s, self._end, self._next)
        await self._next.wait()

    def _end(self, step: asyncio.Event) -> None:
        self._next = None
        step.set()


def bare(step_s: float) -> Starlette:
    """uvicorn's own cost: the body is read, and a stream has `max_tokens` chunks, one a step."""
    steps = Steps(step_s)

    async def chunks(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            await steps.wait()
            yield CHUNK
        yield b"data: [DONE]\n\n"

    async def answer(request: Request) -> Response:
        return StreamingResponse(chunks((await request.json())["max_tokens"]), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/completions", answer, methods=["POST"])])


async def serve(kind: str, step_s: float | None) -> None:
    """Until standard input ends."""
    generator = None
    if kind == "bare":
        app: object = bare(step_s or 0.0)
    else:
        if step_s is not None:
            engine_client.COMMAND[:] = fake_engine(step_s)
        generator = made = await make_generator(SETTINGS)
        app = create_app(lambda: made, Governance.of(spec.Serve(max_num_seqs=STREAMS)))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(1024)
        # What Ray Serve gives its replicas' uvicorn: serve/_private/http_util.py.
        gc.collect()
        gc.freeze()
        server = uvicorn.Server(uvicorn.Config(app, loop="uvloop", lifespan="off", access_log=False, log_config=None))  # type: ignore[arg-type]
        serving = asyncio.create_task(server.serve([listening]))
        print(listening.getsockname()[1], flush=True)
        await asyncio.to_thread(sys.stdin.read)
        server.should_exit = True
        await serving
    if generator is not None:
        await generator.client.stop()


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("kind", choices=("endpoint", "bare"))
    options.add_argument("--step-s", type=float)
    args = options.parse_args()
    uvloop.run(serve(args.kind, args.step_s))  # as Ray's replicas
