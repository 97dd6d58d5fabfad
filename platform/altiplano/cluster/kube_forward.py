"""A port of a pod as a port of this machine, through the Kubernetes API: what `kubectl port-forward` does.

The way in that NetworkPolicies leave open: the kubelet connects inside the pod, so nobody in the cluster gets a door to it.
"""

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from altiplano.cluster.kube import ClusterUnreachableError, Kube

CHUNK = 1 << 16


@contextmanager
def forwarded(kube: Kube, pod: str, port: int) -> Iterator[str]:
    """`http://127.0.0.1:…` of `port` in `pod`, for as long as the block runs. Each connection is a stream of its own.

    Raises:
        ClusterUnreachableError: the API server does not open a stream to the pod.
    """
    _leave(_open(kube, pod, port), port)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=_serve, args=(listener, kube, pod, port), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        # shutdown wakes the thread out of accept; close alone does not.
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def _serve(listener: socket.socket, kube: Kube, pod: str, port: int) -> None:
    while True:
        try:
            near, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_connect, args=(near, kube, pod, port), daemon=True).start()


def _connect(near: socket.socket, kube: Kube, pod: str, port: int) -> None:
    try:
        far = _open(kube, pod, port)
    except ClusterUnreachableError:
        near.close()  # the client sees a closed connection and says so
        return
    back = threading.Thread(target=_pump, args=(far.socket(port), near), daemon=True)
    back.start()
    _pump(near, far.socket(port))
    back.join()
    near.close()
    far.close()


def _pump(source: Any, target: Any) -> None:
    """Bytes from one side to the other until the source ends; then the target learns that no more will come."""
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _open(kube: Kube, pod: str, port: int) -> Any:
    from kubernetes.client import ApiClient, CoreV1Api
    from kubernetes.client.exceptions import ApiException
    from kubernetes.stream import portforward

    # A client of its own: the library swaps a method of the client while it opens the stream.
    core = CoreV1Api(ApiClient(kube.api.configuration))
    try:
        stream = portforward(core.connect_get_namespaced_pod_portforward, pod, kube.namespace, ports=str(port))
        _close_whole(stream.websocket)
        return stream
    except ApiException as error:
        raise ClusterUnreachableError(
            f"no way to port {port} of pod {pod} ({str(error.reason).splitlines()[0]}): is the pod running, and may you forward ports "
            f"(`kubectl auth can-i create pods/portforward -n {kube.namespace}`)?"
        ) from error


def _leave(stream: Any, port: int) -> None:
    """End a stream that was only tried. Its thread is told before its socket goes: what the pod may have said has nowhere to go."""
    near = stream.socket(port)
    with contextlib.suppress(OSError):
        near.shutdown(socket.SHUT_WR)
        while near.recv(CHUNK):
            pass
    stream.close()


def _close_whole(websocket: Any) -> None:
    """Have the socket closed too when the server is the first to leave: the library then takes it for closed and lets it leak."""
    close = websocket.close

    def both() -> None:
        close()
        websocket.shutdown()

    websocket.close = both
    # The library's thread has begun: it may be past the call.
    if not websocket.connected:
        websocket.shutdown()
