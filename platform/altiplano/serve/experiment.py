"""The test that one replica takes part in: its arms, and what became of their requests.

Everything about a test arrives in Ray Serve's `user_config` and can change between two requests:
{"adapters": {name: path}, "aliases": {alias: name}, "arms": {"salt": …, "weights": {arm: weight}} or null,
"shadow": {"arm": …, "fraction": …} or null, "late_after_s": seconds}.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from altiplano.serve import outcomes
from altiplano.serve.arms import Arms, sticky_key
from altiplano.serve.call import Call, current_call
from altiplano.serve.engine_errors import ASLEEP, AsleepError, RefusedError
from altiplano.serve.feedback import FeedbackRequest, Scores, answer_id, arm_of
from altiplano.serve.forward import Forwarded, Frame
from altiplano.serve.outcomes import Outcomes, Recorder, Trial
from altiplano.serve.protocol import ChatRequest, CompletionRequest
from altiplano.serve.shadow import Mirror, Shadow

if TYPE_CHECKING:
    from altiplano.serve.generation import Generator

ARM_HEADER, SESSION_HEADER = "x-altiplano-arm", "x-session-id"
LATE_AFTER_S = 10.0
KNOWN = {"adapters", "aliases", "arms", "shadow", "late_after_s"}
T = TypeVar("T")


class Experiment:
    """`name` tells this replica from others and from its own earlier life. Without arms, nothing here does anything."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.name = uuid.uuid4().hex[:12]
        self.arms: Arms | None = None
        self.shadow: Shadow | None = None
        # Asks all replicas for their snapshots; where there is one process only, nobody needs to.
        self.gather: Callable[[], Awaitable[list[dict[str, Any]]]] | None = None
        # Brings a rating (answer, score) to the replica that counts it.
        self.spread: Callable[[str, float], Awaitable[None]] | None = None
        # Lets another application answer a request; where there is one process only, there is none.
        self.forward: Callable[[str, Forwarded], AsyncIterator[Frame]] | None = None
        self._clock = clock
        self._recorder = Recorder(clock, LATE_AFTER_S)
        self._scores = Scores()

    def configure(self, user_config: Mapping[str, Any]) -> None:
        """Take the test of a user_config that `check_user_config` has passed. Sums go on until the salt changes."""
        arms = arms_of(user_config)
        before, self.arms = self.arms, arms
        shadow = shadow_of(user_config)
        if (
            shadow is not None
            and self.shadow is not None
            and before is not None
            and arms is not None
            and before.salt == arms.salt
        ):
            shadow.sums = self.shadow.sums
        self.shadow = shadow
        if arms is not None and (before is None or before.salt != arms.salt):
            self._recorder, self._scores = Recorder(self._clock, user_config.get("late_after_s", LATE_AFTER_S)), Scores()

    def divides(self, model: str) -> bool:
        """Whether requests for a model are divided among several arms now."""
        return self.arms is not None and self.arms.divided and model in self.arms.models

    def enter(self, call: Call, model: str, session: str | None, user: str | None) -> dict[str, str]:
        """Give a request to an arm, if its model is tested; returns the headers that say so."""
        if self.arms is None or model not in self.arms.models:
            return {}
        call.arm = self.arms.assign(sticky_key(session, user, call.key.id if call.key else None, call.request_id))
        return self.marks(call)

    def marks(self, call: Call) -> dict[str, str]:
        """The headers that say which arm a call has."""
        return {ARM_HEADER: call.arm} if call.arm else {}

    def application_for(self, call: Call, model: str, session: str | None, user: str | None) -> str | None:
        """The application that has to answer a request: that of its arm; None where it is answered here. Notes model and arm."""
        if self.arms is None or not self.arms.elsewhere or model not in self.arms.models:
            return None
        self.enter(call, model, session, user)
        call.model = model
        return self.arms.elsewhere.get(call.arm)

    def lost(self, call: Call) -> None:
        """Another application could not answer a request of its arm. What it did answer, it counts itself."""
        if self._tests(call):
            self._recorder.failed(self._recorder.begin(call.arm, call))

    def arm_for(self, model: str) -> str:
        """The name of what answers the current call: its arm, else the model that it names."""
        call = current_call()
        return call.arm if call is not None and self._tests(call) else model

    def mirror(self, generator: "Generator", request: ChatRequest | CompletionRequest) -> Mirror | None:
        """What gives an answer again, unseen; None for most requests."""
        call = current_call()
        if self.shadow is None or call is None or not self._tests(call):
            return None
        return self.shadow.mirror(generator, call, request)

    def answer_id(self, kind: str) -> str:
        """An id for the answer of the current call."""
        call = current_call()
        return answer_id(kind, self.arms, call.arm if call is not None and self._tests(call) else None, self.name)

    async def whole(self, answer: Awaitable[T], *, refusable: bool) -> T:
        """Await an answer and note what became of it. `refusable`: the engine may find fault with what the client sent."""
        call, trial = self._begin()
        try:
            done = await answer
        except BaseException as error:
            self._end(call, trial, error, refusable)
            raise
        self._end(call, trial, None, refusable)
        return done

    async def streamed(self, events: AsyncIterator[T], *, refusable: bool) -> AsyncIterator[T]:
        """Pass a stream on and note what became of it."""
        call, trial = self._begin()
        try:
            async with aclosing(events) as inner:  # type: ignore[type-var]
                async for event in inner:
                    yield event
        except BaseException as error:
            self._end(call, trial, error, refusable)
            raise
        self._end(call, trial, None, refusable)

    async def rate(self, request: FeedbackRequest) -> None:
        """Count what a user thinks of an answer, where ratings of this answer are counted.

        Raises:
            ApiError: 404, the running test has no such answer.
        """
        arm_of(self.arms, request.id)
        if self.spread is None:
            self.count(request.id, request.value)
        else:
            await self.spread(request.id, request.value)

    def count(self, answer: str, score: float) -> None:
        """Count a rating here.

        Raises:
            ApiError: 404, the running test has no such answer.
        """
        self._recorder.rated(arm_of(self.arms, answer), score, self._scores.replace(answer, score))

    def snapshot(self) -> dict[str, Any]:
        """This replica's sums, JSON-ready: {"replica", "test", "weights": {arm: share}, "arms": {arm: ArmOutcomes}, "shadow"}."""
        found = self._recorder.snapshot()
        return {
            "replica": self.name,
            "test": None if self.arms is None else self.arms.test_id,
            "weights": None if self.arms is None else {arm: self.arms.share(arm) for arm in self.arms.weights},
            "arms": {arm: sums.to_json() for arm, sums in found.items()},
            "shadow": None if self.shadow is None else asdict(self.shadow.sums),
        }

    async def snapshots(self) -> list[dict[str, Any]]:
        """The snapshots of all replicas that answer."""
        return [self.snapshot()] if self.gather is None else await self.gather()

    def _tests(self, call: Call) -> bool:
        return self.arms is not None and call.model in self.arms.models and call.arm in self.arms.weights

    def _begin(self) -> tuple[Call | None, Trial | None]:
        call = current_call()
        return call, self._recorder.begin(call.arm, call) if call is not None and self._tests(call) else None

    def _end(self, call: Call | None, trial: Trial | None, error: BaseException | None, refusable: bool) -> None:
        if call is None or trial is None:
            return
        # Who puts the engine to sleep takes answers away from all arms alike: no arm has failed.
        asleep = isinstance(error, AsleepError) or call.error == ASLEEP
        if asleep or isinstance(error, GeneratorExit | asyncio.CancelledError) or (isinstance(error, RefusedError) and refusable):
            self._recorder.left(trial)
        elif error is not None or call.error is not None:
            self._recorder.failed(trial)
        else:
            self._recorder.answered(trial, call.generation_tokens, self._clock())


