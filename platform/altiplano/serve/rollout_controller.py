"""Carries a rollout out: looks every half second, decides (`rollout`), sets weights over Ray Serve's REST interface, and takes notes.

Everything it does can be done twice. When it dies, the endpoint keeps the weights it has, and the next controller reads the state
from disk and goes on; what it had begun (a promotion, a way back) is done again from its beginning.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from threading import Event
from typing import Any, Protocol

from altiplano.serve import rollout, rollout_apart
from altiplano.serve.arms import Arms
from altiplano.serve.evidence import NoEvidenceError, Reading
from altiplano.serve.outcomes import Outcomes
from altiplano.serve.rollout import CHAMPION, Evidence, Phase, State
from altiplano.serve.rollout_config import ChampionMovedError, arms_for, configured
from altiplano.serve.rollout_store import NoRolloutError, Saved, Store

INTERVAL_S = 0.5
# Weights that are not live by then are set again: somebody else has deployed, or a replica has started with an old config.
SET_AGAIN_AFTER_S = 5.0
NOTE_EVERY_S, OPEN_EVERY_S = 15.0, 60.0

log = logging.getLogger("altiplano.rollout")


class Control(rollout_apart.Applications, Protocol):
    """What `ServeControl` offers."""

    def get_user_config(self) -> dict[str, Any]: ...

    def set_user_config(self, user_config: dict[str, Any]) -> None: ...


class Reader(Protocol):
    """What `AbClient` offers."""

    def read(self) -> Reading: ...


class Registry(Protocol):
    """Where the aliases live."""

    def promote(self, name: str, version: int) -> None: ...


class Journal(Protocol):
    """Where the evidence is kept for people."""

    def open(self, saved: Saved) -> str: ...

    def note(self, saved: Saved, outcomes: Outcomes, *, moved: bool) -> None: ...

    def close(self, saved: Saved) -> None: ...


class Controller:
    """One rollout from where it is to its end. `clock` in seconds since 1970."""

    def __init__(
        self,
        control: Control,
        reader: Reader,
        registry: Registry,
        journal: Journal,
        store: Store,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Raises:
            NoRolloutError: the store has none.
        """
        found = store.load()
        if found is None:
            raise NoRolloutError("there is no rollout: start one with `altiplano rollout start`")
        self.saved = found
        self._control, self._reader, self._registry, self._journal = control, reader, registry, journal
        self._store, self._clock = store, clock
        self._set: State | None = None  # whose weights were set by this process
        self._set_at = self._noted = self._open_at = 0.0
        self._opened, self._moved = False, True

    def run(self, stop: Event) -> State:
        """Until it has ended or `stop` is set."""
        while not stop.is_set() and not self.tick().phase.ended:
            stop.wait(INTERVAL_S)
        return self.saved.state

    def tick(self) -> State:
        """Look once, decide, and do what follows."""
        saved, now = self.saved, self._clock()
        if saved.state.phase.ended:
            return saved.state
        saved.seen = now
        self._listen()
        reading = self._read()
        evidence = None if reading is None else Evidence(saved.notebook.outcomes(), self._is_live(reading))
        self._enter(rollout.decide(saved.plan, saved.state, evidence, now))
        try:
            self._carry_out(evidence is not None and not evidence.live)
        except (ChampionMovedError, rollout_apart.ChallengerFailedError) as error:
            self._enter(replace(saved.state, phase=Phase.rolling_back, reason=str(error)))
        except (RuntimeError, OSError) as error:
            log.warning("%s: %s", saved.state.phase, error)
            self._enter(replace(self.saved.state, reason=f"{self.saved.state.phase.replace('_', ' ')}: {error}"))
        self._take_notes(now)
        return self.saved.state

    def _take_notes(self, now: float) -> None:
        # Last, and a journal that does not answer is asked seldom: it may take many seconds, and a way back must not wait for it.
        if not self._opened and now >= self._open_at:
            self._open_at = now + OPEN_EVERY_S
            try:
                self.saved.run_id = self._journal.open(self.saved)
                self._opened = True
            except (RuntimeError, OSError) as error:
                log.warning("this rollout is not recorded yet: %s", error)
        if not self._moved and now - self._noted < NOTE_EVERY_S:
            return
        self._save()
        if self._opened:
            self._journal.note(self.saved, self.saved.notebook.outcomes(), moved=self._moved)
            self._noted, self._moved = now, False
            if self.saved.state.phase.ended:
                self._journal.close(self.saved)

    def _save(self) -> None:
        # A full disk must not keep a broken challenger on the endpoint.
        try:
            self._store.save(self.saved)
        except OSError as error:
            log.error("the state of this rollout cannot be written: %s", error)

    def _listen(self) -> None:
        """Do what a person has asked for."""
        mail = self._store.taken()
        if mail is None:
            return
        verb, reason = mail
        do = {"pause": rollout.paused, "resume": rollout.resumed, "promote": rollout.promoted, "rollback": rollout.rolled_back}
        try:
            self._enter(do[verb](self.saved.state, *([reason] if reason else [])))
        except ValueError as error:
            log.warning("%s", error)

    def _read(self) -> Reading | None:
        try:
            reading = self._reader.read()
        except NoEvidenceError as error:
            log.warning("%s", error)
            return None
        if reading.test == self._arms().test_id:
            self.saved.notebook.take(reading)
        return reading

    def _is_live(self, reading: Reading) -> bool:
        arms = self._arms()
        return reading.is_live(arms.test_id, {arm: arms.share(arm) for arm in arms.weights})

    def _arms(self) -> Arms:
        return Arms.of(arms_for(self.saved.plan, self.saved.state, [CHAMPION]))

    def _enter(self, state: State) -> None:
        """Take a new state; what matters is on disk before anything follows from it."""
        before, self.saved.state = self.saved.state, state
        if (state.phase, state.step, state.live_since) == (before.phase, before.step, before.live_since):
            return
        if state.live_since is not None and before.live_since is None:
            self.saved.notebook.begin()
        self.saved.changed = self._clock()
        self.saved.history.append(
            {
                "time": self.saved.changed,
                "phase": state.phase,
                "share": rollout.share(self.saved.plan, state),
                "reason": state.reason,
            }
        )
        self._save()
        self._moved = True
        log.info("%s, %g %%: %s", state.phase, rollout.share(self.saved.plan, state), state.reason)

    def _carry_out(self, not_live: bool) -> None:
        """Make the endpoint and the registry what the state says."""
        plan, state = self.saved.plan, self.saved.state
        stale = not_live and self._clock() - self._set_at >= SET_AGAIN_AFTER_S
        moved = self._set is None or rollout.share(plan, self._set) != rollout.share(plan, state)
        if (moved or stale) and state.phase is not Phase.rolling_back:
            self._set_config(state)
        if state.phase in (Phase.running, Phase.paused):
            return
        if state.phase is Phase.promoting:
            self._registry.promote(plan.model, plan.version)
        done = rollout.ended(state)
        self._set_config(done)
        self._enter(done)

    def _set_config(self, state: State) -> None:
        plan = self.saved.plan
        if plan.apart is None:
            self._control.set_user_config(configured(self._control.get_user_config(), plan, state))
        else:
            rollout_apart.carry_out(self._control, plan, state)
        self._set, self._set_at = state, self._clock()
