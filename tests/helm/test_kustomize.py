"""k8s/ is the chart without Helm: the same objects for the same values."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from support import charts, kustomize
from support.charts import Object, Values

BUILDS: dict[str, Values] = {"base": {}} | {f"overlays/{name}": values for name, values in kustomize.OVERLAYS.items()}


def test_the_files_are_what_the_chart_says(chart: Path, helm4: charts.Helm4) -> None:
    wanted = kustomize.files(helm4, chart)
    found = {
        path.relative_to(kustomize.FOLDER).as_posix(): path.read_text()
        for name in ("base", "overlays")
        for path in (kustomize.FOLDER / name).rglob("*")
        if path.is_file()
    }
    assert found.keys() == wanted.keys(), "run `python tests/helm/render_k8s.py`"
    assert [path for path in wanted if wanted[path] != found[path]] == [], "run `python tests/helm/render_k8s.py`"


@pytest.mark.parametrize("folder", BUILDS)
def test_a_build_equals_the_chart(chart: Path, helm4: charts.Helm4, folder: str) -> None:
    assert _sorted(kustomize.build(kustomize.FOLDER / folder)) == _sorted(kustomize.rendered(helm4, chart, BUILDS[folder]))


@pytest.mark.parametrize("folder", BUILDS)
def test_kubectl_builds_the_same(folder: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl: only our own reading of kustomize was tested")
    done = subprocess.run(
        [kubectl, "kustomize", str(kustomize.FOLDER / folder)], capture_output=True, text=True, timeout=300, check=True
    )
    assert _sorted(list(yaml.load_all(done.stdout, yaml.CSafeLoader))) == _sorted(kustomize.build(kustomize.FOLDER / folder))


def _sorted(objects: list[Object]) -> list[Object]:
    return sorted(objects, key=lambda o: (o["kind"], o["metadata"]["name"]))
