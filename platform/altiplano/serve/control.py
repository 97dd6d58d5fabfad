"""Ray Serve from outside, over the REST interface of Ray's dashboard: what runs, and what should run.

The declarative way: a change of `user_config` alone reaches the running replicas within a second and restarts nothing, which
`serve.run` from Python does not promise.
"""

import copy
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

# The endpoint, and what answers for a challenger with another base model. A promotion changes their parts.
APPLICATION, SECOND = "altiplano", "altiplano-2"
OURS = (APPLICATION, SECOND)
DEPLOYMENT = "endpoint"
CHANGE = "change"  # key of a user_config: a random name, by which replicas can be asked what they made of it

PATH = "/api/serve/applications/"
POLL_S = 0.1
ANSWER_TIMEOUT_S = 120.0
USER_CONFIG_TIMEOUT_S = 120.0
REPLICA_TIMEOUT_S = 10.0
START_ATTEMPTS = 5

# Keys of what Serve tells that it also takes.
_SHARED = ("proxy_location", "http_options", "grpc_options")


class ControlError(RuntimeError):
    """Ray Serve cannot be asked, or does not do what was asked; the message is its own."""

    exit_code = 4


class DeployError(ControlError):
    """The endpoint cannot be deployed as asked."""


class RefusedConfigError(DeployError):
    """Replicas do not take a `user_config`; the message is theirs. What was before is in force."""


class RefusedTokenError(ControlError):
    """Ray's dashboard wants another token: asking again does not help."""


