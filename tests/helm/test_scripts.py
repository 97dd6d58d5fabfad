"""The scripts that run in pods, with what they really talk to: MLflow, PostgreSQL, HTTP servers."""

import json
import os
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy.engine import make_url
from support import postgres
from support.charts import CHART

from altiplano.cluster.processes import free_port

FILES = CHART / "files"
START = runpy.run_path(str(FILES / "start_mlflow.py"), run_name="start_mlflow")
CHECK = runpy.run_path(str(FILES / "check_release.py"), run_name="check_release")
DATABASE = {
    "DATABASE_USER": "mlflow",
    "DATABASE_PASSWORD": postgres.PASSWORD,
    "DATABASE_NAME": "mlflow",
    "DATABASE_HOST": "db",
    "DATABASE_PORT": "5432",
    "DATABASE_SSLMODE": "require",
}


@pytest.fixture(scope="module")
def database() -> Iterator[postgres.Database]:
    """A PostgreSQL whose password holds every awkward character."""
    folder = postgres.programs()
    if folder is None:
        pytest.skip("no PostgreSQL on this machine: install the server's package")
    with postgres.running(folder) as running:
        yield running


def test_any_password_reaches_the_database() -> None:
    address = make_url(START["database_uri"](DATABASE))
    assert (address.username, address.password, address.host, address.port, address.database) == (
        "mlflow",
        postgres.PASSWORD,
        "db",
        5432,
        "mlflow",
    )
    assert address.query == {"sslmode": "require"}


ASK_MLFLOW = """
import json
from mlflow.cli import cli
from mlflow.server.auth.config import read_auth_config
settings = read_auth_config()
options = [o for p in cli.commands["server"].params for o in [*p.opts, *p.secondary_opts]]
print(json.dumps({"uri": settings.database_uri, "permission": settings.default_permission, "options": options}))
"""


def test_mlflow_understands_its_settings_and_options(tmp_path: Path) -> None:
    """Asked in a process of its own: MLflow's server warns at import of what its libraries will drop."""
    uri = START["database_uri"](DATABASE)
    (tmp_path / "basic_auth.ini").write_text(START["auth_ini"](uri))
    environment = {**os.environ, "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "basic_auth.ini")}
    done = subprocess.run(
        [sys.executable, "-c", ASK_MLFLOW], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    mlflow = json.loads(done.stdout.splitlines()[-1])
    assert (mlflow["uri"], mlflow["permission"]) == (uri, "NO_PERMISSIONS")
    command = START["command"]({"MLFLOW_WORKERS": "2", "ARTIFACTS_DESTINATION": "/artifacts"})
    assert [word for word in command if word.startswith("--") and word not in mlflow["options"]] == []
    assert not any(postgres.PASSWORD in word for word in command)


def test_mlflow_starts_on_postgresql_and_wants_a_login(database: postgres.Database, tmp_path: Path) -> None:
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")},
        **DATABASE,
        "DATABASE_HOST": "127.0.0.1",
        "DATABASE_PORT": str(database.port),
        "DATABASE_SSLMODE": "disable",
        "ARTIFACTS_DESTINATION": str(tmp_path / "artifacts"),
        "MLFLOW_WORKERS": "1",
        "MLFLOW_PORT": str(port),
        "MLFLOW_SERVER_ALLOWED_HOSTS": "localhost:*,127.0.0.1:*",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "basic_auth.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": "correct-horse-battery",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "x" * 32,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    base = f"http://127.0.0.1:{port}"
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, FILES / "start_mlflow.py"], env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        assert CHECK["check"]({"mlflow": f"{base}/health"}, 300) == {}, (tmp_path / "log").read_text()[-3000:]
        search, admin = {"json": {"max_results": 10}, "timeout": 120}, ("admin", "correct-horse-battery")
        address = f"{base}/api/2.0/mlflow/experiments/search"
        assert httpx.post(address, **search).status_code == 401
        answer = httpx.post(address, **search, auth=admin)
        foreign = httpx.post(address, **search, auth=admin, headers={"Host": "evil.example.com"})
        assert [experiment["name"] for experiment in answer.json()["experiments"]] == ["Default"]
        assert foreign.status_code == 403, "a rebound name is refused"
    finally:
        os.killpg(server.pid, 15)
        server.wait(120)
        log.close()


def test_a_backup_is_whole_and_old_ones_go(database: postgres.Database, tmp_path: Path) -> None:
    folder = postgres.programs()
    environment = {
        **os.environ,
        **database.environment,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "BACKUP_DIRECTORY": str(tmp_path),
        "BACKUP_KEEP": "2",
    }
    subprocess.run(
        ["psql", "-qc", "create table llamas (name text); insert into llamas values ('thea')"],
        env=environment,
        check=True,
        timeout=120,
    )
    for day in ("20260101", "20260102"):
        (tmp_path / f"mlflow-{day}T000000Z.dump").write_text("old")
        (tmp_path / f"mlflow-{day}T000000Z.dump.sha256").write_text("old")
    done = subprocess.run(["bash", FILES / "backup.sh"], env=environment, check=True, capture_output=True, text=True, timeout=300)
    newest, kept = sorted((path.name for path in tmp_path.glob("*.dump")), reverse=True)
    assert kept == "mlflow-20260102T000000Z.dump", "the newest two"
    assert newest in done.stdout
    subprocess.run(["sha256sum", "--check", "--quiet", f"{newest}.sha256"], cwd=tmp_path, check=True, timeout=120)
    assert not list(tmp_path.glob(".*")), "no partial file"

    subprocess.run(["psql", "-qc", "drop table llamas"], env=environment, check=True, timeout=120)
    subprocess.run(
        ["pg_restore", "--clean", "--if-exists", "--dbname=mlflow", tmp_path / newest], env=environment, check=True, timeout=120
    )
    restored = subprocess.run(
        ["psql", "-Atc", "select name from llamas"], env=environment, check=True, capture_output=True, text=True, timeout=120
    )
    assert restored.stdout == "thea\n"


def test_a_backup_that_fails_leaves_nothing(database: postgres.Database, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        **database.environment,
        "PGPASSWORD": "wrong",
        "BACKUP_DIRECTORY": str(tmp_path),
        "BACKUP_KEEP": "1",
    }
    (tmp_path / "mlflow-20260101T000000Z.dump").write_text("the last good one")
    done = subprocess.run(
        ["bash", FILES / "backup.sh"], env=environment, check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow-20260101T000000Z.dump"]


@contextmanager
def _answering(code: int) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("code", "wrong"), [(200, None), (401, None), (403, None), (404, "HTTP 404"), (503, "HTTP 503")])
def test_a_service_behind_a_login_answers(code: int, wrong: str | None) -> None:
    with _answering(code) as url:
        assert CHECK["answers"](url) == wrong


def test_the_release_test_names_what_is_wrong() -> None:
    with _answering(200) as good, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody else listens there either
        services = [f"mlflow={good}", f"endpoint=http://127.0.0.1:{closed.getsockname()[1]}/health"]
        done = subprocess.run(
            [sys.executable, FILES / "check_release.py", "0", *services], capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 1
    assert f"mlflow: answers ({good})" in done.stdout
    assert "endpoint: <urlopen error [Errno 111] Connection refused>" in done.stdout
