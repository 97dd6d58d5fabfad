"""What runs for a workspace: `up`, `down`, `open`, `doctor`."""

import os
import shutil
import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from altiplano.cli.console import Output, OutputOption, err, out, print_json, table
from altiplano.cli.runs import WorkspaceOption

MIN_FREE_GIB = 3


def register(app: typer.Typer) -> None:
    app.command()(up)
    app.command()(down)
    app.command(name="open")(open_page)
    app.command()(doctor)


def up(workspace: WorkspaceOption = Path(".altiplano")) -> None:
    """Start Ray and MLflow for a workspace, and redeploy what its last run deployed."""
    from altiplano.cluster.local_ray import environment

    os.environ.update(environment(workspace.resolve()))
    from altiplano.pipeline.servers import bring_up

    for label, value in bring_up(workspace.resolve(), lambda text: err.print(text, style="dim")):
        out.print(f"{label:<10}{value}")


def down(workspace: WorkspaceOption = Path(".altiplano")) -> None:
    """Stop everything that a workspace started; results stay."""
    from altiplano.cluster.local_ray import stop

    count = stop(workspace.resolve())
    out.print(f"stopped {count} processes" if count else "nothing was running")


def open_page(
    page: Annotated[str, typer.Argument(help="mlflow or ray")] = "mlflow",
    workspace: WorkspaceOption = Path(".altiplano"),
) -> None:
    """Open the MLflow UI (or print its address where there is no browser)."""
    from altiplano.cluster import local_ray
    from altiplano.pipeline.services import find_mlflow

    root = workspace.resolve()
    head = local_ray.find(root)
    addresses = {"mlflow": find_mlflow(root), "ray": head.dashboard if head else None}
    if page not in addresses:
        raise ValueError(f"{page!r} cannot be opened: choose one of {', '.join(addresses)}")
    address = addresses[page]
    if address is None:
        raise ConnectionError(f"{page} does not run for {root}: start it with `altiplano up`")
    out.print(address)
    if sys.stdout.isatty():
        webbrowser.open(address)


def doctor(workspace: WorkspaceOption = Path(".altiplano"), output: OutputOption = Output.text) -> None:
    """Check this machine: versions, memory, disk, GPU, ports, services."""
    checks = _checks(workspace.resolve())
    if output is Output.json:
        print_json([{"check": name, "ok": ok, "detail": detail} for name, ok, detail in checks])
    else:
        out.print(table("", ["", "check", "detail"], [["ok" if ok else "!!", name, detail] for name, ok, detail in checks]))
    if not all(ok for _, ok, _ in checks):
        raise typer.Exit(1)


def _checks(root: Path) -> list[tuple[str, bool, str]]:
    from importlib.metadata import PackageNotFoundError, version

    import psutil

    from altiplano.cluster import local_ray, processes
    from altiplano.pipeline.services import find_mlflow

    found = [("python", sys.version_info[:2] in ((3, 11), (3, 12)), f"{sys.version.split()[0]} (3.11 or 3.12)")]
    for package in ("ray", "torch", "transformers", "trl", "peft", "mlflow"):
        try:
            found.append((package, True, version(package)))
        except PackageNotFoundError:
            found.append((package, False, "not installed: run `make demo` or `pip install -e .`"))
    free = shutil.disk_usage(root if root.exists() else root.parent).free / (1 << 30)
    found.append(("disk", free >= MIN_FREE_GIB, f"{free:.0f} GiB free (at least {MIN_FREE_GIB})"))
    memory = psutil.virtual_memory().available / (1 << 30)
    found.append(("memory", memory >= 4, f"{memory:.0f} GiB available (at least 4)"))
    found.append(("GPU driver", True, shutil.which("nvidia-smi") or "none: CPU only"))
    head = local_ray.find(root)
    found.append(("Ray", True, head.dashboard if head else "not running"))
    found.append(("MLflow", True, find_mlflow(root) or "not running"))
    try:
        processes.require_free("127.0.0.1", 8000, "serve.port")
        found.append(("port 8000", True, "free"))
    except processes.PortBusyError as error:
        ours = head is not None
        found.append(("port 8000", ours, "our endpoint" if ours else str(error)))
    return found
