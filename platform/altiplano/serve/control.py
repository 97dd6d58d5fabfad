"""Ray Serve from outside, over the REST interface of Ray's dashboard: what runs, and what should run.

The declarative way: a change of `user_config` alone reaches the running replicas within a second and restarts nothing, which
`serve.run` from Python does not promise.
"""

import time
from collections.abc import Callable
from typing import Any

import httpx

APPLICATION = "altiplano"
DEPLOYMENT = "endpoint"

PATH = "/api/serve/applications/"
POLL_S = 0.1
ANSWER_TIMEOUT_S = 120.0
USER_CONFIG_TIMEOUT_S = 120.0
START_ATTEMPTS = 5

# Keys of what Serve tells that it also takes.
_SHARED = ("proxy_location", "http_options", "grpc_options")


class ControlError(RuntimeError):
    """Ray Serve cannot be asked, or does not do what was asked; the message is its own."""

    exit_code = 4


class DeployError(ControlError):
    """The endpoint cannot be deployed as asked."""


class ServeControl:
    """One Ray cluster's Serve. `token` is Ray's own token; None where the cluster asks for none."""

    def __init__(self, dashboard_url: str, token: str | None) -> None:
        self._url = dashboard_url.rstrip("/") + PATH
        self._headers = {"authorization": f"Bearer {token}"} if token else {}

    def status(self) -> dict[str, Any]:
        """What Serve says about itself: `applications` by name, `proxies`, `http_options`.

        Raises:
            ControlError: the dashboard does not answer, or refuses the token.
        """
        details: dict[str, Any] = self._request("GET").json()
        return details

    def get_user_config(self) -> dict[str, Any]:
        """The `user_config` that the endpoint should have.

        Raises:
            ControlError: there is no endpoint.
        """
        config: dict[str, Any] = _deployment(_application(self.status())["deployed_app_config"])["user_config"]
        return config

    def set_user_config(self, user_config: dict[str, Any], timeout_s: float = USER_CONFIG_TIMEOUT_S) -> None:
        """Replace the endpoint's `user_config`; returns when it is live on all replicas. No replica restarts.

        Raises:
            ControlError: there is no endpoint, or it does not take this within `timeout_s`.
        """
        status = self.status()
        _deployment(_application(status)["deployed_app_config"])["user_config"] = user_config
        self._request("PUT", _config_of(status))
        self.wait(timeout_s)

    def listening(self, status: dict[str, Any] | None = None) -> tuple[str, int] | None:
        """Host and port on which Serve listens; None while it does not run."""
        status = self.status() if status is None else status
        if not status["proxies"]:
            return None
        return status["http_options"]["host"], status["http_options"]["port"]

    def deploy(self, config: dict[str, Any], timeout_s: float) -> None:
        """Make the endpoint what `config` (a Serve config with our application alone) says, whatever else Serve runs.

        Returns when it runs.

        Raises:
            DeployError: Serve refuses the config, or the endpoint does not come up.
        """
        status = self.status()
        others = [app for app in _config_of(status)["applications"] if app["name"] != APPLICATION]
        self._put(config | {"applications": [*config["applications"], *others]})
        self.wait(timeout_s)

    def undeploy(self) -> None:
        """Take the endpoint down, and Serve with it when it serves nothing else. Returns when it is gone."""
        status = self.status()
        names = set(status["applications"])
        if names <= {APPLICATION}:
            self._request("DELETE")
            self._until(lambda now: not now["applications"] and not now["proxies"], ANSWER_TIMEOUT_S)
        elif APPLICATION in names:
            config = _config_of(status)
            config["applications"] = [app for app in config["applications"] if app["name"] != APPLICATION]
            self._request("PUT", config)
            self._until(lambda now: APPLICATION not in now["applications"], ANSWER_TIMEOUT_S)

    def wait(self, timeout_s: float) -> None:
        """Until the endpoint is what was asked for last.

        Raises:
            DeployError: it is not, or not within `timeout_s`.
        """
        last = self._until(_settled, timeout_s)
        application = last["applications"].get(APPLICATION)
        if application is None or application["status"] != "RUNNING":
            raise DeployError(f"the endpoint did not come up: {_why(application)}")

    def _until(self, reached: Callable[[dict[str, Any]], bool], timeout_s: float) -> dict[str, Any]:
        """The first status that `reached` accepts, or the last one before time is up."""
        deadline = time.monotonic() + timeout_s
        while True:
            status = self.status()
            if reached(status) or time.monotonic() > deadline:
                return status
            time.sleep(POLL_S)

    def _put(self, config: dict[str, Any]) -> None:
        """A PUT that may start Serve: on a busy machine its first proxy comes too late for Ray, the next attempt finds it."""
        for _ in range(START_ATTEMPTS - 1):
            try:
                self._request("PUT", config)
                return
            except DeployError as error:
                if "ActorDiedError" not in str(error) and "TimeoutError" not in str(error):
                    raise
        self._request("PUT", config)

    def _request(self, method: str, body: Any = None) -> httpx.Response:
        try:
            response = httpx.request(method, self._url, headers=self._headers, json=body, timeout=ANSWER_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise ControlError(f"Ray's dashboard does not answer at {self._url} ({error}): is the cluster running?") from error
        if response.status_code in (401, 403):
            raise ControlError(
                f"Ray's dashboard refuses the token ({response.status_code}): give the cluster's own (RAY_AUTH_TOKEN)"
            )
        if response.is_error:
            raise DeployError(f"Ray Serve refuses this ({response.status_code}): {response.text[-2000:]}")
        return response


def _application(status: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] | None = status["applications"].get(APPLICATION)
    if found is None or found.get("deployed_app_config") is None:
        raise ControlError(f"Ray Serve runs no application {APPLICATION!r} that came from a config: deploy the endpoint first")
    return found


def _deployment(application_config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in application_config["deployments"] if entry["name"] == DEPLOYMENT)
    return found


def _config_of(status: dict[str, Any]) -> dict[str, Any]:
    """The config that leads to what runs; Serve deletes applications that a config does not name."""
    config = {key: status[key] for key in _SHARED if status.get(key) is not None}
    config["applications"] = [
        application["deployed_app_config"]
        for application in status["applications"].values()
        if application.get("deployed_app_config") is not None
    ]
    return config


def _settled(status: dict[str, Any]) -> bool:
    application = status["applications"].get(APPLICATION)
    return application is not None and application["status"] in ("RUNNING", "DEPLOY_FAILED", "UNHEALTHY")


def _why(application: dict[str, Any] | None) -> str:
    """What Serve says about an application and its deployments."""
    if application is None:
        return "Ray Serve does not know it"
    said = (application["message"], *(deployment["message"] for deployment in application["deployments"].values()))
    return "; ".join([f"it is {application['status']}", *filter(None, said)])
