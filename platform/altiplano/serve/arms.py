"""Who is answered by which arm of an A/B test: a pure function of a salt, the weights and a sticky key.

Weighted rendezvous hashing (Schindelhauer and Schomaker, 2005): every arm scores -weight / ln(u) with u uniform from the hash of
salt, key and arm, and the highest score wins. An arm is drawn in proportion to its weight, and a weight that rises only ever draws
keys towards its arm: nobody changes arm but the share that has to.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CHAMPION = "champion"
ARM_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
MAX_ARMS = 8


@dataclass(frozen=True)
class Arms:
    """A running test. `weights` by arm, in any unit; `models` are the names under which requests are divided.

    Every arm is the name of an alias or adapter. The salt is the test's secret: another one deals everybody anew. `elsewhere` names
    the Serve application that answers for an arm with another base model; over there the same test has `only` that arm.
    """

    salt: str
    weights: Mapping[str, float]
    models: frozenset[str] = frozenset({CHAMPION})
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    only: str | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Arms":
        """From the `arms` of a user_config: {"salt": str, "weights": {arm: number}, "models": [name, …], "elsewhere":
        {arm: application}, "only": arm}, the last three optional.

        Raises:
            ValueError: what to change.
        """
        unknown = sorted(set(values) - {"salt", "weights", "models", "elsewhere", "only"})
        if unknown:
            raise ValueError(f"arms has unknown keys {unknown}: use salt, weights, models, elsewhere and only")
        salt, weights, models = values.get("salt"), values.get("weights"), values.get("models", [CHAMPION])
        if not isinstance(salt, str) or len(salt) < 8:
            raise ValueError("arms.salt has to be a text of at least 8 characters: it keeps assignments unpredictable")
        if not isinstance(weights, Mapping) or not 1 <= len(weights) <= MAX_ARMS:
            raise ValueError(f"arms.weights has to name 1 to {MAX_ARMS} arms with their weights")
        for arm, weight in weights.items():
            if not isinstance(arm, str) or ARM_NAME.fullmatch(arm) is None:
                raise ValueError(f"arms.weights names {arm!r}: use lower-case letters, digits, '.', '_' and '-'")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                raise ValueError(f"the weight of {arm!r} is {weight!r}: use a number from 0 on")
        if not sum(weights.values()):
            raise ValueError("all weights are 0: give at least one arm some traffic")
        if not isinstance(models, list | tuple) or not models or not all(isinstance(model, str) for model in models):
            raise ValueError("arms.models has to be a list of model names")
        elsewhere, only = values.get("elsewhere") or {}, values.get("only")
        if not isinstance(elsewhere, Mapping) or not all(isinstance(name, str) and name for name in elsewhere.values()):
            raise ValueError("arms.elsewhere has to map arms to names of Serve applications")
        for arm in (*elsewhere, *([] if only is None else [only])):
            if arm not in weights:
                raise ValueError(f"arms.weights has no {arm!r}, which elsewhere or only names: use its arms {sorted(weights)}")
        if only is not None and elsewhere:
            raise ValueError("arms has both elsewhere and only: an application sends requests on, or answers for one arm")
        return cls(salt, {arm: float(weight) for arm, weight in weights.items()}, frozenset(models), dict(elsewhere), only)

    def assign(self, key: str) -> str:
        """The arm of a sticky key."""
        if self.only is not None:
            return self.only
        return max(self.weights, key=lambda arm: (self._score(arm, key), arm))

    def share(self, arm: str) -> float:
        """The part of all keys that `arm` gets, 0 to 1."""
        return self.weights.get(arm, 0.0) / sum(self.weights.values())

    @property
    def divided(self) -> bool:
        """Whether more than one arm gets traffic, or one that is elsewhere."""
        busy = [arm for arm, weight in self.weights.items() if weight > 0]
        return len(busy) > 1 or any(arm in self.elsewhere for arm in busy)

    @property
    def test_id(self) -> str:
        """Names the test in public: the salt cannot be found from it."""
        return hashlib.sha256(b"altiplano test " + self.salt.encode()).hexdigest()[:12]

    def _score(self, arm: str, key: str) -> float:
        weight = self.weights[arm]
        if not weight:
            return 0.0
        digest = hashlib.blake2b(f"{arm}\0{key}".encode(errors="surrogatepass"), digest_size=8, key=_key(self.salt)).digest()
        uniform = (int.from_bytes(digest) + 0.5) / 2.0**64
        # Rounded to 1.0 once in 2^53 keys: the logarithm would be 0.
        return weight / -math.log(min(uniform, 1 - 2.0**-53))


def sticky_key(session: str | None, user: str | None, key_id: str | None, request_id: str) -> str:
    """What stays in one arm: a session, else a user, else an API key, else nothing but this request.

    Each kind has a space of its own, so that a session cannot be named like somebody's key.
    """
    for kind, value in (("session", session), ("user", user), ("key", key_id)):
        if value:
            return f"{kind}:{value}"
    return f"request:{request_id}"


def _key(salt: str) -> bytes:
    """A hash key of the length that blake2b takes."""
    return hashlib.sha256(salt.encode()).digest()
