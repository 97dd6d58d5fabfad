"""CUDA's events without a GPU."""


class Event:
    """Work is in one order, and nothing has come to pass before somebody waits for it, or for something later."""

    recorded = passed = 0

    def __init__(self, enable_timing: bool = False) -> None:
        self._at = 0

    def record(self) -> None:
        Event.recorded += 1
        self._at = Event.recorded

    def synchronize(self) -> None:
        Event.passed = max(Event.passed, self._at)

    def elapsed_time(self, later: "Event") -> float:
        """Milliseconds, one from each recorded event to the next."""
        assert 0 < min(self._at, later._at) <= max(self._at, later._at) <= Event.passed, (
            "CUDA refuses the time of an event that has not come to pass"
        )
        return float(later._at - self._at)


def recorded() -> Event:
    """One behind everything so far."""
    event = Event()
    event.record()
    return event
