"""Start MLflow's server with basic authentication on PostgreSQL. Passwords stay in the environment and in a file of this pod, never in arguments."""

import os
from pathlib import Path
from urllib.parse import quote

AUTH_INI = Path(os.environ.get("MLFLOW_AUTH_CONFIG_PATH", "/tmp/basic_auth.ini"))


def database_uri(environment: dict[str, str]) -> str:
    """The SQLAlchemy address of the database; every part may hold any character."""
    user, password, name = (quote(environment[f"DATABASE_{part}"], safe="") for part in ("USER", "PASSWORD", "NAME"))
    host, port, mode = (environment[f"DATABASE_{part}"] for part in ("HOST", "PORT", "SSLMODE"))
    return f"postgresql+psycopg://{user}:{password}@{host}:{port}/{name}?sslmode={mode}"


def auth_ini(uri: str) -> str:
    """MLflow's settings of basic authentication. Users see nothing that was not granted. `%` is the file format's own sign."""
    return "\n".join(
        [
            "[mlflow]",
            "default_permission = NO_PERMISSIONS",
            f"database_uri = {uri.replace('%', '%%')}",
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
            "grant_default_workspace_access = false",
            "",
        ]
    )


def command(environment: dict[str, str]) -> list[str]:
    """The server's arguments. The backend store comes by MLFLOW_BACKEND_STORE_URI."""
    server = [
        "mlflow",
        "server",
        "--host",
        "0.0.0.0",
        "--port",
        environment.get("MLFLOW_PORT", "5000"),
        "--app-name",
        "basic-auth",
    ]
    return [
        *server,
        "--workers",
        environment["MLFLOW_WORKERS"],
        "--serve-artifacts",
        "--artifacts-destination",
        environment["ARTIFACTS_DESTINATION"],
    ]


def main() -> None:
    """Write the settings, migrate the database, become the server."""
    environment = dict(os.environ)
    uri = database_uri(environment)
    AUTH_INI.touch(mode=0o600)
    AUTH_INI.write_text(auth_ini(uri))
    environment |= {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_AUTH_CONFIG_PATH": str(AUTH_INI)}
    os.execvpe("mlflow", command(environment), environment)


if __name__ == "__main__":
    main()