def arms_of(user_config: Mapping[str, Any]) -> Arms | None:
    """The arms of a user_config.

    Raises:
        ValueError: what to change.
    """
    values = user_config.get("arms")
    return None if values is None else Arms.of(values)


def shadow_of(user_config: Mapping[str, Any]) -> Shadow | None:
    """The shadow of a user_config.

    Raises:
        ValueError: what to change.
    """
    values = user_config.get("shadow")
    return None if values is None else Shadow.of(values)


def check_user_config(user_config: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: what to change, before any replica sees it.
    """
    unknown = sorted(set(user_config) - KNOWN)
    if unknown:
        raise ValueError(f"the user_config has unknown keys {unknown}: use {', '.join(sorted(KNOWN))}")
    adapters, aliases = user_config.get("adapters", {}), user_config.get("aliases", {})
    arms = arms_of(user_config)
    shadow = shadow_of(user_config)
    if shadow is not None and arms is None:
        raise ValueError("shadow needs arms: what is mirrored is the traffic of a test")
    if shadow is not None and arms is not None and shadow.arm in arms.elsewhere:
        raise ValueError(
            f"the arm {shadow.arm!r} is answered by another application: only an arm on these engines can be a shadow"
        )
    for arm in {*(arms.weights if arms else ()), *((shadow.arm,) if shadow else ())} - set(arms.elsewhere if arms else ()):
        if aliases.get(arm, arm) not in adapters:
            raise ValueError(f"the arm {arm!r} is no adapter and no alias of one: add it to aliases")


def read_snapshots(bodies: list[dict[str, Any]]) -> tuple[str | None, dict[str, Outcomes]]:
    """(test, outcomes by replica) of what replicas reported; replicas that are still in another test are left out."""
    tests = [body["test"] for body in bodies if body["test"] is not None]
    if not tests:
        return None, {}
    test = max(set(tests), key=tests.count)
    return test, {
        body["replica"]: {arm: outcomes.ArmOutcomes.from_json(sums) for arm, sums in body["arms"].items()}
        for body in bodies
        if body["test"] == test
    }
