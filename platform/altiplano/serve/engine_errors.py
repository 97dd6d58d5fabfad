"""Why an engine does not answer a request."""

from altiplano.serve.errors import ApiError

ASLEEP = "engine_asleep"


class EngineDiedError(RuntimeError):
    """The engine's process ended while a request was in flight; a new one is being started."""


class RefusedError(ValueError):
    """The engine does not take this request or adapter."""


class AsleepError(ApiError):
    """The engine sleeps, or is about to."""

    def __init__(self, message: str = "the engine sleeps: an administrator has to wake it up (POST /wake_up)") -> None:
        super().__init__(503, message, code=ASLEEP)