class ServeControl:
    """One Ray cluster's Serve. `token` is Ray's own token; None where the cluster asks for none.

    `endpoint_url` is where the endpoint answers; None: on the dashboard's host, at the port that Serve names. `poll_s`: between two
    questions while it waits, for as long as `clock` (seconds of any monotonic clock) allows.
    """

    def __init__(
        self,
        dashboard_url: str,
        token: str | None,
        endpoint_url: str | None = None,
        poll_s: float = POLL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._poll_s, self._clock = poll_s, clock
        self._url = dashboard_url.rstrip("/") + PATH
        self._endpoint_url = None if endpoint_url is None else endpoint_url.rstrip("/").removesuffix("/v1")
        # httpx reads the certificates of this machine for every request that brings no context, and this one polls.
        self._tls = httpx.create_ssl_context()
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
        config: dict[str, Any] = deployment_in(_application(self.status())["deployed_app_config"])["user_config"]
        return unnamed(config)

    def set_user_config(self, user_config: dict[str, Any], timeout_s: float = USER_CONFIG_TIMEOUT_S) -> None:
        """Replace the endpoint's `user_config`; returns when all replicas have taken it. No replica restarts.

        Raises:
            RefusedConfigError: a replica does not take it; the one before is back.
            ControlError: there is no endpoint, or it does not take this within `timeout_s`.
        """
        status = self.status()
        deployment = deployment_in(_application(status)["deployed_app_config"])
        before = copy.deepcopy(config_of(status))
        deployment["user_config"] = user_config
        self._change(config_of(status), before, timeout_s)

    def set_applications(self, applications: list[dict[str, Any]], timeout_s: float = USER_CONFIG_TIMEOUT_S) -> None:
        """Replace all applications; returns when every replica of the endpoint (the one of ours at /) has taken its user_config,
        or at once when that application is what it was.

        Raises:
            RefusedConfigError: a replica does not take it; what was before is back.
            ControlError: Serve does not take it, or not within `timeout_s`.
        """
        status = self.status()
        before = config_of(status)
        wanted = before | {"applications": copy.deepcopy(applications)}
        if _endpoint_config(wanted) == _endpoint_config(before):
            _keep_change(wanted, change_of(status))
            self._put(wanted)
            return
        self._change(wanted, copy.deepcopy(before), timeout_s)

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
            RefusedConfigError: running replicas do not take a part that changes without a restart; what ran before is back.
            DeployError: Serve refuses the config, or the endpoint does not come up.
        """
        status = self.status()
        before = config_of(status)
        others = [app for app in before["applications"] if app["name"] not in OURS]
        (ours,) = copy.deepcopy(config["applications"])
        wanted = copy.deepcopy(config) | {"applications": [ours | {"name": endpoint_of(status["applications"])}, *others]}
        self._change(wanted, before if len(others) < len(before["applications"]) else None, timeout_s)

    def undeploy(self) -> None:
        """Take the endpoint down, and Serve with it when it serves nothing else. Returns when it is gone."""
        status = self.status()
        names = set(status["applications"])
        if names <= set(OURS):
            self._request("DELETE")
            self._until(lambda now: not now["applications"] and not now["proxies"], self._clock() + ANSWER_TIMEOUT_S, self.status)
        elif names & set(OURS):
            config = config_of(status)
            config["applications"] = [app for app in config["applications"] if app["name"] not in OURS]
            self._request("PUT", config)
            self._until(lambda now: not set(OURS) & set(now["applications"]), self._clock() + ANSWER_TIMEOUT_S, self.status)

    def wait(self, timeout_s: float) -> None:
        """Until the endpoint is what was asked for last.

        Raises:
            DeployError: it is not, or not within `timeout_s`.
        """
        self._come_up(self._clock() + timeout_s, self.status)

    def confirm(self, change: str, timeout_s: float) -> None:
        """Until every replica of the endpoint has taken a config that somebody else gives to Serve, by the name of its change.

        A question that gets no answer is asked again: on the way to another machine one of many may fail.

        Raises:
            RefusedConfigError: a replica does not take it, and goes on with what it had.
            DeployError: Serve does not get it, or the endpoint does not come up with it, or not within `timeout_s`.
            ControlError: the dashboard refuses the token, or no longer answers when time is up.
        """
        deadline = self._clock() + timeout_s

        def ask() -> dict[str, Any]:
            return self._patient_status(deadline)

        if change_of(self._until(lambda now: change_of(now) == change, deadline, ask)) != change:
            raise DeployError(f"Ray Serve was not given the change within {timeout_s:.0f} s, or was given another one since")
        self._come_up(deadline, ask)
        if refusal := self._refusal(change, deadline, ask):
            raise RefusedConfigError(f"a replica does not take this, and goes on with what it had: {refusal}")

    def _come_up(self, deadline: float, ask: Callable[[], dict[str, Any]]) -> None:
        last = self._until(_settled, deadline, ask)
        application = last["applications"].get(endpoint_of(last["applications"]))
        if application is None or application["status"] != "RUNNING":
            raise DeployError(f"the endpoint did not come up: {told_by(application)}")

    def _change(self, config: dict[str, Any], before: dict[str, Any] | None, timeout_s: float) -> None:
        """Put a Serve config and wait until every replica runs it; put the one `before` back when one refuses it."""
        deadline = self._clock() + timeout_s
        change = _name_change(config)
        self._put(config)
        self.wait(timeout_s)
        refusal = self._refusal(change, deadline, self.status)
        if refusal is None:
            return
        if before is not None:
            _name_change(before)
            self._put(before)
            self.wait(ANSWER_TIMEOUT_S)
        raise RefusedConfigError(f"the endpoint does not take this, and stays as it was: {refusal}")

    def _refusal(self, change: str, deadline: float, ask: Callable[[], dict[str, Any]]) -> str | None:
        """Why a replica refuses a change; None when all have taken it.

        Raises:
            DeployError: not all have told by the deadline.
        """
        while True:
            status = ask()
            running = _running(status)
            if not running:
                return None  # scaled to zero: nobody is there who could refuse
            told = self._told(status, change)
            for replica in told:
                if replica["taken"] is False:
                    return str(replica["reason"])
            if len(told) >= running and all(replica["taken"] for replica in told):
                return None
            if self._clock() > deadline:
                taken = sum(replica["taken"] is True for replica in told)
                raise DeployError(
                    f"the change was given to Ray Serve, and {taken} of {running} replicas told {self._address(status)} in time "
                    "that they have taken it: see their logs, and repeat it"
                )
            time.sleep(self._poll_s)

    def _told(self, status: dict[str, Any], change: str) -> list[dict[str, Any]]:
        """What replicas tell about a change; nothing while the one that is asked does not know it."""
        try:
            response = httpx.get(f"{self._address(status)}/v1/changes/{change}", timeout=REPLICA_TIMEOUT_S, verify=self._tls)
            return list(response.json()["replicas"]) if response.status_code == 200 else []
        except (httpx.HTTPError, ValueError, KeyError):
            return []

    def _address(self, status: dict[str, Any]) -> str:
        if self._endpoint_url is not None:
            return self._endpoint_url
        host, port = self.listening(status) or ("0.0.0.0", 0)
        if host in ("0.0.0.0", "::"):
            host = urlsplit(self._url).hostname or host
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def _until(
        self, reached: Callable[[dict[str, Any]], bool], deadline: float, ask: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The first status that `reached` accepts, or the last one before time is up."""
        while True:
            status = ask()
            if reached(status) or self._clock() > deadline:
                return status
            time.sleep(self._poll_s)

    def _patient_status(self, deadline: float) -> dict[str, Any]:
        """The first answer; the last error when there is none by the deadline.

        Raises:
            ControlError: the dashboard refuses the token, or does not answer in time.
        """
        while True:
            try:
                return self.status()
            except RefusedTokenError:
                raise
            except ControlError:
                if self._clock() > deadline:
                    raise
            time.sleep(self._poll_s)

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
            response = httpx.request(
                method, self._url, headers=self._headers, json=body, timeout=ANSWER_TIMEOUT_S, verify=self._tls
            )
        except httpx.HTTPError as error:
            raise ControlError(f"Ray's dashboard does not answer at {self._url} ({error}): is the cluster running?") from error
        if response.status_code in (401, 403):
            raise RefusedTokenError(
                f"Ray's dashboard refuses the token ({response.status_code}): give the cluster's own (RAY_AUTH_TOKEN)"
            )
        if response.is_error:
            raise DeployError(f"Ray Serve refuses this ({response.status_code}): {response.text[-2000:]}")
        return response


def endpoint_of(applications: Mapping[str, Any]) -> str:
    """The name of the endpoint among what Serve runs: that of our application at /."""
    configs = [application.get("deployed_app_config") for application in applications.values()]
    found = endpoint_in([config for config in configs if config])
    return APPLICATION if found is None else str(found["name"])


def endpoint_in(applications: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The endpoint's config among those of a Serve config: our application at /."""
    return next((app for app in applications if app["name"] in OURS and app.get("route_prefix", "/") == "/"), None)


def config_of(status: dict[str, Any]) -> dict[str, Any]:
    """The config that leads to what runs; Serve deletes applications that a config does not name."""
    config = {key: status[key] for key in _SHARED if status.get(key) is not None}
    config["applications"] = [
        application["deployed_app_config"]
        for application in status["applications"].values()
        if application.get("deployed_app_config") is not None
    ]
    return config


def change_of(status: dict[str, Any]) -> str | None:
    """The name of the endpoint's last change; None where it has none."""
    application = status["applications"].get(endpoint_of(status["applications"])) or {}
    config = application.get("deployed_app_config")
    change: str | None = None if config is None else (deployment_in(config).get("user_config") or {}).get(CHANGE)
    return change


def deployment_in(application_config: dict[str, Any]) -> dict[str, Any]:
    """The deployment of our engines in the config of an application."""
    found: dict[str, Any] = next(entry for entry in application_config["deployments"] if entry["name"] == DEPLOYMENT)
    return found


def told_by(application: dict[str, Any] | None) -> str:
    """What Serve says about an application and its deployments."""
    if application is None:
        return "Ray Serve does not know it"
    said = (application["message"], *(deployment["message"] for deployment in application["deployments"].values()))
    return "; ".join([f"it is {application['status']}", *filter(None, said)])


def _application(status: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] | None = status["applications"].get(endpoint_of(status["applications"]))
    if found is None or found.get("deployed_app_config") is None:
        raise ControlError(f"Ray Serve runs no application {APPLICATION!r} that came from a config: deploy the endpoint first")
    return found


def _endpoint_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """Our application at / in a Serve config, without the name of its last change."""
    found = copy.deepcopy(endpoint_in(config["applications"]))
    if found is None:
        return None
    (deployment_in(found).get("user_config") or {}).pop(CHANGE, None)
    return found


def _name_change(config: dict[str, Any]) -> str:
    """Give the endpoint's part of a Serve config a change of its own, by whose name replicas can be asked."""
    application = endpoint_in(config["applications"])
    assert application is not None, "the endpoint is what is changed"
    deployment = deployment_in(application)
    deployment["user_config"] = named(deployment.get("user_config") or {})
    change: str = deployment["user_config"][CHANGE]
    return change


def _keep_change(config: dict[str, Any], change: str | None) -> None:
    """The endpoint stays what it is: who applied it asks by the name that it has."""
    application = endpoint_in(config["applications"])
    if application is not None and change is not None:
        deployment = deployment_in(application)
        deployment["user_config"] = (deployment.get("user_config") or {}) | {CHANGE: change}


def named(user_config: Mapping[str, Any]) -> dict[str, Any]:
    """A `user_config` under a name that no other has had: what replicas make of it is found by that name."""
    return {**user_config, CHANGE: secrets.token_hex(16)}


def unnamed(user_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a `user_config` says, without the name under which it was applied."""
    return {key: value for key, value in user_config.items() if key != CHANGE}


def _running(status: dict[str, Any]) -> int:
    """How many replicas of the endpoint run."""
    application = status["applications"][endpoint_of(status["applications"])]
    return sum(replica["state"] == "RUNNING" for replica in application["deployments"][DEPLOYMENT]["replicas"])


def _settled(status: dict[str, Any]) -> bool:
    application = status["applications"].get(endpoint_of(status["applications"]))
    return application is not None and application["status"] in ("RUNNING", "DEPLOY_FAILED", "UNHEALTHY")
