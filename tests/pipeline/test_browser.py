"""MLflow's page with three experiments in a real browser.

Run with `make test-browser`; screenshots are saved in $GPTJ8_SCREENSHOTS. docs/compare.png shows
the charts after `make repro` and `make compare`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.browser import chromium
from tests.helpers.project_clone import STAGES, Clone
from tests.helpers.servers import free_port

pytestmark = pytest.mark.browser

SECONDS = 120  # timeout; the machine may be busy
EXPERIMENTS = {
    "rows-lora-r8": ["repro"],
    "rank-2": ["exp", "run", "-n", "rank-2", "-S", "finetune.r=2"],
    "norms": ["exp", "run", "-n", "norms", "-S", "finetune.r=8", "-S", "finetune.method=layernorm"],
}


@contextmanager
def user_interface(project: Path) -> Iterator[str]:
    """Start `gptj8 ui` as a user does, and yield the URL that it prints."""
    command = [sys.executable, "-m", "gptj8.commands.main", "ui", "--port", str(free_port())]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with subprocess.Popen(
        command, cwd=project, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            line = process.stdout.readline()
            assert re.fullmatch(
                r"gptj8: http://127\.0\.0\.1:\d+/#/\S+ \(press Ctrl\+C to stop\)\n", line
            )
            yield line.split()[1]
        finally:
            process.terminate()
            output = process.communicate(timeout=60)
    assert output == ("", "")  # nothing else is printed


class Browser:
    """Open pages of the user interface and record external and failed requests."""

    def __init__(self, context, address: str, folder: Path) -> None:
        self.address, self.folder = address, folder
        self.root = address.partition("#")[0]
        self.outside: list[str] = []
        self.failed: list[str] = []
        self._context = context

    def open(self, path: str, *texts: str):
        """Open a new page and wait until it shows all of `texts`."""
        for earlier in self._context.pages:  # open pages keep sending requests and drawing
            earlier.close()
        page = self._context.new_page()
        page.set_default_timeout(SECONDS * 1000)
        page.on("request", lambda request: self._note(request.url))
        page.on("response", lambda response: self._judge(response))
        page.goto(path if path.startswith("http") else f"{self.root}#{path}")
        self.expect(page, *texts)
        return page

    def expect(self, page, *texts: str) -> str:
        """Wait for texts; return the page's text with whitespace collapsed to single spaces."""
        for text in texts:
            script = r"text => document.body.innerText.replace(/\s+/g, ' ').includes(text)"
            page.wait_for_function(script, arg=text)
        shown = " ".join(page.inner_text("body").split())
        for problem in ("Something went wrong", "Error loading", "Page not found", "Failed to"):
            assert problem not in shown
        return shown

    def picture(self, page, name: str) -> Path:
        file = self.folder / f"{name}.png"
        page.wait_for_timeout(1500)  # charts are drawn after their elements appear
        page.screenshot(path=file)
        return file

    def _note(self, url: str) -> None:
        if not url.startswith((self.root, "data:", "blob:", "about:")):
            self.outside.append(url)

    def _judge(self, response) -> None:
        # A server without accounts has no current user.
        if response.status >= 400 and not response.url.endswith("/users/current"):
            self.failed.append(f"{response.status} {response.url}")


@contextmanager
def opened(address: str, folder: Path) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium())
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        # MLflow's assistant opens on the first page unless this is set.
        context.add_init_script(
            "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"
        )
        yield Browser(context, address, folder)
        browser.close()


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model_dir) -> Path:
    chromium()  # fail before minutes of training
    clone = Clone(tmp_path_factory.mktemp("clone") / "project", tiny_model_dir)
    clone.edit_params(finetune={"learning_rate": 0.01, "num_train_epochs": 3})
    clone.git("commit", "-aqm", "learns")
    for arguments in EXPERIMENTS.values():
        process = clone.dvc(*arguments)
        assert process.returncode == 0, process.stdout + process.stderr
    return clone.folder


