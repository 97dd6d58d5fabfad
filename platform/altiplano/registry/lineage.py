"""What a model was made from: complete, or it is not promoted."""

import platform
import subprocess
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("altiplano", "torch", "transformers", "peft", "trl", "ray", "mlflow")
# May be empty without leaving a gap: a local base has no revision, a source tree may have no git.
OPTIONAL = {"base_revision", "git_sha", "git_dirty", "verdict"}


@dataclass(frozen=True)
class Lineage:
    """Digests are sha256 in hex."""

    config_digest: str
    base_model: str
    base_digest: str
    base_revision: str | None
    dataset_digests: dict[str, str]
    template_digest: str
    date_string: str
    mask_policy: str
    seed: int
    world_sizes: list[int]
    tokens_seen: int
    adapter_digest: str
    run_ids: dict[str, str]
    verdict: str
    git_sha: str | None = None
    git_dirty: bool | None = None
    packages: dict[str, str] = field(default_factory=dict)
    python: str = ""

    @classmethod
    def gather(cls, **facts: Any) -> "Lineage":
        """A lineage with what this process can tell by itself: versions and the state of the source tree."""
        sha, dirty = _git()
        return cls(**facts, git_sha=sha, git_dirty=dirty, packages=_versions(), python=platform.python_version())

    def missing(self) -> list[str]:
        """Names of the facts that are empty."""
        return [name for name, value in asdict(self).items() if name not in OPTIONAL and value in (None, "", [], {})]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def card(self, name: str, version_number: str) -> str:
        """A model card in markdown."""
        packages = ", ".join(f"{package} {number}" for package, number in self.packages.items())
        return "\n".join(
            (
                f"# {name} version {version_number}",
                "",
                f"A LoRA adapter for `{self.base_model}`, made by Altiplano. Gate: **{self.verdict}**.",
                "",
                "| fact | value |",
                "|---|---|",
                *(f"| {key} | `{value}` |" for key, value in self.to_dict().items() if key not in ("packages", "run_ids")),
                f"| packages | {packages} |",
                "",
                f"The prompt format is Llama 3.2's with the date `{self.date_string}`; serve it with the same template digest.",
                "",
            )
        )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # a worker image may lack a package that this stage does not use
    return found


def _git() -> tuple[str | None, bool | None]:
    try:
        sha = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None, None
    return sha, bool(status.strip())
