"""Exit codes of the commands, so that scripts can tell a bad file from a bad model."""

from altiplano.cluster.processes import PortBusyError
from altiplano.pipeline.run import StageError
from altiplano.pipeline.services import ServiceError
from altiplano.pipeline.workspace import WorkspaceBusyError, out_of_space
from altiplano.registry import RegistryUnavailableError

OK = 0
FAILED = 1  # something broke: the log says what
BAD_INPUT = 2  # the file, the data or an argument must change
NOT_PROMOTED = 3  # the pipeline ran, the gate did not promote the candidate
UNAVAILABLE = 4  # Ray, MLflow, the object store or the endpoint does not answer
BUSY = 5  # another pipeline holds the workspace, or a port is taken
NO_SPACE = 6  # the workspace's disk is full

_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (PortBusyError, BUSY),
    (WorkspaceBusyError, BUSY),
    (RegistryUnavailableError, UNAVAILABLE),
    (ServiceError, UNAVAILABLE),
    # Our packages raise ValueErrors for what the user mends by changing what was written.
    (ValueError, BAD_INPUT),
)


def finish(error: BaseException | None) -> int:
    """The exit code for what a run raised, or (None) for a run whose candidate was not promoted."""
    if error is None:
        return NOT_PROMOTED
    if out_of_space(error):
        return NO_SPACE
    cause: BaseException | None = error.cause if isinstance(error, StageError) else error
    while cause is not None:
        for kind, code in _CODES:
            if isinstance(cause, kind):
                return code
        cause = cause.__cause__
    return FAILED
