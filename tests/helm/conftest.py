"""Fixtures of the chart's tests. What cannot be had is named in the reason of a skip; nothing passes without having run."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from support import charts, crds


@pytest.fixture(scope="session")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chart, ready to render."""
    return charts.working_copy(tmp_path_factory.mktemp("chart"))


@pytest.fixture(scope="session")
def helm4() -> charts.Helm4:
    """Helm 4."""
    return charts.Helm4()


@pytest.fixture(scope="session")
def helm3() -> charts.Helm3:
    """Helm 3."""
    helm = charts.Helm3.find()
    if helm is None:
        pytest.skip("no Helm 3: `make test-helm` fetches it, or set HELM3 to the binary")
    return helm


@pytest.fixture(scope="session")
def crd_folder() -> Path:
    """Upstream's CRD files."""
    found = crds.folder()
    if found is None:
        pytest.skip(
            "no CRD files: set ALTIPLANO_CRDS to a folder laid out as tests/helm/crds.json says, or run `make crds` where a network is"
        )
    return found