@pytest.fixture(scope="module")
def recorded(project):
    """The recorded runs by name, read with an MLflow client."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("gptj8")
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(found) == set(EXPERIMENTS)
    return found


@pytest.fixture(scope="module")
def browser(project, tmp_path_factory):
    pictures = os.environ.get("GPTJ8_SCREENSHOTS")
    folder = Path(pictures) if pictures else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    with user_interface(project) as address, opened(address, folder) as browser:
        yield browser
    assert browser.outside == []  # no external resources, no telemetry
    assert browser.failed == []


def page_of(run, tab: str = "") -> str:
    return f"/experiments/{run.info.experiment_id}/runs/{run.info.run_id}{tab}"


def test_run_table_shows_key_columns(browser, recorded):
    page = browser.open(browser.address, "rank-2", "Key metrics", "Model training")
    shown = browser.expect(page, "evaluate/tuned/accuracy", "finetune.r=2", "finetune.method=")
    browser.picture(page, "runs")
    assert "Agent versions" not in shown  # the page for models, not the one for agents
    assert "Fine-tuning on frozen 8-bit weights" in shown
    for run in recorded.values():
        assert f"{run.data.metrics['evaluate/tuned/accuracy']:.4f}"[:5].rstrip("0") in shown


def test_charts_start_with_key_metrics_and_differences(browser, recorded):
    page = browser.open(
        f"{browser.address}&compareRunsMode=CHART", "Key metrics (7)", "finetune/loss"
    )
    page.set_viewport_size({"width": 1440, "height": 1400})
    shown = browser.expect(page, "Show differences only", "finetune.method")
    browser.picture(page, "charts")
    charts = shown.partition("Key metrics (7)")[2]
    assert charts.index("evaluate/tuned/accuracy") < charts.index("Model metrics (")


def test_comparison_shows_differing_params_and_metrics(browser, recorded):
    runs = json.dumps([recorded[name].info.run_id for name in EXPERIMENTS])
    experiment = recorded["norms"].info.experiment_id
    path = f'/compare-runs?runs={runs}&experiments=["{experiment}"]'
    page = browser.open(path.replace('"', "%22"), "Comparing 3 Runs", "convert/parameters")
    browser.picture(page, "comparison")
    page.get_by_role("switch", name="Parameters - Show diff only").click()
    rows = [re.split(r"\s*\t\s*|\n+", row.inner_text().strip()) for row in page.locator("tr").all()]
    cells = {row[0].rstrip(":"): row[1:] for row in rows if len(row) == 4}
    assert {name for name in cells if "." in name and not name.startswith("gptj8")} >= {
        "finetune.r", "finetune.method"
    }  # fmt: skip
    assert "finetune.learning_rate" not in cells  # equal in all runs, so not shown
    shown = {
        name: dict(zip(cells["Run Name"], values, strict=True)) for name, values in cells.items()
    }
    assert shown["finetune.r"] == {"rows-lora-r8": "8", "rank-2": "2", "norms": "8"}
    assert shown["finetune.method"] == {
        "rows-lora-r8": "lora", "rank-2": "lora", "norms": "layernorm"
    }  # fmt: skip
    for metric in ("evaluate/tuned/accuracy", "evaluate/tuned/perplexity"):
        values = dict(zip(cells["Run Name"], scrolled_to(page, metric), strict=True))
        expected = {name: recorded[name].data.metrics[metric] for name in EXPERIMENTS}
        assert values == pytest.approx(expected, rel=1e-3)
    browser.picture(page, "comparison_of_metrics")


def scrolled_to(page, metric: str) -> list[float]:
    """Scroll to a metric in the virtualized table, which renders only visible rows.

    Return the metric's values.
    """
    name = page.get_by_text(metric, exact=True)
    page.locator(".ReactVirtualized__Grid").last.hover()  # the names scroll with the values
    for _ in range(100):
        if name.count():
            break
        page.mouse.wheel(0, 200)
        page.wait_for_timeout(50)
    page.wait_for_timeout(500)
    page.mouse.wheel(0, 10)  # the names lag one event behind the values
    page.wait_for_timeout(500)
    cells = page.locator(".ReactVirtualized__Grid__innerScrollContainer > *").evaluate_all(
        "cells => cells.map(cell => [cell.getBoundingClientRect().top, cell.innerText])"
    )
    (height,) = (top for top, text in cells if text == metric)
    return [float(text) for top, text in cells if abs(top - height) < 15 and text != metric]


def test_run_page_shows_results_and_command(browser, recorded):
    run = recorded["rank-2"]
    page = browser.open(page_of(run), "Description", "accuracy after: fine-tuned")
    shown = browser.expect(page, "rows.csv")
    browser.picture(page, "run")
    before, after = (run.data.metrics[f"evaluate/{s}/accuracy"] for s in ("base", "tuned"))
    assert f"Accuracy {before:.1%} → {after:.1%}" in shown
    assert "Changed: finetune.r=2" in shown
    assert "dvc exp run -S finetune.r=2" in shown


def test_models_page_lists_the_exports(browser, recorded):
    experiment = recorded["norms"].info.experiment_id
    path = f"/experiments/{experiment}/models?workflowType=machine_learning"
    page = browser.open(path, "Ready", *EXPERIMENTS)
    browser.picture(page, "models")


def test_training_curves_are_drawn(browser, recorded):
    page = browser.open(page_of(recorded["rank-2"], "/model-metrics"), "convert (")
    page.get_by_placeholder("Search metric charts").fill("finetune/loss")
    page.locator(".js-plotly-plot .scatterlayer .trace").first.wait_for()
    browser.picture(page, "curves")


def test_system_metrics_have_a_time_axis(browser, recorded):
    page = browser.open(
        page_of(recorded["rank-2"], "/system-metrics"), "cpu_utilization_percentage"
    )
    browser.expect(page, "Time")
    browser.picture(page, "system")


@pytest.mark.parametrize(
    ("file", "texts"),
    [
        ("predictions.json", ["View as table", "baseline", "animals"]),
        ("reports/evaluate/predictions.csv", ["baseline", "animals"]),
        ("export/README.md", ["lora adapter for tiny"]),
        ("lineage/requirements.txt", ["mlflow=="]),
    ],
    ids=str,
)
def test_artifacts_are_shown_in_page(browser, recorded, file, texts):
    page = browser.open(page_of(recorded["rank-2"], f"/artifacts/{file}"), Path(file).name, *texts)
    browser.picture(page, Path(file).name.replace(".", "_"))


def test_dataset_report_is_shown_in_page(browser, recorded):
    run = recorded["rows-lora-r8"]
    assert all(f"stage.{stage}" in run.data.tags for stage in STAGES)
    page = browser.open(page_of(run, "/artifacts/reports/validate/report.html"), "report.html")
    page.frame_locator("iframe").get_by_text("240").first.wait_for()
    browser.picture(page, "report")
