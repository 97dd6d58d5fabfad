"""A port of a pod on this machine, against the stand-in for the Kubernetes API."""

import contextlib
import socket
import threading

import psutil
from conftest import HEAD_POD
from stand_in import FullCluster

from altiplano.cluster.kube import Kube
from altiplano.cluster.kube_forward import forwarded


def test_no_socket_stays_open_when_the_pod_closes_first(installed: FullCluster) -> None:
    server = socket.create_server(("127.0.0.1", 0))

    def answer_and_leave() -> None:
        for _ in range(2):  # the first comes from the look whether the port opens at all
            with server.accept()[0] as client, contextlib.suppress(OSError):
                client.sendall(b"bye")
                client.shutdown(socket.SHUT_WR)
                client.recv(1)

    pod = threading.Thread(target=answer_and_leave)
    pod.start()
    installed.ports[HEAD_POD, 8265] = server.getsockname()[1]
    kube = Kube.connect()
    kube.version()
    before = _sockets(kube)
    with (
        forwarded(kube, HEAD_POD, 8265) as address,
        socket.create_connection(("127.0.0.1", int(address.rsplit(":")[-1]))) as near,
    ):
        assert near.recv(16) == b"bye"
        assert near.recv(16) == b""
    pod.join()
    server.close()
    for thread in threading.enumerate():
        if thread.name.startswith("Kubernetes port forward proxy"):
            thread.join()
    assert _sockets(kube) <= before


def _sockets(kube: Kube) -> set[int]:
    """Descriptors of ours that lead to the API server."""
    port = int(kube.server.rsplit(":")[-1])
    return {c.fd for c in psutil.Process().net_connections("tcp") if c.raddr and c.raddr.port == port}
