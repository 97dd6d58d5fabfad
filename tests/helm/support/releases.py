"""Install, upgrade, roll back and uninstall with real Helms, against the stand-in API server."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Protocol

import helm_python
import yaml

from .charts import NAMESPACE, RELEASE, Helm3, RefusedError, Values
from .fake_kubernetes import Cluster


class Releases(Protocol):
    """The life of one release."""

    def install(self, values: Values) -> None:
        """`helm install`. Raises RefusedError."""

    def upgrade(self, values: Values) -> None:
        """`helm upgrade`. Raises RefusedError."""

    def rollback(self) -> None:
        """`helm rollback` to the revision before."""

    def uninstall(self) -> None:
        """`helm uninstall`."""


def kubeconfig(cluster: Cluster) -> str:
    """How to reach the stand-in."""
    context = {"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": NAMESPACE}}
    clusters, users = [{"name": "fake", "cluster": {"server": cluster.url}}], [{"name": "fake", "user": {}}]
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "contexts": [context],
            "clusters": clusters,
            "users": users,
        }
    )


class Releases4:
    """Helm 4. Its releases are kept in memory: it stores them in protobuf, which the stand-in does not speak."""

    def __init__(self, chart: Path, cluster: Cluster) -> None:
        self._chart = chart
        self._config = helm_python.Config(
            kubeconfig_content=kubeconfig(cluster), namespace=NAMESPACE, storage_driver="memory", qps=1000, burst_limit=1000
        )

    def install(self, values: Values) -> None:
        self._explained(self._config.install, self._chart, RELEASE, values, timeout=300)

    def upgrade(self, values: Values) -> None:
        self._explained(self._config.upgrade, self._chart, RELEASE, values, timeout=300)

    def rollback(self) -> None:
        self._explained(self._config.rollback, RELEASE, timeout=300)

    def uninstall(self) -> None:
        self._explained(self._config.uninstall, RELEASE, timeout=300)

    @staticmethod
    def _explained(action: Any, *arguments: Any, **options: Any) -> None:
        try:
            action(*arguments, **options)
        except helm_python.HelmError as error:
            raise RefusedError(str(error)) from error


class Releases3:
    """Helm 3."""

    def __init__(self, chart: Path, cluster: Cluster, helm: Helm3, directory: Path) -> None:
        self._chart, self._helm = chart, helm
        file = directory / "kubeconfig"
        file.touch(mode=0o600)
        file.write_text(kubeconfig(cluster))
        self._environment = {**os.environ, "KUBECONFIG": str(file), "HOME": str(directory)}

    def install(self, values: Values) -> None:
        self._run("install", RELEASE, str(self._chart), "-f", "-", "--timeout", "300s", values=values)

    def upgrade(self, values: Values) -> None:
        self._run("upgrade", RELEASE, str(self._chart), "-f", "-", "--timeout", "300s", values=values)

    def rollback(self) -> None:
        self._run("rollback", RELEASE, "--timeout", "300s")

    def uninstall(self) -> None:
        self._run("uninstall", RELEASE, "--timeout", "300s")

    def _run(self, *arguments: str, values: Values | None = None) -> None:
        text = json.dumps(values or {})
        done = subprocess.run(
            [self._helm.binary, *arguments, "-n", NAMESPACE],
            input=text,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if done.returncode:
            raise RefusedError(done.stderr)
