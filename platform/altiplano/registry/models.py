"""Registered models: versions with lineage, and the aliases champion, challenger and previous."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import mlflow.artifacts
from mlflow.entities.model_registry import ModelVersion as MlflowVersion
from mlflow.exceptions import MlflowException

from altiplano.models.manifest import verify_manifest
from altiplano.registry.lineage import Lineage
from altiplano.registry.spool import client

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
T = TypeVar("T")


class RegistryUnavailableError(RuntimeError):
    """MLflow does not answer."""

    exit_code = 4


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model."""

    name: str
    version: int
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    run_id: str | None


class ModelRegistry:
    """Adapters in MLflow's registry. Every call raises RegistryUnavailableError when the server is away: at once when nobody listens,
    within about a minute when it says nothing."""

    def __init__(self, tracking_uri: str) -> None:
        self._uri, self._client = tracking_uri, client(tracking_uri)

    def register(
        self, adapter: Path, name: str, run_id: str, lineage: Lineage, *, tags: Mapping[str, str], params: Mapping[str, Any]
    ) -> int:
        """Upload `adapter` with its lineage and card as a new version of `name`; the same bytes stay one version, with the newest `tags`."""
        digest = verify_manifest(adapter)
        for known in self.versions(name):
            if known.tags.get("adapter_digest") == digest:
                for key, value in tags.items():
                    self._call(partial(self._client.set_model_version_tag, name, str(known.version), key, value))
                return known.version
        return self._call(lambda: self._upload(adapter, name, run_id, lineage, {**tags, "adapter_digest": digest}, params))

    def get(self, name: str, alias: str) -> ModelVersion | None:
        """The version behind an alias, or None."""
        try:
            found = self._call(lambda: self._client.get_model_version_by_alias(name, alias))
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return self._version(found, (alias,))

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions, the newest first; empty for an unknown name."""
        found = self._call(lambda: self._client.search_model_versions(f"name = '{name}'"))
        aliases: dict[int, list[str]] = {}
        if found:
            for alias, version in self._call(lambda: self._client.get_registered_model(name)).aliases.items():
                aliases.setdefault(int(version), []).append(alias)
        made = [self._version(v, tuple(sorted(aliases.get(int(v.version), [])))) for v in found]
        return sorted(made, key=lambda v: -v.version)

    def names(self) -> list[str]:
        return [model.name for model in self._call(self._client.search_registered_models)]

    def set_alias(self, name: str, alias: str, version: int) -> None:
        self._call(lambda: self._client.set_registered_model_alias(name, alias, str(version)))

    def tag(self, name: str, version: int, key: str, value: str) -> None:
        self._call(lambda: self._client.set_model_version_tag(name, str(version), key, value))

    def promote(self, name: str, version: int) -> None:
        """Make `version` the champion and the old champion `previous`. Previous first: a crash between leaves the champion in place."""
        champion = self.get(name, CHAMPION)
        if champion is not None and champion.version == version:
            return
        if champion is not None:
            self.set_alias(name, PREVIOUS, champion.version)
        self.set_alias(name, CHAMPION, version)
        challenger = self.get(name, CHALLENGER)
        if challenger is not None and challenger.version == version:
            self._call(lambda: self._client.delete_registered_model_alias(name, CHALLENGER))

    def rollback(self, name: str) -> int:
        """Make the previous champion the champion again; returns its version.

        Raises:
            ValueError: there is none.
        """
        previous = self.get(name, PREVIOUS)
        if previous is None:
            raise ValueError(f"{name} has no previous champion to go back to")
        champion = self.get(name, CHAMPION)
        self.set_alias(name, CHAMPION, previous.version)
        if champion is not None:
            self.set_alias(name, PREVIOUS, champion.version)
        return previous.version

    def download(self, name: str, version: int, destination: Path) -> Path:
        """The adapter of a version in `destination`, every byte checked.

        Raises:
            ManifestError: the registry's copy is damaged.
        """
        scratch = Path(tempfile.mkdtemp(prefix="altiplano-download-"))
        try:
            place = self._place(name, version)
            found = self._call(lambda: mlflow.artifacts.download_artifacts(place, dst_path=str(scratch), tracking_uri=self._uri))
            adapter = Path(found) / "adapter"
            verify_manifest(adapter)
            shutil.rmtree(destination, ignore_errors=True)
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(adapter, destination)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return destination

    def lineage(self, name: str, version: int) -> dict[str, Any]:
        """What a version was made from: the fields of `Lineage`."""
        with tempfile.TemporaryDirectory(prefix="altiplano-lineage-") as folder:
            uri = f"{self._place(name, version)}/lineage.json"
            found = self._call(lambda: mlflow.artifacts.download_artifacts(uri, dst_path=folder, tracking_uri=self._uri))
            facts: dict[str, Any] = json.loads(Path(found).read_text())
        return facts

    def _place(self, name: str, version: int) -> str:
        """The URI of a version's files. Any models:/ URI would be looked up on MLflow's process-wide server."""
        model_id = str(self._call(lambda: self._client.get_model_version(name, str(version))).source).removeprefix("models:/")
        return str(self._call(lambda: self._client.get_logged_model(model_id)).artifact_location)

    def _upload(
        self, adapter: Path, name: str, run_id: str, lineage: Lineage, tags: Mapping[str, str], params: Mapping[str, Any]
    ) -> int:
        experiment = self._client.get_run(run_id).info.experiment_id
        model = self._client.create_logged_model(
            experiment, name=name, source_run_id=run_id, params={k: str(v) for k, v in params.items()}, model_type="lora"
        )
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(adapter, Path(folder) / "adapter")
            (Path(folder) / "lineage.json").write_text(json.dumps(lineage.to_dict(), indent=1))
            (Path(folder) / "README.md").write_text(lineage.card(name, "of run " + run_id))
            self._client.log_model_artifacts(model.model_id, folder)
        self._client.finalize_logged_model(model.model_id, "READY")
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        made = self._client.create_model_version(
            name,
            source=f"models:/{model.model_id}",
            run_id=run_id,
            model_id=model.model_id,
            tags=dict(tags),
            description=tags.get("summary"),
        )
        return int(made.version)

    def _version(self, found: MlflowVersion, aliases: tuple[str, ...]) -> ModelVersion:
        return ModelVersion(found.name, int(found.version), aliases, dict(found.tags), found.run_id)

    def _call(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except MlflowException as error:
            if error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE") or "Max retries" in str(error):
                raise RegistryUnavailableError(
                    f"MLflow at {self._uri} does not answer ({error}): start it and run the same command again"
                ) from error
            raise
        except OSError as error:
            raise RegistryUnavailableError(
                f"MLflow at {self._uri} does not answer ({error}): start it and run the same command again"
            ) from error
