"""The outermost layer of the application: who asks, may they, and what became of it.

Plain ASGI: a layer that holds whole responses would break streams.
"""

import logging
import re
import uuid
from ipaddress import ip_address
from urllib.parse import urlsplit

import psutil
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from altiplano import spec
from altiplano.serve import keys, routes
from altiplano.serve.call import Call, set_current
from altiplano.serve.engine_errors import ASLEEP
from altiplano.serve.errors import ApiError
from altiplano.serve.governance import Governance
from altiplano.serve.logs import FIELDS, log_request

REQUEST_ID = re.compile(r"[!-~]{1,128}")
UNKNOWN = routes.Entry("", "unknown", keys.Scope.user)

log = logging.getLogger("altiplano.serve")


class Gate:
    """Nothing reaches `app` that the route table does not have, that has no right to it, or for which there is no room."""

    def __init__(self, app: ASGIApp, governance: Governance) -> None:
        self._app, self._governance = app, governance
        self._own = _own_addresses()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # a websocket is never accepted
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        call = self._call(scope, headers)
        set_current(call)
        self._governance.traces.begin(call, headers)

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *self._marks(call)]
            await send(message)

        try:
            self._check(scope, headers, call)
            await self._app(scope, receive, marked)
        except ApiError as error:
            call.error = error.code
            await error.response()(scope, receive, marked)
        except Exception:
            log.exception("request failed", extra={FIELDS: {"request_id": call.request_id, "route": call.route}})
            if call.status:
                raise  # the answer has begun: the server cuts it off, so that nobody takes it for complete
            await ApiError(500, f"something broke here; the log knows it as {call.request_id}").response()(scope, receive, marked)
        finally:
            self._leave(call)

    def _call(self, scope: Scope, headers: dict[str, str]) -> Call:
        given = headers.get("x-request-id", "")
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        entry = routes.find(scope["method"], path)
        return Call(
            self._governance,
            given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex,
            scope["method"],
            (entry or UNKNOWN).path,
            self._governance.clock(),
            entry,
        )

    def _check(self, scope: Scope, headers: dict[str, str], call: Call) -> None:
        limits, now = self._governance.limits, call.started
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > limits.max_header_bytes:
            raise ApiError(431, f"the headers have {size} bytes, more than {limits.max_header_bytes}: send fewer")
        if self._governance.keys is None:
            self._only_this_machine(scope, headers)
        call.key = self._governance.authorize(call.entry or UNKNOWN, headers.get("authorization"))
        if call.entry is None:
            raise ApiError(404, f"{call.method} {scope['path']}: there is no such route")
        if call.entry.scope is keys.Scope.public:
            return
        quota = self._governance.quotas.of(call.key, now)
        if call.entry.metered:
            self._governance.queue.enter(1, now, call.key_id)
            call.places = 1
        quota.enter(now)
        call.quota = quota

    def _only_this_machine(self, scope: Scope, headers: dict[str, str]) -> None:
        # Without keys: not the network, and not a web page that a browser on this machine has open (it sends its own origin, and
        # after DNS rebinding its own host name).
        client = scope.get("client")
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        origin = headers.get("origin")
        if (
            (client is not None and client[0] not in self._own and not _is_loopback_address(client[0]))
            or (host and not spec.is_loopback(host))
            or (origin is not None and not spec.is_loopback(urlsplit(origin).hostname or ""))
        ):
            raise ApiError(
                403,
                "this endpoint has no API keys, so it answers its own machine only, at 127.0.0.1 or localhost: "
                "set serve.api_keys_file to open it to others",
                code="loopback_only",
            )

    def _marks(self, call: Call) -> list[tuple[bytes, bytes]]:
        """Headers that every answer gets."""
        marks = {"x-request-id": call.request_id}
        if call.status == 401:
            marks["www-authenticate"] = "Bearer"
        if call.quota is not None:
            marks |= call.quota.headers(self._governance.clock())
        return [(name.encode(), value.encode("latin-1")) for name, value in marks.items()]

    def _leave(self, call: Call) -> None:
        governance = self._governance
        call.ended = governance.clock()
        if call.quota is not None:
            call.quota.leave()
        governance.queue.leave(call.places, call.ended, call.key_id, computed=call.computed)
        if call.status == 429:
            governance.metrics.rejected.labels(call.error or "", call.key_id).inc()
        if call.status == 503 and call.error == ASLEEP:
            governance.metrics.asleep.inc()
        if call.gone is not None or not call.status:
            governance.metrics.clients_gone.labels(call.gone or "cancelled").inc()
        governance.metrics.http_requests.labels(call.route, call.status or 499).inc()
        governance.metrics.http_seconds.labels(call.route).observe(call.ended - call.started)
        governance.traces.end(call)
        log_request(call.fields())


def _is_loopback_address(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False  # a unix socket's name, or nothing that we know


def _own_addresses() -> frozenset[str]:
    return frozenset(entry.address for entries in psutil.net_if_addrs().values() for entry in entries)
