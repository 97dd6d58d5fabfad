"""What stands before the replicas: HAProxy with Serve's throughput mode, or Ray's own proxy in Python.

Serve reads this from the environment of its controller, proxies and replicas when they start.
"""

import math
import socket
from typing import Any

from altiplano import spec
from altiplano.serve.routing import haproxy_balance

ENABLE = "RAY_SERVE_ENABLE_HA_PROXY"


def proxy_environment(endpoint: spec.Serve) -> dict[str, str]:
    """Environment variables of Serve's processes.

    HAProxy's pages of statistics get free ports: Ray's defaults are one per machine, and a second cluster could not start.
    """
    if endpoint.http_proxy == "python":
        return {ENABLE: "0"}
    stats, metrics = _free_ports(2)
    return {
        ENABLE: "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # HAProxy learns at once that a replica leaves; Ray's 30 s are for load balancers that only look now and then.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        # Every change of replicas starts a new HAProxy; the old one ends its streams for this long.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(int(endpoint.graceful_shutdown_timeout_s)),
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": haproxy_balance(endpoint),
        "RAY_SERVE_HAPROXY_RETRY_ON": haproxy_retries(endpoint),
    }


def haproxy_retries(endpoint: spec.Serve) -> str:
    """When HAProxy asks another replica; its syntax, as lines of its section `defaults`.

    A replica that dies has connections for a while yet: what is sent there gets no byte of an answer. HAProxy can only send it
    again if it had the whole body before it sent any of it, so it waits for that, as long as a replica would; what does not fit
    into its buffer (16 KiB with the headers) it passes on without a second chance. Nothing that is asked for suffers from being
    asked twice, but for a rating, which may count twice if the replica dies between counting and saying so.
    """
    patience_ms = math.ceil(1000 * endpoint.limits.body_timeout_s)
    return f"conn-failure empty-response\n    option http-buffer-request\n    timeout http-request {patience_ms}ms"


def proxy_of(application_config: dict[str, Any]) -> str:
    """Through which one a Serve application was deployed, `haproxy` or `python`."""
    environment = application_config.get("runtime_env", {}).get("env_vars", {})
    return "haproxy" if environment.get(ENABLE) == "1" else "python"


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
