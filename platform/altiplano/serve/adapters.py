"""Adapters of one engine: which weights answer under which name.

In the engine an adapter is called by its name and the digest of its manifest. Other files under a known name are another adapter
beside the old one, which goes with its last request: nothing that was computed with the one is ever used for the other.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from altiplano.models.manifest import manifest_digest, verify_manifest
from altiplano.serve.engine_client import EngineClient
from altiplano.serve.engine_errors import EngineDiedError, RefusedError

BASE = "base"  # what answers without an adapter

log = logging.getLogger("altiplano.serve")


@dataclass(frozen=True)
class Adapter:
    """One set of weights. `digest` is that of its manifest, in hex."""

    name: str
    digest: str
    path: str

    @property
    def id(self) -> str:
        """What the engine calls it."""
        return f"{self.name}@{self.digest[:16]}"


def name_of(adapter_id: str | None) -> str:
    """The name behind an id; `base` for none."""
    return BASE if adapter_id is None else adapter_id.rpartition("@")[0]


class Adapters:
    """Those that answer by name, and those that still answer somebody."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._by_name: dict[str, Adapter] = {}
        self._loaded: set[str] = set()
        self._users: Counter[str] = Counter()  # requests by the adapter that answers them

    @property
    def names(self) -> list[str]:
        return sorted(self._by_name)

    def get(self, name: str) -> Adapter | None:
        return self._by_name.get(name)

    async def load(self, wanted: Mapping[str, str]) -> dict[str, Adapter]:
        """Load those of `wanted` (name to directory) that the engine does not have, and return all of them for `use`.

        Raises:
            ManifestError: files are missing or damaged. Nothing new stays loaded then.
            RefusedError: one does not fit. The same.
        """
        found, fresh = dict[str, Adapter](), list[str]()
        try:
            for name, path in wanted.items():
                adapter = found[name] = Adapter(name, await asyncio.to_thread(manifest_digest, Path(path)), path)
                if adapter.id not in self._loaded:
                    await asyncio.to_thread(verify_manifest, Path(path))
                    fresh.append(adapter.id)
                    await self._client.load_adapter(adapter.id, path)
                    self._loaded.add(adapter.id)
        except BaseException:
            for adapter_id in fresh:
                await self._unload(adapter_id)
            raise
        return found

    async def use(self, loaded: dict[str, Adapter]) -> None:
        """From here on these answer, and no others; those that nobody uses any more are unloaded."""
        self._by_name = loaded
        for adapter_id in sorted(self._loaded):
            await self._retire(adapter_id)

    def hold(self, adapter: Adapter | None) -> None:
        """A request is answered by this one; `release` follows."""
        if adapter is not None:
            self._users[adapter.id] += 1

    async def release(self, adapter: Adapter | None) -> None:
        """A request has ended."""
        if adapter is not None:
            self._users[adapter.id] -= 1
            await self._retire(adapter.id)

    async def _retire(self, adapter_id: str) -> None:
        if not self._users[adapter_id] and adapter_id not in {adapter.id for adapter in self._by_name.values()}:
            del self._users[adapter_id]
            await self._unload(adapter_id)

    async def _unload(self, adapter_id: str) -> None:
        try:
            await self._client.unload_adapter(adapter_id)
        except (RefusedError, EngineDiedError, TimeoutError) as error:
            # Requests that their clients left are being aborted, or the engine starts again: the next change tries again.
            log.warning("adapter %s stays loaded for now: %s", adapter_id, error)
            return
        self._loaded.discard(adapter_id)
