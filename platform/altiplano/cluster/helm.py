"""The user's own helm, driven: the command is shown before it runs, and what it would change comes from two renders."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from altiplano.cluster.diff import Plan, plan_all
from altiplano.cluster.kube import Object

QUICK_TIMEOUT_S = 60.0
DEPENDENCY_TIMEOUT_S = 300.0
# Where the chart is in a checkout.
CHART = Path(__file__).parents[3] / "helm" / "altiplano"
OPERATOR_CHART = ("kuberay-operator", "https://ray-project.github.io/kuberay-helm/")


class HelmError(RuntimeError):
    """helm said no; the message is its own."""

    exit_code = 1


class HelmSetupError(ValueError):
    """There is no helm, or no chart; the message says what to do."""


@dataclass(frozen=True)
class Helm:
    """One release in one namespace. `values`: files, the last wins; `sets`: KEY=VALUE, after all files."""

    binary: str
    release: str
    namespace: str
    context: str | None = None
    values: Sequence[Path] = ()
    sets: Sequence[str] = ()

    @classmethod
    def find(cls, name: str, **fields: Any) -> "Helm":
        """The binary `name` of the path.

        Raises:
            HelmSetupError: it is not there, or a values file is not.
        """
        binary = shutil.which(name)
        if binary is None:
            raise HelmSetupError(
                f"there is no {name} on the path: install Helm 3 or 4 (https://helm.sh/docs/intro/install), or name it with --helm"
            )
        helm = cls(binary, **fields)
        for file in helm.values:
            if not file.is_file():
                raise HelmSetupError(f"there is no values file {file}: helm/altiplano/values-gpu.yaml is one to begin with")
        return helm

    def upgrade_command(self, chart: str, timeout: str) -> list[str]:
        """`helm upgrade --install …`: a new release, or a new revision of the one that is there."""
        return [self.binary, "upgrade", "--install", self.release, chart, "--timeout", timeout, *self._where(), *self._what()]

    def operator_command(self, version: str, namespace: str) -> list[str]:
        """KubeRay's operator from its own repository. It serves the whole cluster."""
        chart, repository = OPERATOR_CHART
        place = ["--namespace", namespace, "--create-namespace", *self._context()]
        return [
            self.binary,
            "upgrade",
            "--install",
            chart,
            chart,
            "--repo",
            repository,
            "--version",
            version,
            *place,
            "--wait",
            "--timeout",
            "5m",
        ]

    def plan(self, chart: str, kubernetes: str) -> list[Plan]:
        """What an upgrade to `chart` with these values would change. `kubernetes`: the server's version.

        Raises:
            HelmError: the values cannot work; the chart names the key.
        """
        return plan_all(self._installed(), self._rendered(chart, kubernetes))

    def build_dependencies(self, chart: str) -> None:
        """Fetch subcharts that a chart of a checkout names and does not have yet."""
        folder = Path(chart)
        if (
            folder.is_dir()
            and not (folder / "charts").is_dir()
            and "dependencies" in yaml.safe_load((folder / "Chart.yaml").read_text())
        ):
            self._run("dependency", "build", chart, timeout_s=DEPENDENCY_TIMEOUT_S)

    def run(self, command: Sequence[str]) -> None:
        """A command, with its output where the user sees it. Returns when it is done.

        Raises:
            HelmError: it failed.
        """
        done = subprocess.run(command, check=False)
        if done.returncode:
            raise HelmError(f"helm ended with code {done.returncode}: `altiplano cluster doctor` looks at what is there now")

    def _installed(self) -> list[Object]:
        if self.release not in {
            entry["name"] for entry in json.loads(self._run("list", "--all", "--output", "json", *self._where()))
        }:
            return []
        return _objects(self._run("get", "manifest", self.release, *self._where()))

    def _rendered(self, chart: str, kubernetes: str) -> list[Object]:
        return _objects(self._run("template", self.release, chart, "--kube-version", kubernetes, *self._where(), *self._what()))

    def _run(self, *arguments: str, timeout_s: float = QUICK_TIMEOUT_S) -> str:
        try:
            done = subprocess.run([self.binary, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise HelmError(
                f"helm {arguments[0]} has not ended after {timeout_s:.0f} s: does the cluster answer (`kubectl cluster-info`)?"
            ) from error
        if done.returncode:
            raise HelmError(f"helm {arguments[0]}: {done.stderr.strip().removeprefix('Error: ')}")
        return done.stdout

    def _where(self) -> list[str]:
        return ["--namespace", self.namespace, *self._context()]

    def _context(self) -> list[str]:
        return ["--kube-context", self.context] if self.context else []

    def _what(self) -> list[str]:
        return [
            *(word for file in self.values for word in ("-f", str(file))),
            *(word for one in self.sets for word in ("--set", one)),
        ]


def chart_place(named: str | None) -> str:
    """The chart that was named, or that of the checkout.

    Raises:
        HelmSetupError: none was named, and there is no checkout.
    """
    if named is not None:
        return named
    if not CHART.is_dir():
        raise HelmSetupError("the chart is not in an installed package: give its directory, .tgz or oci:// address with --chart")
    return str(CHART)


def _objects(text: str) -> list[Object]:
    """What stays: hooks come and go with each upgrade."""
    found = [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]
    return [manifest for manifest in found if "helm.sh/hook" not in (manifest["metadata"].get("annotations") or {})]
