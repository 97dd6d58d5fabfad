"""A real PostgreSQL for a test, on a port and in a directory of its own."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from altiplano.cluster.processes import free_port

# Every character that an address, a shell or a settings file could take for its own.
PASSWORD = "a%b@c:d/e?f'g\"h $i"


@dataclass(frozen=True)
class Database:
    """How to reach it."""

    port: int

    @property
    def environment(self) -> dict[str, str]:
        """As libpq reads it."""
        return {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.port),
            "PGUSER": "mlflow",
            "PGPASSWORD": PASSWORD,
            "PGDATABASE": "mlflow",
        }


def programs() -> Path | None:
    """The folder of PostgreSQL's server programs."""
    candidates = [
        *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True),
        *(Path(p).parent for p in [shutil.which("initdb")] if p),
    ]
    return next((path for path in candidates if (path / "initdb").exists() and (path / "postgres").exists()), None)


@contextmanager
def running(folder: Path) -> Iterator[Database]:
    """A server with the database `mlflow`. As root it runs as the user `postgres`: it refuses to be root."""
    user = "postgres" if os.getuid() == 0 else None
    data = Path(tempfile.mkdtemp(prefix="altiplano-postgres-"))
    password = data / "password"
    password.write_text(PASSWORD)
    if user:
        for path in (data, password):
            shutil.chown(path, user, user)
    try:
        directory = data / "data"
        subprocess.run(
            [folder / "initdb", "-D", directory, "-U", "mlflow", "-A", "scram-sha-256", f"--pwfile={password}", "--no-sync"],
            user=user, cwd=data, check=True, capture_output=True, timeout=300,
        )  # fmt: skip
        port = free_port()
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={data} -c fsync=off"
        subprocess.run(
            [folder / "pg_ctl", "-D", directory, "-w", "-t", "240", "-l", data / "log", "-o", options, "start"],
            user=user,
            cwd=data,
            check=True,
            timeout=300,
        )
        try:
            database = Database(port)
            environment = {**os.environ, **database.environment, "PGDATABASE": "postgres"}
            subprocess.run([folder / "createdb", "mlflow"], env=environment, check=True, timeout=300)
            yield database
        finally:
            subprocess.run(
                [folder / "pg_ctl", "-D", directory, "-m", "immediate", "-w", "-t", "240", "stop"],
                user=user,
                cwd=data,
                check=True,
                timeout=300,
                capture_output=True,
            )
    finally:
        shutil.rmtree(data)
