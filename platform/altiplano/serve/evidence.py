"""What became of the requests of each arm, read over HTTP and kept over the lives of replicas.

A replica's sums end with its process. Whoever reads regularly keeps the last sums of every replica that it ever saw, so what a
replica found out is not lost with it.
"""

from dataclasses import dataclass, field
from typing import Any

import httpx

from altiplano.serve.experiment import read_snapshots
from altiplano.serve.outcomes import ArmOutcomes, Outcomes, merged, since

TIMEOUT_S = 5.0


class NoEvidenceError(ConnectionError):
    """The endpoint does not tell what became of its requests."""


@dataclass(frozen=True)
class Reading:
    """One look: the test that runs, the outcomes of each replica in it, and the snapshots of all replicas."""

    test: str | None
    replicas: dict[str, Outcomes]
    snapshots: list[dict[str, Any]]

    def is_live(self, test: str, weights: dict[str, float]) -> bool:
        """Whether every replica has this test with these shares (0 to 1)."""
        return bool(self.snapshots) and all(
            told["test"] == test
            and told["weights"].keys() == weights.keys()
            and all(abs(told["weights"][arm] - share) < 1e-9 for arm, share in weights.items())
            for told in self.snapshots
        )


class AbClient:
    """GET /v1/ab of one endpoint. `api_key` needs the scope admin where keys are on."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    def read(self) -> Reading:
        """
        Raises:
            NoEvidenceError: nobody answers, or something that is no endpoint of ours, or the key does not reach.
        """
        try:
            response = httpx.get(f"{self.url}/v1/ab", headers=self._headers, timeout=TIMEOUT_S)
            body = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise NoEvidenceError(
                f"no endpoint answers at {self.url} ({error or type(error).__name__}): give its address with --url"
            ) from error
        if response.status_code in (401, 403):
            raise NoEvidenceError(
                f"{self.url} refuses the key: give one with the scope admin (`altiplano keys create --scope admin`)"
            )
        if response.is_error or not isinstance(body, dict) or body.get("object") != "ab":
            raise NoEvidenceError(f"{self.url}/v1/ab answered {response.status_code}: is it an endpoint of Altiplano?")
        return Reading(*read_snapshots(body["replicas"]), body["replicas"])


@dataclass
class Notebook:
    """The last sums of every replica, and those at which the present step began. JSON-ready by `to_json`."""

    latest: dict[str, Outcomes] = field(default_factory=dict)
    start: dict[str, Outcomes] = field(default_factory=dict)

    def take(self, reading: Reading) -> None:
        """Keep what was read."""
        self.latest |= reading.replicas

    def begin(self) -> None:
        """From here on."""
        self.start = dict(self.latest)

    def outcomes(self) -> Outcomes:
        """What came since `begin`, of all replicas."""
        return merged(since(sums, self.start.get(replica, {})) for replica, sums in self.latest.items())

    def to_json(self) -> dict[str, Any]:
        return {name: _plain(getattr(self, name)) for name in ("latest", "start")}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Notebook":
        """The inverse of `to_json`."""
        return cls(_outcomes(values["latest"]), _outcomes(values["start"]))


def _plain(replicas: dict[str, Outcomes]) -> dict[str, Any]:
    return {replica: {arm: sums.to_json() for arm, sums in outcomes.items()} for replica, outcomes in replicas.items()}


def _outcomes(values: dict[str, Any]) -> dict[str, Outcomes]:
    return {replica: {arm: ArmOutcomes.from_json(sums) for arm, sums in outcomes.items()} for replica, outcomes in values.items()}
