"""A challenger's own application comes, is tested, takes over or goes: at no moment is the endpoint without an answer. Serve is stood in for."""

import copy
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altiplano.serve.arms import Arms
from altiplano.serve.control import APPLICATION, SECOND, ControlError, deployment_in, endpoint_of
from altiplano.serve.experiment import check_user_config
from altiplano.serve.rollout import Phase, Plan, State
from altiplano.serve.rollout_apart import ChallengerFailedError, NotYetError, carry_out
from altiplano.serve.rollout_config import ChampionMovedError

BASE = {"model": "/models/second", "served_model_name": "second"}
PLAN = Plan("orders", 2, "orders-1", "orders-2", "/adapters/orders-2", "a salt for tests", steps=(20.0, 50.0), apart=BASE)
OTHER = {"name": "someone-elses", "route_prefix": "/other", "args": {}, "deployments": []}
ENDPOINT = {
    "name": APPLICATION,
    "route_prefix": "/",
    "args": {"model": "/models/first", "served_model_name": "first", "max_num_seqs": 8},
    "deployments": [
        {
            "name": "endpoint",
            "num_replicas": 2,
            "user_config": {
                "adapters": {"orders-1": "/adapters/orders-1"},
                "aliases": {"champion": "orders-1", "orders": "orders-1", "previous": "orders-0"},
            },
        }
    ],
}


class Serve:
    """Ray Serve: what was put, and the applications that have come up. Refuses what would leave requests without an answer."""

    def __init__(self, endpoint: dict[str, Any] = ENDPOINT) -> None:
        self.applications = copy.deepcopy([OTHER, endpoint])
        self.states = {OTHER["name"]: "RUNNING", endpoint["name"]: "RUNNING"}
        self.puts: list[list[dict[str, Any]]] = []
        self.dies_after: int | None = None

    def status(self) -> dict[str, Any]:
        told = {
            app["name"]: {
                "status": self.states[app["name"]],
                "message": "no GPU is free" if self.states[app["name"]] == "DEPLOY_FAILED" else "",
                "deployed_app_config": copy.deepcopy(app),
                "deployments": {},
            }
            for app in self.applications
        }
        return {"applications": told}

    def set_applications(self, applications: list[dict[str, Any]]) -> None:
        if self.dies_after is not None and len(self.puts) >= self.dies_after:
            self.dies_after = None
            raise ControlError("the controller is killed here")
        self.puts.append(copy.deepcopy(applications))
        before = {app["name"]: app for app in self.applications}
        for app in applications:
            known = before.get(app["name"])
            if known is None or known["args"] != app["args"]:
                self.states[app["name"]] = "DEPLOYING"
        self.applications = copy.deepcopy(applications)
        self._check()

    def _check(self) -> None:
        names = [app["name"] for app in self.applications]
        assert len(set(names)) == len(names) and OTHER in self.applications, "what is not ours stays as it is"
        (root,) = [app for app in self.applications if app["route_prefix"] == "/"]
        assert self.states[root["name"]] == "RUNNING", "who answers at / is up"
        config = self.user_config(root["name"])
        for app in self.applications:
            if app is not self.applications[0] and app["name"] != OTHER["name"]:
                given = {key: value for key, value in deployment_in(app)["user_config"].items() if key != "change"}
                check_user_config(given)
        for name in (config.get("arms") or {}).get("elsewhere", {}).values():
            assert self.states[name] == "RUNNING", "nobody is sent to what is not up"
            names = Arms.of(config["arms"]).models | {"champion"}
            assert names <= set(self.user_config(name)["aliases"]), "every name of the test means something over there"

    def user_config(self, name: str) -> dict[str, Any]:
        found = next(app for app in self.applications if app["name"] == name)
        return dict(deployment_in(found)["user_config"])

    def comes_up(self) -> None:
        self.states = dict.fromkeys(self.states, "RUNNING")

    @property
    def names(self) -> set[str]:
        return {app["name"] for app in self.applications} - {OTHER["name"]}

    @property
    def endpoint(self) -> str:
        return endpoint_of(self.status()["applications"])


def until_done(serve: Serve, state: State) -> None:
    """As the controller does: again and again, whatever happens on the way."""
    for _ in range(8):
        try:
            carry_out(serve, PLAN, state)
        except (NotYetError, ControlError):
            serve.comes_up()
        else:
            return
    pytest.fail("it does not come to an end")


