"""The image, and the machine without Kubernetes: the Dockerfile's rules, and a compose file that says the same as the chart."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from support import charts, pods, serving
from support.charts import ROOT

from altiplano.serve.application import parse

DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())


def test_hadolint_is_silent() -> None:
    binary = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([binary, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_targets_end_as_a_user_that_the_chart_runs(target: str) -> None:
    stage = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    (mine,) = [text for text in stage if re.match(rf"\S+ AS {target}\n", text)]
    values = yaml.safe_load((charts.CHART / "values.yaml").read_text())["podSecurity"]
    assert re.findall(r"^USER (\S+)$", mine, re.MULTILINE) == [f"{values['runAsUser']}:{values['runAsGroup']}"]


def test_kuberays_probes_find_their_tools() -> None:
    assert re.search(r"install -y --no-install-recommends bash ca-certificates wget", DOCKERFILE)


def test_what_is_copied_exists() -> None:
    sources = [
        word
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for word in line.split()[:-1]
        if not word.startswith("--")
    ]
    assert sources
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in kept, f"{source} is not sent to the build"


def test_no_base_floats() -> None:
    bases = re.findall(r"^ARG BASE=(\S+)", DOCKERFILE, re.MULTILINE)
    assert len(bases) == 1, "one base, pinned by one argument"
    assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) == {"${BASE}", "tools", "runtime"}
    assert re.search(r":\d+\.\d+\.\d+-slim-bookworm$", bases[0]), "an exact release"


def test_compose_is_hardened() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "healthcheck" in service, name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), (
            f"{name}: publish through a proxy with TLS"
        )
        assert set(service.get("secrets", [])) <= COMPOSE["secrets"].keys(), name
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            exists = source in COMPOSE["volumes"] or source.startswith("./secrets/") or (ROOT / source).exists()
            assert exists, f"{name}: {source}"


def test_compose_runs_the_charts_images(chart: Path, helm4: charts.Helm4) -> None:
    used = {container["image"] for pod in pods.pods(helm4.template(chart, {})) for container in pods.containers(pod)}
    said = {re.sub(r"\$\{\w+:-(.+)\}", r"\1", service["image"]) for service in COMPOSE["services"].values()}
    assert said <= used


def test_compose_gives_mlflow_what_its_start_reads() -> None:
    script = (charts.CHART / "files" / "start_mlflow.py").read_text()
    needed = set(re.findall(r'environment\["(\w+)"\]', script)) | {
        f"DATABASE_{part}" for part in ("USER", "PASSWORD", "NAME", "HOST", "PORT", "SSLMODE")
    }
    service = COMPOSE["services"]["mlflow"]
    given = service["environment"].keys() | set(
        re.findall(r":(\w+)", service["command"][2].split("for name in ")[1].split(";")[0])
    )
    assert needed <= given


def test_the_charts_mlflow_has_what_its_start_reads(chart: Path, helm4: charts.Helm4) -> None:
    script = (charts.CHART / "files" / "start_mlflow.py").read_text()
    needed = set(re.findall(r'environment\["(\w+)"\]', script)) | {
        f"DATABASE_{part}" for part in ("USER", "PASSWORD", "NAME", "HOST", "PORT", "SSLMODE")
    }
    (deployment,) = charts.of_kind(helm4.template(chart, {}), "Deployment")
    assert needed <= {variable["name"] for variable in deployment["spec"]["template"]["spec"]["containers"][0]["env"]}


def test_compose_serves_what_the_chart_serves(chart: Path) -> None:
    """The generated config for the chart's values with one replica."""
    mine = yaml.safe_load((ROOT / "k8s" / "compose-serve.yaml").read_text())
    ServeDeploySchema.model_validate(mine)
    values = serving.endpoint_values(
        chart, {"endpoint": {"replicas": {"max": 1}, "model": mine["applications"][0]["args"]["model"]}}
    )
    theirs = serving.generated(values)
    (my_application,), (their_application,) = mine["applications"], theirs["applications"]
    assert parse(my_application.pop("args") | {"model": "cria"}) == parse(their_application.pop("args") | {"model": "cria"})
    for field in serving.OF_THE_PLACE:
        my_application["deployments"][0].pop(field, None)
        their_application["deployments"][0].pop(field, None)
    del theirs["controller_options"], their_application["runtime_env"]
    assert mine == theirs
    environment = COMPOSE["services"]["endpoint"]["environment"]
    assert {k: v for k, v in environment.items() if k.startswith("RAY_SERVE_")} == serving.generated_environment(values)
