"""Exit codes of the commands, so that scripts can tell a bad file from a bad model."""

from pydantic import ValidationError

from altiplano.pipeline.run import StageError

OK = 0
FAILED = 1  # something broke: the log says what
BAD_INPUT = 2  # the file, the data or an argument must change
NOT_PROMOTED = 3  # the pipeline ran, the gate did not promote the candidate
UNAVAILABLE = 4  # Ray, MLflow, the object store or the endpoint does not answer
BUSY = 5  # another pipeline holds the workspace, or a port is taken

# Errors of our packages that the user mends by changing what was written, all of them ValueErrors.
_USER_ERRORS = (ValueError, ValidationError)


def finish(error: StageError | None) -> int:
    """The exit code for a failed stage, or (None) for a run whose candidate was not promoted."""
    if error is None:
        return NOT_PROMOTED
    cause: BaseException | None = error.cause
    while cause is not None:
        name = type(cause).__name__
        if name in ("PortBusyError", "WorkspaceBusyError"):
            return BUSY
        if name in ("RegistryUnavailable", "ServiceError"):
            return UNAVAILABLE
        if isinstance(cause, _USER_ERRORS):
            return BAD_INPUT
        cause = cause.__cause__
    return FAILED
