"""A script can tell what went wrong from the exit code alone, however deep the error was wrapped."""

import errno

import pytest

from altiplano.cluster.processes import PortBusyError
from altiplano.data import AuditError
from altiplano.pipeline import outcome
from altiplano.pipeline.run import StageError, root_cause
from altiplano.registry import RegistryUnavailableError


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        (AuditError("row 3"), outcome.BAD_INPUT),
        (RegistryUnavailableError("MLflow is away"), outcome.UNAVAILABLE),
        (PortBusyError("8000"), outcome.BUSY),
        (OSError(errno.ENOSPC, "No space left on device"), outcome.NO_SPACE),
        (ZeroDivisionError("ours"), outcome.FAILED),
    ],
)
def test_the_cause_decides(cause: Exception, code: int) -> None:
    try:
        try:
            raise cause
        except Exception as error:
            raise RuntimeError("a layer around it") from error
    except RuntimeError as wrapped:
        assert outcome.finish(StageError("deploy", wrapped)) == code
        assert str(cause) in root_cause(wrapped)


def test_a_message_of_ours_is_not_lost_behind_what_caused_it() -> None:
    ours = RegistryUnavailableError("MLflow does not answer: start it")
    ours.__cause__ = OSError("Connection refused")
    assert str(StageError("evaluate", ours)) == "evaluate: MLflow does not answer: start it"


def test_a_candidate_that_is_not_promoted_has_its_own_code() -> None:
    assert outcome.finish(None) == outcome.NOT_PROMOTED
