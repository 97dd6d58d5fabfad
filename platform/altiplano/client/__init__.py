"""Everything that asks an OpenAI-compatible endpoint from outside: one answer, a file of rows, a measured load.

May import: httpx and the standard library, so that it runs where neither torch nor Ray is installed. Must never know: how the
endpoint is made. What it learns, it learns over HTTP, so that it measures other servers with the same ruler.
"""

from altiplano.client.endpoint import Endpoint
from altiplano.client.errors import EndpointGoneError, RefusedError
from altiplano.client.retry import Backoff, Sender

__all__ = ["Backoff", "Endpoint", "EndpointGoneError", "RefusedError", "Sender"]
