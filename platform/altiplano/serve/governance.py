"""What one front end knows about its clients: keys, limits, metrics, costs, traces. Made once per process."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from altiplano import spec
from altiplano.serve.cost import CostCollector, Ledger
from altiplano.serve.errors import ApiError
from altiplano.serve.keys import Key, KeyFile, KeyRefusedError, KeyRing, Scope
from altiplano.serve.limits import Queue, Quotas
from altiplano.serve.metrics import Metrics
from altiplano.serve.response_cache import ResponseCache
from altiplano.serve.routes import Entry
from altiplano.serve.tracing import Traces, make_traces


@dataclass
class Governance:
    """`keys` is None where only loopback is served; `cache` is None when it is off. `clock` is monotonic, in seconds."""

    limits: spec.ServeLimits
    keys: KeyRing | None
    queue: Queue
    quotas: Quotas
    metrics: Metrics
    ledger: Ledger
    cache: ResponseCache | None
    traces: Traces
    clock: Callable[[], float]

    @classmethod
    def of(cls, endpoint: spec.Serve, clock: Callable[[], float] = time.perf_counter) -> "Governance":
        """
        Raises:
            KeyFileError: the key file is damaged or empty.
            ValueError: traces are asked for and OpenTelemetry is missing.
        """
        metrics, ledger = Metrics(), Ledger(endpoint.usd_per_hour, clock())
        metrics.registry.register(CostCollector(ledger, clock))
        return cls(
            endpoint.limits,
            KeyRing(KeyFile(Path(endpoint.api_keys_file))) if endpoint.api_keys_file is not None else None,
            Queue(endpoint.max_num_seqs, endpoint.limits.max_queued_seqs),
            Quotas(endpoint.limits),
            metrics,
            ledger,
            ResponseCache(endpoint.response_cache_bytes) if endpoint.response_cache_bytes else None,
            make_traces(endpoint.otlp_endpoint),
            clock,
        )

    def authorize(self, entry: Entry, authorization: str | None) -> Key | None:
        """The key of a request, None without keys or on a public route that was asked without one.

        Raises:
            ApiError: 401 without a valid key, 403 when its scope does not reach.
        """
        if self.keys is None or (entry.scope is Scope.public and authorization is None):
            return None
        scheme, _, text = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not text.strip():
            raise ApiError(
                401, "this route needs an API key: send the header 'Authorization: Bearer <key>'", code="missing_api_key"
            )
        try:
            key = self.keys.check(text.strip())
        except KeyRefusedError as error:
            raise ApiError(401, str(error), code="invalid_api_key") from error
        if not key.scope.includes(entry.scope):
            raise ApiError(403, f"this route needs a key with the scope {entry.scope}, and yours has {key.scope}")
        return key