def test_the_challenger_gets_traffic_when_its_deployment_is_up() -> None:
    serve = Serve()
    with pytest.raises(NotYetError, match="/models/second"):
        carry_out(serve, PLAN, State())
    assert serve.names == {APPLICATION, SECOND} and "arms" not in serve.user_config(APPLICATION)
    with pytest.raises(NotYetError, match="DEPLOYING"):
        carry_out(serve, PLAN, State())
    serve.comes_up()
    carry_out(serve, PLAN, State())
    here, there = serve.user_config(APPLICATION), serve.user_config(SECOND)
    assert here["arms"]["elsewhere"] == {"challenger": SECOND} and here["arms"]["weights"] == {"champion": 80, "challenger": 20}
    assert here["aliases"] == ENDPOINT["deployments"][0]["user_config"]["aliases"]
    assert there["adapters"] == {"orders-2": "/adapters/orders-2"} and there["arms"]["only"] == "challenger"
    over_there = next(app for app in serve.applications if app["name"] == SECOND)
    assert over_there["args"] == {"model": "/models/second", "served_model_name": "second", "max_num_seqs": 8}
    assert over_there["route_prefix"] is None, "nobody reaches it but through the endpoint"
    assert deployment_in(over_there)["num_replicas"] == 2


def test_a_deployment_that_does_not_come_up_says_why() -> None:
    serve = Serve()
    with pytest.raises(NotYetError):
        carry_out(serve, PLAN, State())
    serve.states[SECOND] = "DEPLOY_FAILED"
    with pytest.raises(ChallengerFailedError, match="no GPU is free"):
        carry_out(serve, PLAN, State())
    carry_out(serve, PLAN, State(Phase.rolled_back))
    assert serve.applications == [OTHER, ENDPOINT]


def test_a_way_back_takes_the_traffic_first_and_the_deployment_then() -> None:
    serve = Serve()
    until_done(serve, State(live_since=1.0))
    serve.puts.clear()
    carry_out(serve, PLAN, State(Phase.rolled_back))
    first, second = serve.puts
    assert len(first) == 3 and len(second) == 2 and serve.applications == [OTHER, ENDPOINT]


def test_a_promotion_swaps_the_route_in_one_step_and_then_the_old_one_goes() -> None:
    serve = Serve()
    until_done(serve, State(Phase.promoting, 1, live_since=1.0))
    assert serve.user_config(APPLICATION)["arms"]["weights"] == {"champion": 0, "challenger": 100}
    until_done(serve, State(Phase.promoted, 1, live_since=1.0))
    assert serve.names == {SECOND} == {serve.endpoint}
    assert serve.user_config(SECOND) == {
        "adapters": {"orders-2": "/adapters/orders-2"},
        "aliases": {"champion": "orders-2", "orders": "orders-2"},
    }
    # And the next one takes the first name again.
    next_plan = Plan("orders", 3, "orders-2", "orders-3", "/adapters/orders-3", "another salt", apart={"model": "/models/third"})
    with pytest.raises(NotYetError):
        carry_out(serve, next_plan, State())
    assert serve.names == {APPLICATION, SECOND} and serve.endpoint == SECOND


@given(
    st.lists(st.sampled_from([State(), State(step=1), State(Phase.paused, 1), State(Phase.promoting, 1)]), max_size=4),
    st.sampled_from([Phase.promoted, Phase.rolled_back]),
    st.lists(st.integers(0, 3), min_size=5, max_size=5),
)
def test_from_wherever_a_controller_is_killed_the_next_one_arrives(way: list[State], end: Phase, kills: list[int]) -> None:
    serve = Serve()
    for state, kill in zip([*way, State(end, 1)], itertools.cycle(kills), strict=False):
        serve.dies_after = len(serve.puts) + kill
        until_done(serve, State(state.phase, state.step, live_since=1.0))
    assert serve.names == ({SECOND} if end is Phase.promoted else {APPLICATION})
    config = serve.user_config(serve.endpoint)
    assert "arms" not in config
    assert config["aliases"]["champion"] == ("orders-2" if end is Phase.promoted else "orders-1")


def test_somebody_elses_champion_ends_it_and_a_leftover_is_replaced() -> None:
    serve = Serve()
    left = copy.deepcopy(ENDPOINT) | {"name": SECOND, "route_prefix": None, "args": {"model": "/models/forgotten"}}
    serve.applications.append(left)
    serve.states[SECOND] = "RUNNING"
    with pytest.raises(NotYetError):
        carry_out(serve, PLAN, State())
    assert next(app for app in serve.applications if app["name"] == SECOND)["args"]["model"] == "/models/second"
    moved = copy.deepcopy(ENDPOINT)
    moved["deployments"][0]["user_config"]["aliases"] = {"champion": "orders-9"}  # type: ignore[index]
    serve = Serve(moved)
    with pytest.raises(ChampionMovedError, match="orders-9"):
        carry_out(serve, PLAN, State())
    carry_out(serve, PLAN, State(Phase.rolled_back))
    assert serve.applications == [OTHER, moved]


def test_a_shadow_needs_one_base() -> None:
    with pytest.raises(ValueError, match="leave it out"):
        Plan("orders", 2, "orders-1", "orders-2", "/a", "a salt for tests", shadow=0.1, apart=BASE)
