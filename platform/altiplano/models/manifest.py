"""sha256 manifests: a directory of weights is loaded only if every byte is the one that was written."""

import hashlib
import json
import os
from pathlib import Path

MANIFEST = "manifest.sha256.json"


class ManifestError(ValueError):
    """A file is missing, was changed, or is one that never belongs beside weights."""


def digest_file(path: Path) -> str:
    """sha256 of one file, in hex."""
    sha = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            sha.update(block)
    return sha.hexdigest()


def write_manifest(directory: Path) -> str:
    """Write the manifest of all files under `directory` and return the digest of the whole (hex).

    The manifest itself replaces its predecessor atomically, so a crash leaves the old one or the new one.
    """
    files = {str(p.relative_to(directory)): digest_file(p) for p in _members(directory)}
    text = json.dumps({"version": 1, "files": files}, indent=1, sort_keys=True)
    scratch = directory / (MANIFEST + ".tmp")
    with scratch.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    scratch.replace(directory / MANIFEST)
    return hashlib.sha256(text.encode()).hexdigest()


def verify_manifest(directory: Path) -> str:
    """Check every file of `directory` against its manifest and return the digest of the whole (hex).

    Raises:
        ManifestError: no manifest, a file missing, changed, or present without being listed.
    """
    written = _read(directory)
    try:
        listed: dict[str, str] = json.loads(written)["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{directory / MANIFEST} cannot be read ({error}): use another copy of this directory") from error
    found = {str(p.relative_to(directory)) for p in _members(directory)}
    for name in sorted(set(listed) - found):
        raise ManifestError(f"{directory / name} is missing: the copy is incomplete; copy the directory again")
    for name in sorted(found - set(listed)):
        raise ManifestError(f"{directory / name} is not in {MANIFEST}: remove it, or write the directory again")
    for name, digest in sorted(listed.items()):
        if digest_file(directory / name) != digest:
            raise ManifestError(
                f"{directory / name} does not match its sha256: the file was damaged or changed; use another copy"
            )
    return hashlib.sha256(written).hexdigest()


def manifest_digest(directory: Path) -> str:
    """The digest that `verify_manifest` returns, from the manifest alone.

    Raises:
        ManifestError: no manifest.
    """
    return hashlib.sha256(_read(directory)).hexdigest()


def _read(directory: Path) -> bytes:
    try:
        return (directory / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ManifestError(
            f"{directory} has no {MANIFEST}: it was not written by Altiplano, or the write did not finish; use another copy"
        ) from None


def _members(directory: Path) -> list[Path]:
    return [p for p in sorted(directory.rglob("*")) if p.is_file() and p.name not in (MANIFEST, MANIFEST + ".tmp")]
