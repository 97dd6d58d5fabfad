"""The commands of docs/install.md: as much of them as can be checked without a cluster."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from support import charts
from support.charts import ROOT, Values, merged
from typer.main import get_command

from altiplano.cli.app import app

INSTALL = (ROOT / "docs" / "install.md").read_text()
PAGES = [
    ROOT / "docs" / "install.md",
    ROOT / "docs" / "kubernetes.md",
    ROOT / "k8s" / "README.md",
    *sorted((ROOT / "docs" / "runbooks").glob("*.md")),
]


def _blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", INSTALL, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def _commands() -> list[list[str]]:
    """Every command of the page, with continued lines joined."""
    lines = [line for block in _blocks("") for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return [shlex.split(line) for line in lines]


def _ours() -> list[list[str]]:
    return [
        command
        for command in _commands()
        if command[:2] in (["helm", "install"], ["helm", "upgrade"]) and "helm/altiplano" in command
    ]


def _set(command: list[str]) -> Values:
    values: Values = {}
    for assignment in (command[i + 1] for i, word in enumerate(command) if word == "--set"):
        path, _, text = assignment.partition("=")
        nested: Values = yaml.safe_load(text)
        for key in reversed(path.split(".")):
            nested = {key: nested}
        values = merged(values, nested)
    return values


@pytest.mark.parametrize("command", _ours(), ids=lambda command: shlex.join(command)[:100])
def test_what_is_installed_renders(chart: Path, helm4: charts.Helm4, command: list[str]) -> None:
    file = command[command.index("-f") + 1]
    # The reader's own file begins as a copy of values-gpu.yaml.
    values = charts.values_file("values-gpu.yaml") if file == "my-values.yaml" else yaml.safe_load((ROOT / file).read_text())
    assert helm4.template(chart, merged(values, _set(command)), release=command[2])


def test_names_are_those_of_the_release(chart: Path, helm4: charts.Helm4) -> None:
    values = merged(charts.values_file("values-gpu.yaml"), {"backup": {"enabled": True}})
    names = {o["metadata"]["name"] for o in helm4.template(chart, values, release="altiplano")}
    # Made by the operator, by its own rules.
    names |= {
        "altiplano-jobs",
        "altiplano-jobs-head-svc",
        "altiplano-endpoint-serve-svc",
        "altiplano-secrets",
        "hub",
        "backup-now",
    }
    said = set(re.findall(r"(?:svc/|cronjob/|deployment |rayservice |get secret )(altiplano[\w-]*)", INSTALL))
    assert said
    assert said <= names


def test_the_secret_has_every_key_that_the_chart_reads(chart: Path, helm4: charts.Helm4) -> None:
    text = yaml.safe_dump(helm4.template(chart, {"backup": {"enabled": True}, "monitoring": {"podMonitor": {"enabled": True}}}))
    read = set(re.findall(r"key: ([\w.-]+)\n\s+name: altiplano-secrets", text)) | {"api-keys.json"}
    (made,) = [
        command
        for command in _commands()
        if command[:7] == shlex.split("kubectl -n altiplano create secret generic altiplano-secrets")
    ]
    given = {word.split("=")[1] for word in made if word.startswith(("--from-literal=", "--from-file="))}
    assert read == given


@pytest.mark.parametrize("command", [c for c in _commands() if c[0] == "altiplano"], ids=shlex.join)
def test_our_own_commands_exist(command: list[str], tmp_path: Path) -> None:
    words = [word if not word.endswith(".json") else str(tmp_path / "keys.json") for word in command[1:]]
    get_command(app).main(words, standalone_mode=False)
    assert (tmp_path / "keys.json").exists()


def test_files_that_are_named_exist() -> None:
    for name in re.findall(r"`((?:helm|k8s|docs|pipelines)/[\w./-]+)`", INSTALL):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        if anchor:
            headings = {
                re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in linked.read_text().splitlines()
                if line.startswith("#")
            }
            assert anchor in headings, target


def test_values_that_pages_name_exist(chart: Path) -> None:
    values = yaml.safe_load((chart / "values.yaml").read_text())
    sections = "|".join(re.escape(name) for name in values)
    for page in PAGES:
        for path in re.findall(rf"`((?:{sections})(?:\.\w+)+)(?:[:=` ])", page.read_text()):
            place = values
            for key in path.split("."):
                assert key in place, f"{page.name}: {path}"
                place = place[key]


def test_the_shell_can_read_the_page() -> None:
    for block in _blocks(""):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True, timeout=120)


def test_values_on_the_page_render(chart: Path, helm4: charts.Helm4) -> None:
    blocks = _blocks("yaml")
    assert blocks
    for block in blocks:
        assert helm4.template(chart, yaml.safe_load(block))
