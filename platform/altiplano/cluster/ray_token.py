"""Ray's token where Ray itself looks for it."""

import os
from pathlib import Path


def token_of_environment() -> str | None:
    """RAY_AUTH_TOKEN, else the file of RAY_AUTH_TOKEN_PATH, else `~/.ray/auth_token`; None where there is none."""
    if text := os.environ.get("RAY_AUTH_TOKEN"):
        return text
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    return path.read_text().strip() if path.is_file() else None
