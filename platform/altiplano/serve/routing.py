"""Which replica gets a request: the one with the fewest, or the one that has the session's prefix in its cache.

A session is named by the header x-session-id. It keeps its replica while replicas come and go, but for those that must move; a
replica that has half as much again as the average passes new requests on, so that one busy session cannot drown it.
"""

from typing import Any

from altiplano import spec

CONSISTENT_HASH = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
# Percent of the average load; the bounded loads of Mirrokni, Thorup, Zadimoghaddam (2018).
MOST_LOADED = 150
# HAProxy's syntax, as lines of its section `defaults`. Requests without the header take turns.
_BY_SESSION = f"hdr(x-session-id)\n    hash-type consistent\n    hash-balance-factor {MOST_LOADED}"


def haproxy_balance(endpoint: spec.Serve) -> str:
    """How HAProxy chooses a replica."""
    return _BY_SESSION if endpoint.routing == "session" else "leastconn"


def routing_options(endpoint: spec.Serve) -> dict[str, Any]:
    """The part of a deployment's options that says how Ray's own proxy chooses a replica."""
    if endpoint.routing == "least_loaded" or endpoint.http_proxy == "haproxy":
        return {}
    return {"request_router_config": {"request_router_class": CONSISTENT_HASH}}
