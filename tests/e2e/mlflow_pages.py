"""What a person sees in MLflow's own pages, through a real browser.

python tests/e2e/mlflow_pages.py URI EXPERIMENT MODEL DIRECTORY   # the pictures of docs/images
"""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from playwright.sync_api import sync_playwright

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SHOWN = "texts => texts.every(text => document.body.innerText.includes(text))"
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]


@dataclass(frozen=True)
class Seen:
    """Texts of the run tree and of the registered model's page."""

    runs: str
    model: str


def look(
    uri: str, experiment: str, model: str, pictures: Path, of_runs: Sequence[str] = (), of_model: Sequence[str] = ()
) -> Seen:
    """Open both pages, wait until the newest run and version, and all of these texts, are shown; keep pictures."""
    found = MlflowClient(uri).get_experiment_by_name(experiment)
    assert found is not None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET, chromium_sandbox=os.geteuid() != 0)
        page = browser.new_page(viewport={"width": 1400, "height": 860}, reduced_motion="reduce")
        page.set_default_timeout(90_000)
        page.goto(f"{uri}/#/experiments/{found.experiment_id}/runs?viewStateShareKey=&compareRunsMode=TABLE")
        page.get_by_role("button", name="Close").last.click()  # the assistant's panel
        for name in ("pipeline-", "tune"):  # unfold the pipeline, then the sweep below it
            page.locator("[role=gridcell]", has_text=name).locator("button:has(svg)").first.click()
            page.locator("[role=gridcell]", has_text="trial-" if name == "tune" else "tune").first.wait_for()
        page.wait_for_function(SHOWN, arg=list(of_runs))
        page.screenshot(path=pictures / "mlflow-runs.png")
        runs = page.inner_text("body")
        page.goto(f"{uri}/#/models/{model}")
        page.get_by_text("Version 1").first.wait_for()
        page.wait_for_function(SHOWN, arg=list(of_model))
        page.screenshot(path=pictures / "mlflow-model.png")
        seen = Seen(runs, page.inner_text("body"))
        browser.close()
    return seen


if __name__ == "__main__":
    print(look(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])))
