"""The one table of routes: who may call what. A route that is not here is not reachable, whatever the application has."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from starlette.routing import BaseRoute, Route, compile_path

from altiplano.serve.keys import Scope


@dataclass(frozen=True)
class Entry:
    """One route. `metered` routes use the engine: they count for quotas and the queue."""

    method: str
    path: str
    scope: Scope
    metered: bool = False


TABLE = (
    Entry("GET", "/health", Scope.public),
    Entry("GET", "/ready", Scope.public),
    Entry("GET", "/version", Scope.public),
    Entry("GET", "/openapi.json", Scope.public),
    Entry("GET", "/", Scope.public),
    Entry("GET", "/page/{path:path}", Scope.public),
    Entry("GET", "/v1/changes/{change}", Scope.public),
    Entry("GET", "/v1/models", Scope.user),
    Entry("GET", "/v1/models/{model:path}", Scope.user),
    Entry("POST", "/v1/chat/completions", Scope.user, metered=True),
    Entry("POST", "/v1/completions", Scope.user, metered=True),
    Entry("POST", "/generate", Scope.user, metered=True),
    Entry("POST", "/tokenize", Scope.user),
    Entry("POST", "/detokenize", Scope.user),
    Entry("GET", "/v1/usage", Scope.user),
    Entry("POST", "/v1/feedback", Scope.user),
    Entry("GET", "/v1/ab", Scope.admin),
    Entry("GET", "/metrics", Scope.metrics),
    Entry("GET", "/v1/engine/steps", Scope.admin),
    Entry("POST", "/sleep", Scope.admin),
    Entry("POST", "/wake_up", Scope.admin),
    Entry("GET", "/is_sleeping", Scope.admin),
)


def find(method: str, path: str) -> Entry | None:
    """The entry of a request; None when the path is declared for no method.

    A declared path with another method gets the strictest of its entries, so that the application may answer 405 to those who
    could call it. HEAD counts as GET.
    """
    method = "GET" if method == "HEAD" else method
    found = [entry for entry in TABLE if _pattern(entry.path).match(path)]
    exact = next((entry for entry in found if entry.method == method), None)
    if exact is not None or not found:
        return exact
    strictest = found[0]
    for entry in found[1:]:
        strictest = entry if entry.scope.includes(strictest.scope) else strictest
    return Entry(method, strictest.path, strictest.scope)


def undeclared(routes: Iterable[BaseRoute]) -> list[str]:
    """Routes of an application that the table does not have, as "METHOD path"."""
    declared = {(entry.method, entry.path) for entry in TABLE}
    missing = []
    for route in routes:
        if not isinstance(route, Route):
            missing.append(f"{type(route).__name__} {getattr(route, 'path', '')}")
            continue
        methods = (route.methods or {"any method"}) - {"HEAD"}
        missing += [f"{method} {route.path}" for method in sorted(methods) if (method, route.path) not in declared]
    return missing


@cache
def _pattern(path: str) -> re.Pattern[str]:
    return compile_path(path)[0]
