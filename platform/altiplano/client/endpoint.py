"""Where an endpoint is, and what it serves."""

from dataclasses import dataclass
from typing import Any

import httpx

from altiplano.client.errors import EndpointGoneError, refused

DEFAULT_URL = "http://127.0.0.1:8000/v1"
CONNECT_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint. `url` ends with the API's version, such as http://127.0.0.1:8000/v1."""

    url: str = DEFAULT_URL
    api_key: str | None = None
    timeout_s: float = 600.0
    """The longest silence inside one answer, not the longest answer."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"{self.url!r} is no address of an endpoint: give one such as {DEFAULT_URL}")

    @property
    def root(self) -> str:
        """The address without the API's version: /health, /metrics, /tokenize live there."""
        return self.url.rstrip("/").removesuffix("/v1")

    def open(self, connections: int | None = 100, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> httpx.AsyncClient:
        """An HTTP client for this endpoint; close it after use. At most so many connections; None: no bound."""
        return httpx.AsyncClient(
            base_url=self.url,
            headers={"authorization": f"Bearer {self.api_key}"} if self.api_key else {},
            timeout=httpx.Timeout(self.timeout_s, connect=connect_timeout_s, pool=None),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    def gone(self, error: Exception) -> EndpointGoneError:
        """The message for a connection that failed."""
        return EndpointGoneError(
            f"no endpoint answers at {self.url} ({error or type(error).__name__}): deploy one with `altiplano run`, "
            "or give its address with --url"
        )


async def model_names(endpoint: Endpoint, client: httpx.AsyncClient) -> list[str]:
    """What the endpoint serves: base model first, then adapters and aliases.

    Raises:
        EndpointGoneError: nobody answers, or something that is no OpenAI-compatible endpoint.
        RefusedError: the key is missing or wrong.
    """
    try:
        response = await client.get("models")
    except httpx.TransportError as error:
        raise endpoint.gone(error) from error
    if response.status_code in (401, 403):
        raise refused(response)
    try:
        entries: list[dict[str, Any]] = response.raise_for_status().json()["data"]
        return [str(entry["id"]) for entry in entries]
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
        raise EndpointGoneError(
            f"{response.url} answered {response.status_code} and lists no models: is {endpoint.url} an OpenAI-compatible endpoint?",
            response.status_code,
        ) from error


async def default_model(endpoint: Endpoint, client: httpx.AsyncClient) -> str:
    """The champion where there is one, else the base model."""
    names = await model_names(endpoint, client)
    if not names:
        raise EndpointGoneError(f"{endpoint.url} serves no model yet")
    return "champion" if "champion" in names else names[0]
