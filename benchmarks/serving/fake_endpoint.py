"""The endpoint of Ray Serve with the fake engine; Ray Serve imports `build` by name. The rest is the product's own code.

`FAKE_STEP_S` in its environment says how long a step takes.
"""

import os
from dataclasses import asdict
from typing import Any

from front_end import FAKE_STEP_S, fake_engine
from ray.serve import Application

from altiplano.serve import deployment, engine_client
from altiplano.serve.application import parse


class Settings(dict[str, Any]):
    """Arguments of a replica; reading them in its process imports this module there, and so brings the fake engine."""


engine_client.COMMAND[:] = fake_engine(float(os.environ[FAKE_STEP_S]))


def build(args: dict[str, Any]) -> Application:
    """The application with the fake engine."""
    settings, endpoint = parse(args)
    bound: Application = deployment.Endpoint.bind(Settings(asdict(settings)), endpoint.model_dump(mode="json"))  # type: ignore[attr-defined]
    return bound
