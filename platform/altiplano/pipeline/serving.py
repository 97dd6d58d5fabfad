"""The way from a pipeline to Ray Serve: which dashboard, which token."""

import os
from pathlib import Path

import ray

from altiplano.cluster import local_ray
from altiplano.pipeline.services import Services
from altiplano.serve import ServeControl


def serve_control(services: Services, root: Path) -> ServeControl:
    """Serve of the workspace's own head, or of the cluster in which this process runs as a job."""
    if services.ray is not None:
        return ServeControl(services.ray.dashboard, local_ray.token(root))
    address = ray.init(ignore_reinit_error=True).dashboard_url
    return ServeControl(f"http://{address}", _token_of_environment())


def _token_of_environment() -> str | None:
    """Ray's token where Ray itself looks for it; None on a cluster that asks for none."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return None
    if text := os.environ.get("RAY_AUTH_TOKEN"):
        return text
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    return path.read_text().strip() if path.is_file() else None
