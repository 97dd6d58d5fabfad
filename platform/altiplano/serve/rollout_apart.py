"""A challenger with another base model: a Serve application of its own beside the endpoint, for as long as the rollout lasts.

Requests arrive at the endpoint as ever, and its replicas send those of the challenger's arm on (`forward`). A promotion gives the
challenger's application the route of the endpoint in one step, then takes the old one down; a way back takes the challenger's down.
Everything is read from what Serve runs, so that it can be done again from any point.
"""

import copy
from collections.abc import Mapping
from typing import Any, Protocol

from altiplano.serve.control import CHANGE, OURS, config_of, deployment_in, endpoint_in, told_by
from altiplano.serve.rollout import CHALLENGER, CHAMPION, Phase, Plan, State
from altiplano.serve.rollout_config import ChampionMovedError, arms_for, names_of

Config = dict[str, Any]


class NotYetError(RuntimeError):
    """The challenger's deployment is on its way."""


class ChallengerFailedError(RuntimeError):
    """The challenger's deployment does not come up."""


class Applications(Protocol):
    """What `ServeControl` offers."""

    def status(self) -> dict[str, Any]: ...

    def set_applications(self, applications: list[dict[str, Any]]) -> None: ...


def carry_out(control: Applications, plan: Plan, state: State) -> None:
    """Make what Serve runs what a state asks for.

    Raises:
        NotYetError: the challenger's deployment starts; do it again.
        ChallengerFailedError: it does not come up.
        ChampionMovedError: another adapter has become the champion meanwhile.
        ControlError: Ray Serve does not answer, or replicas do not take it.
    """
    status = control.status()
    configs = config_of(status)["applications"]
    if state.phase in (Phase.rolling_back, Phase.rolled_back):
        # Nobody is sent to the challenger any more before it goes.
        control.set_applications(untested(configs))
        control.set_applications(alone(untested(configs)))
        return
    if answering(configs, plan) == plan.challenger:
        control.set_applications(alone(configs))  # an earlier controller came as far as this
        return
    found = status["applications"].get(_second(configs))
    if not _is_there(configs, plan, state):
        control.set_applications(beside(configs, plan, state))
        raise NotYetError(f"the deployment of {plan.challenger} with {(plan.apart or {})['model']} starts")
    if found is None or found["status"] == "DEPLOY_FAILED":
        raise ChallengerFailedError(f"the deployment of {plan.challenger} did not come up: {told_by(found)}")
    # One that was up and has lost a replica is judged by its requests.
    if found["status"] != "RUNNING" and (found["status"] != "UNHEALTHY" or state.live_since is None):
        raise NotYetError(f"the deployment of {plan.challenger} starts ({told_by(found)})")
    if state.phase is Phase.promoted:
        control.set_applications(swapped(configs, plan))
        control.set_applications(alone(swapped(configs, plan)))
        return
    control.set_applications(tested(configs, plan, state))


def answering(applications: list[Config], plan: Plan) -> str:
    """Which of the plan's two adapters is the champion at the endpoint.

    Raises:
        ChampionMovedError: neither of them.
    """
    champion = _user_config(_endpoint(applications))["aliases"].get(CHAMPION)
    if champion not in (plan.champion, plan.challenger):
        raise ChampionMovedError(f"{champion or 'nothing'} has become the champion instead of {plan.champion}: this rollout ends")
    return str(champion)


def beside(applications: list[Config], plan: Plan, state: State) -> list[Config]:
    """The challenger's application, without a route, beside everything that there is."""
    endpoint = _endpoint(applications)
    made = copy.deepcopy(endpoint) | {"name": _second(applications), "route_prefix": None}
    made["args"] = endpoint["args"] | dict(plan.apart or {})
    deployment_in(made)["user_config"] = _test_over_there(endpoint, plan, state)
    others = [app for app in copy.deepcopy(applications) if app["name"] != made["name"]]
    return [*others, made]


def tested(applications: list[Config], plan: Plan, state: State) -> list[Config]:
    """Both applications with the weights of a state."""
    made = beside(applications, plan, state)
    endpoint = _endpoint(made)
    config = _user_config(endpoint)
    names = names_of(plan.champion, config["aliases"])
    arms = arms_for(plan, state, names) | {"elsewhere": {CHALLENGER: _second(applications)}}
    deployment_in(endpoint)["user_config"] = _plain(config) | {"arms": arms}
    return made


def swapped(applications: list[Config], plan: Plan) -> list[Config]:
    """The challenger's application has the route of the endpoint, and the champion's names for good; the old one has no route."""
    made = copy.deepcopy(applications)
    old = _endpoint(made)
    new = next(app for app in made if app["name"] == _second(applications))
    names = names_of(plan.champion, _user_config(old)["aliases"])
    new["route_prefix"], old["route_prefix"] = old.get("route_prefix", "/"), None
    aliases = dict.fromkeys(names, plan.challenger)
    deployment_in(new)["user_config"] = {"adapters": {plan.challenger: plan.path}, "aliases": aliases}
    return made


def untested(applications: list[Config]) -> list[Config]:
    """The endpoint answers everything itself."""
    made = copy.deepcopy(applications)
    deployment = deployment_in(_endpoint(made))
    deployment["user_config"] = _plain(deployment["user_config"])
    return made


def alone(applications: list[Config]) -> list[Config]:
    """The endpoint without the other one of its two applications."""
    return [app for app in copy.deepcopy(applications) if app["name"] != _second(applications)]


def _test_over_there(endpoint: Config, plan: Plan, state: State) -> Config:
    """The user_config of the challenger's application: every name of the champion is the challenger."""
    config = _user_config(endpoint)
    names = names_of(plan.champion, config["aliases"])
    kept = {key: value for key, value in config.items() if key == "late_after_s"}
    aliases = dict.fromkeys([*names, CHAMPION, CHALLENGER], plan.challenger)
    arms = arms_for(plan, state, names) | {"only": CHALLENGER}
    return kept | {"adapters": {plan.challenger: plan.path}, "aliases": aliases, "arms": arms}


def _is_there(applications: list[Config], plan: Plan, state: State) -> bool:
    """Whether the challenger's application is the one of this plan, whatever its weights."""
    wanted = next(app for app in beside(applications, plan, state) if app["name"] == _second(applications))
    found = next((app for app in applications if app["name"] == wanted["name"]), None)
    return (
        found is not None
        and found["args"] == wanted["args"]
        and _user_config(found)["adapters"] == _user_config(wanted)["adapters"]
    )


def _endpoint(applications: list[Config]) -> Config:
    found = endpoint_in(applications)
    assert found is not None, "a rollout needs an endpoint"
    return found


def _second(applications: list[Config]) -> str:
    """The name that the endpoint does not have."""
    endpoint = _endpoint(applications)["name"]
    return next(name for name in OURS if name != endpoint)


def _user_config(application: Config) -> Config:
    return dict(deployment_in(application)["user_config"])


def _plain(user_config: Mapping[str, Any]) -> Config:
    """Without a test, and without the name of the last change."""
    return {key: value for key, value in user_config.items() if key not in ("arms", "shadow", CHANGE)}
