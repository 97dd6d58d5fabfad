"""What a rollout asks of the endpoint's `user_config`: pure functions of what it has, the plan and the state."""

from collections.abc import Mapping
from typing import Any

from altiplano.serve import rollout
from altiplano.serve.rollout import CHALLENGER, CHAMPION, Phase, Plan, State

PREVIOUS = "previous"


class ChampionMovedError(RuntimeError):
    """Somebody else has changed what answers as the champion."""


def configured(user_config: Mapping[str, Any], plan: Plan, state: State) -> dict[str, Any]:
    """The user_config that a state asks for, from the one that the endpoint has.

    Raises:
        ChampionMovedError: another adapter has become the champion meanwhile.
    """
    aliases, adapters = dict(user_config["aliases"]), dict(user_config["adapters"])
    config = {key: value for key, value in user_config.items() if key not in ("arms", "shadow")}
    answers = aliases.get(CHAMPION)
    if state.phase in (Phase.rolling_back, Phase.rolled_back):
        aliases.pop(CHALLENGER, None)
        # An older version that is rolled out again may still have a name, such as `previous`.
        if plan.challenger not in aliases.values():
            adapters.pop(plan.challenger, None)
        return config | {"adapters": adapters, "aliases": aliases}
    if answers not in (plan.champion, plan.challenger):
        raise ChampionMovedError(f"{answers or 'nothing'} has become the champion instead of {plan.champion}: this rollout ends")
    adapters[plan.challenger] = plan.path
    names = names_of(answers, aliases)
    if state.phase is Phase.promoted:
        aliases |= dict.fromkeys(names, plan.challenger) | {PREVIOUS: plan.champion}
        aliases.pop(CHALLENGER, None)
        # What nobody calls by name any more goes; the previous champion stays for a way back.
        named = {*aliases.values()}
        return config | {"adapters": {name: path for name, path in adapters.items() if name in named}, "aliases": aliases}
    aliases[CHALLENGER] = plan.challenger
    test = {"arms": arms_for(plan, state, names), "shadow": {"arm": CHALLENGER, "fraction": plan.shadow} if plan.shadow else None}
    return config | {"adapters": adapters, "aliases": aliases} | test


def names_of(adapter: str, aliases: Mapping[str, str]) -> list[str]:
    """The aliases under which an adapter answers as the champion."""
    return sorted(name for name, target in aliases.items() if target == adapter and name not in (CHALLENGER, PREVIOUS))


def arms_for(plan: Plan, state: State, models: list[str]) -> dict[str, Any]:
    """The `arms` of a user_config: both arms with their weights, for requests that name one of `models`."""
    part = rollout.share(plan, state)
    return {"salt": plan.salt, "weights": {CHAMPION: 100 - part, CHALLENGER: part}, "models": models}
