"""The endpoint with adapters that go wrong: a fault travels with the adapter as `fault.json`, through the registry into the replica.

Ray Serve imports `build` by name. Everything else is the product's own code.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray.serve import Application

from altiplano.serve import deployment
from altiplano.serve import messages as m
from altiplano.serve.application import parse
from altiplano.serve.engine_errors import RefusedError
from altiplano.serve.metering import MeteredEngineClient

FAULT = "fault.json"


class FaultyClient(MeteredEngineClient):
    """Adapters with {"fails": share} fail for that share of requests, those with {"late_s": seconds} begin so much later, and those
    with {"refused": 1} are not taken by the first replica that is asked to."""

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._faults: dict[str, dict[str, float]] = {}
        self._asked = 0

    async def load_adapter(self, name: str, path: str) -> None:
        fault = Path(path) / FAULT
        self._faults[name] = json.loads(fault.read_text()) if fault.exists() else {}
        if self._faults[name].get("refused"):
            with contextlib.suppress(FileExistsError):
                Path(f"{path}.refused").touch(exist_ok=False)
                raise ValueError("this replica has no room for it")
        await super().load_adapter(name, path)

    async def generate(self, request_id: str, prompt: list[int], sampling: m.Sampling, **more: Any) -> AsyncIterator[m.Token]:
        fault = self._faults.get(more.get("adapter") or "", {})
        if fault:
            self._asked += 1
            await asyncio.sleep(fault.get("late_s", 0))
            if self._asked % 100 < 100 * fault.get("fails", 0):
                raise RefusedError("this adapter is broken")
        async for token in super().generate(request_id, prompt, sampling, **more):
            yield token


class Settings(dict[str, Any]):
    """Arguments of a replica; reading them in its process imports this module there, and so brings the faults."""


deployment.MeteredEngineClient = FaultyClient  # type: ignore[misc]


def build(args: dict[str, Any]) -> Application:
    """The application with faults."""
    settings, endpoint = parse(args)
    return deployment.Endpoint.bind(Settings(asdict(settings)), endpoint.model_dump(mode="json"))  # type: ignore[attr-defined,no-any-return]
