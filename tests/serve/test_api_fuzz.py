"""Random requests against our own OpenAPI document, unfiltered: whatever comes, the answer is one that the document names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from altiplano.serve.app import create_app

from .conftest import Server, settings

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 100


def _never() -> NoReturn:
    raise AssertionError("only the document is asked for")


DOCUMENT = schemathesis.openapi.from_dict(create_app(_never).openapi())
OPERATIONS = [operation.ok() for operation in DOCUMENT.get_all_operations()]


@pytest.fixture(scope="module")
def fuzzed(adapter: Path) -> Iterator[Server]:
    made = Server(settings(adapter))
    yield made
    made.close()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_no_request_breaks_anything(fuzzed: Server, operation: Any) -> None:
    @hypothesis_settings(
        max_examples=EXAMPLES if operation.body else 3,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    @given(st.one_of(operation.as_strategy(), operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)))
    def ask(case: Any) -> None:
        case.call_and_validate(base_url=fuzzed.url, checks=CHECKS, timeout=60)
        if isinstance(case.body, dict) and "model" in case.body:
            # Past the model's name, which chance does not find.
            case.body = case.body | {"model": "cria", "max_tokens": 3}
            case.call_and_validate(base_url=fuzzed.url, checks=CHECKS, timeout=60)

    ask()
    fuzzed.run(fuzzed.generator.client.sleep.end())  # from the sleep that one of the operations is
    assert fuzzed.generator.client.restarts == 0, "a request ended the engine"
