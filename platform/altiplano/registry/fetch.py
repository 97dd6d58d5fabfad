"""`python -m altiplano.registry.fetch`: a registered adapter into a directory, by a job inside the cluster that reaches both.

Prints one line of JSON as its last: name, version, path.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from altiplano.models.manifest import ManifestError, verify_manifest
from altiplano.registry.models import ModelRegistry, ModelVersion


def resolve(registry: ModelRegistry, name: str, alias: str, version: int | None) -> ModelVersion:
    """The version behind `alias`, or `version` itself.

    Raises:
        ValueError: there is none, or the gate has rejected it.
        RegistryUnavailableError: MLflow does not answer.
    """
    if version is None:
        found = registry.get(name, alias)
        if found is None:
            raise ValueError(f"{name} has no version with the alias {alias}: `altiplano models {name}` shows what there is")
        version = found.version
    known = {one.version: one for one in registry.versions(name)}
    if version not in known:
        raise ValueError(f"{name} has no version {version}: choose one of {', '.join(map(str, sorted(known))) or 'none'}")
    if known[version].tags.get("gate") == "reject":
        raise ValueError(f"the gate has rejected version {version} of {name}: see `altiplano models {name}`")
    return known[version]


def fetch(registry: ModelRegistry, wanted: ModelVersion, directory: Path) -> Path:
    """The adapter as `directory`/NAME-VERSION. What is there already and whole stays: replicas may read it.

    Raises:
        ManifestError: the registry's copy is damaged.
    """
    path = directory / f"{wanted.name}-{wanted.version}"
    try:
        if verify_manifest(path) == wanted.tags.get("adapter_digest"):
            return path
    except (ManifestError, OSError):
        pass  # not there, or half of it
    return registry.download(wanted.name, wanted.version, path)


def main() -> int:
    """Entry point of the job."""
    parser = argparse.ArgumentParser(prog="python -m altiplano.registry.fetch")
    parser.add_argument("name")
    parser.add_argument("--alias", default="champion")
    parser.add_argument("--version", type=int)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--look-only", action="store_true", help="say what would be fetched")
    arguments = parser.parse_args()
    try:
        registry = ModelRegistry(os.environ["MLFLOW_TRACKING_URI"])
        wanted = resolve(registry, arguments.name, arguments.alias, arguments.version)
        path = arguments.to / f"{wanted.name}-{wanted.version}" if arguments.look_only else fetch(registry, wanted, arguments.to)
    except KeyError:
        print("error: MLFLOW_TRACKING_URI is not set on these pods: give --tracking-uri")
        return 2
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}")
        return getattr(error, "exit_code", 2)
    # On a line of its own, whatever a progress bar has left behind.
    print("\n" + json.dumps({"name": wanted.name, "version": wanted.version, "path": str(path)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
