"""Checkpoints that are whole, or not used."""

import shutil
from pathlib import Path

from altiplano.models.manifest import ManifestError, verify_manifest, write_manifest

PREFIX = "step-"
# What a served adapter needs of a checkpoint; the rest is for going on with training.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def newest_valid(run_dir: Path) -> Path | None:
    """The youngest checkpoint under `run_dir` whose every byte is as written; damaged ones are passed over."""
    for candidate in sorted(run_dir.glob(f"{PREFIX}*"), reverse=True):
        try:
            verify_manifest(candidate)
        except ManifestError as error:
            print(f"checkpoint {candidate.name} is not used: {error}", flush=True)
            continue
        return candidate
    return None


def extract_adapter(checkpoint: Path, destination: Path) -> Path:
    """The adapter alone, with a manifest of its own, in `destination` (replaced whole)."""
    verify_manifest(checkpoint)
    scratch = destination.with_name(destination.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for name in ADAPTER_FILES:
        shutil.copyfile(checkpoint / name, scratch / name)
    write_manifest(scratch)
    shutil.rmtree(destination, ignore_errors=True)
    scratch.rename(destination)
    return destination
