"""A directory as one zip that Ray unpacks as the working directory of a job. The same files make the same bytes and the same name."""

import hashlib
import io
import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_BYTES = 100 << 20
# Outside of git there is no list of what belongs to the work.
SKIPPED = {".git", ".venv", "venv", "node_modules", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".altiplano"}
EPOCH = (1980, 1, 1, 0, 0, 0)


class PackageError(ValueError):
    """The directory cannot be sent; the message says what to change."""


@dataclass(frozen=True)
class Package:
    """`data`: the zip; `name`: what Ray's store calls it, made from the content."""

    name: str
    data: bytes

    @classmethod
    def of(cls, directory: Path) -> "Package":
        """
        Raises:
            PackageError: there is no such directory, or it is larger than MAX_BYTES.
        """
        if not directory.is_dir():
            raise PackageError(f"{directory} is no directory: name one with --working-dir")
        files = sorted(_files(directory))
        total = sum(path.stat().st_size for path in files)
        if total > MAX_BYTES:
            largest = max(files, key=lambda path: path.stat().st_size)
            raise PackageError(
                f"{directory} has {total >> 20} MiB to send (limit {MAX_BYTES >> 20}; the largest file is {largest.relative_to(directory)}): "
                "name what does not belong to the job in .gitignore, or put data on /workspace and models on /models"
            )
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in files:
                entry = zipfile.ZipInfo(path.relative_to(directory).as_posix(), EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = (path.stat().st_mode & 0o777) << 16
                archive.writestr(entry, path.read_bytes())
        data = buffer.getvalue()
        return cls(f"_ray_pkg_{hashlib.sha256(data).hexdigest()[:32]}.zip", data)


def _files(directory: Path) -> list[Path]:
    """What git knows or would take; everything but caches where git knows nothing."""
    git = shutil.which("git")
    if git is not None:
        command = [git, "-C", str(directory), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, capture_output=True, check=False)
        found = [directory / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
        if found:
            return [path for path in found if path.is_file()]
    return list(_walked(directory))


def _walked(directory: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if name not in SKIPPED]
        yield from (Path(folder) / name for name in names)
