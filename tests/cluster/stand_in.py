"""The stand-in for the Kubernetes API server, with what the commands use beyond Helm: lists of the whole cluster, events, logs of pods, ports of
pods (over a websocket, as `kubectl port-forward` does), and dry runs.
"""

import base64
import copy
import hashlib
import re
import socket
import struct
import threading
from typing import Any
from urllib.parse import parse_qs

from support.charts import NAMESPACE
from support.fake_kubernetes import Cluster, Object, Refusal, _Handler, plural

EVERYWHERE = re.compile(r"/(?:api/v1|apis/[^/]+/[^/]+)/(?P<plural>[a-z]+)")
POD_PART = re.compile(r"/api/v1/namespaces/[^/]+/pods/(?P<pod>[^/]+)/(?P<part>log|portforward)")
EVENTS = re.compile(r"/api/v1/namespaces/[^/]+/events")
MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class FullCluster(Cluster):
    """Objects, and what else a cluster says."""

    def __init__(self) -> None:
        super().__init__()
        self.logs: dict[str, str] = {}  # by pod
        self.ports: dict[tuple[str, int], int] = {}  # ports of this machine that stand for ports of pods
        self.events: list[Object] = []
        self.refusals: dict[str, int] = {}  # HTTP status by plural

    def put(self, manifest: Object, status: Object | None = None) -> Object:
        """An object as it is after the controllers have seen it."""
        made = copy.deepcopy(manifest) | ({} if status is None else {"status": status})
        key = plural(made["kind"]), made["metadata"]["name"]
        self.objects.pop(key, None)
        return self.create(key, made, "controller")


class Answers(_Handler):
    """One connection."""

    cluster: FullCluster

    def do_GET(self) -> None:
        part = POD_PART.fullmatch(self._split()[0])
        if part is None:
            super().do_GET()
        elif part["part"] == "log":
            self._log(part["pod"])
        else:
            self._forward(part["pod"], int(self._split()[1]["ports"][0]))

    def _get(self) -> Object:
        path, query = self._split()
        self._refuse(path)
        if path == f"/api/v1/namespaces/{NAMESPACE}":
            return {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": NAMESPACE}}
        if EVENTS.fullmatch(path):
            wanted = query["fieldSelector"][0].partition("=")[2]
            return {"kind": "EventList", "items": [e for e in self.cluster.events if e["involvedObject"]["name"] == wanted]}
        if (everywhere := EVERYWHERE.fullmatch(path)) and everywhere["plural"] not in ("v1", "v1beta1"):
            items = [o for (kind, _), o in self.cluster.objects.items() if kind == everywhere["plural"]]
            return _listed({"kind": "List", "items": [o for o in items if _labelled(o, query)]})
        return _listed(super()._get())

    def _post(self) -> Object:
        self._refuse(self._split()[0])
        return self._dry(super()._post)

    def _patch(self) -> Object:
        self._refuse(self._split()[0])
        return self._dry(super()._patch)

    def _dry(self, act: Any) -> Object:
        if self._split()[1].get("dryRun") != ["All"]:
            answer: Object = act()
            return answer
        kept = copy.deepcopy(self.cluster.objects), copy.deepcopy(self.cluster.owners)
        try:
            computed: Object = copy.deepcopy(act())
        finally:
            self.cluster.objects, self.cluster.owners = kept
        return computed

    def _refuse(self, path: str) -> None:
        for name, code in self.cluster.refusals.items():
            if f"/{name}" in path:
                raise Refusal(code, "Forbidden", f'{name} is forbidden: User "me" cannot use it')

    def _log(self, pod: str) -> None:
        lines = self.cluster.logs.get(pod, "").splitlines(keepends=True)
        data = "".join(lines[-int(parse_qs(self.path.partition("?")[2])["tailLines"][0]) :]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _forward(self, pod: str, port: int) -> None:
        """A stream to the port that stands for this one: channel 0 carries data, channel 1 errors; both begin with the port's number."""
        target = self.cluster.ports.get((pod, port))
        if target is None:
            self.send_error(500, "pod not found")
            return
        accept = base64.b64encode(hashlib.sha1(self.headers["Sec-WebSocket-Key"].encode() + MAGIC).digest()).decode()
        self.send_response(101)
        for name, value in (
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
            ("Sec-WebSocket-Accept", accept),
            ("Sec-WebSocket-Protocol", "v4.channel.k8s.io"),
        ):
            self.send_header(name, value)
        self.end_headers()
        for channel in (0, 1):
            self._frame(bytes([channel]) + struct.pack("<H", port))
        with socket.create_connection(("127.0.0.1", target)) as far:
            back = threading.Thread(target=self._pump_back, args=(far,))
            back.start()
            while (message := self._message()) is not None:
                if message[:1] == b"\0":
                    far.sendall(message[1:])
            far.shutdown(socket.SHUT_RDWR)
            back.join()
        self.close_connection = True

    def _pump_back(self, far: socket.socket) -> None:
        try:
            while data := far.recv(1 << 16):
                self._frame(b"\0" + data)
            self._frame(b"", opcode=8)
        except OSError:
            pass  # the client has gone

    def _frame(self, data: bytes, opcode: int = 2) -> None:
        length = bytes([len(data)]) if len(data) < 126 else b"\x7e" + struct.pack(">H", len(data))
        if len(data) >= 1 << 16:
            length = b"\x7f" + struct.pack(">Q", len(data))
        self.wfile.write(bytes([0x80 | opcode]) + length + data)
        self.wfile.flush()

    def _message(self) -> bytes | None:
        """The next frame of the client; None when it leaves."""
        try:
            start = self.rfile.read(2)
            if len(start) < 2 or start[0] & 15 == 8:
                return None
            length = start[1] & 127
            if length == 126:
                (length,) = struct.unpack(">H", self.rfile.read(2))
            elif length == 127:
                (length,) = struct.unpack(">Q", self.rfile.read(8))
            mask, data = self.rfile.read(4), self.rfile.read(length)
        except OSError:
            return None
        return bytes(byte ^ mask[index % 4] for index, byte in enumerate(data))


def _labelled(manifest: Object, query: dict[str, list[str]]) -> bool:
    terms = [term.split("=") for term in ",".join(query.get("labelSelector", [])).split(",") if term]
    return all(manifest["metadata"].get("labels", {}).get(key) == value for key, value in terms)


def _listed(answer: Object) -> Object:
    """A server leaves the kind of built-in objects to the list."""
    if "items" not in answer:
        return answer
    ours = ("ray.io/", "kueue.")
    items = [
        o
        if o.get("apiVersion", "").startswith(ours)
        else {key: value for key, value in o.items() if key not in ("apiVersion", "kind")}
        for o in answer["items"]
    ]
    return {**answer, "items": items}
