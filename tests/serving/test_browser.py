"""The server's page in a real browser: rows, prompts, streams, the token and errors.

Run with `make test-browser`. docs/serving.png shows the page with a model of the
default dataset.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import requests
from playwright.sync_api import expect, sync_playwright

from tests.helpers.browser import chromium
from tests.helpers.served_models import LABELS, held, running, until

pytestmark = pytest.mark.browser

SECONDS = 60  # timeout; the machine may be busy
TOKEN = "open-sesame"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser):
    """Return a page whose console must stay empty, except of rejected requests."""
    found = browser.new_page()
    found.set_default_timeout(1000 * SECONDS)
    expect.set_options(timeout=1000 * SECONDS)
    errors = []
    found.on("pageerror", lambda error: errors.append(str(error)))
    found.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    yield found
    found.close()
    assert [error for error in errors if "status of 4" not in error] == []


def photograph(page, name):
    if folder := os.environ.get("GPTJ8_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / name, full_page=True)


def test_a_row_gets_the_probabilities_of_its_labels(page, predictors):
    row = {"title": "seven wizards", "body": "box with jugs"}
    with running(predictors["columns"]) as (url, _):
        expected = requests.post(f"{url}/classify", json={"row": row}, timeout=30).json()
        page.goto(url)
        page.get_by_label("title").fill(row["title"])
        page.get_by_label("body (may be empty)").fill(row["body"])
        page.get_by_role("button", name="Classify").click()
        lines = page.locator("#scores tr")
        expect(lines).to_have_count(len(LABELS))
        shown = [line.split("\t")[:2] for line in lines.all_inner_texts()]
        photograph(page, "server.png")
    scores = sorted(expected["scores"].items(), key=lambda pair: -pair[1])
    assert [[label, f"{100 * score:.1f} %"] for label, score in scores] == [
        [part.strip() for part in line] for line in shown
    ]


def test_a_prompt_is_continued_while_the_model_writes(page, predictors, monkeypatch):
    body = {"prompt": "the quick", "max_new_tokens": 30, "temperature": 2, "seed": 5}
    with running(predictors["base"]) as (url, engine):
        expected = requests.post(f"{url}/generate", json=body, timeout=30).json()
        page.goto(url)
        expect(page.locator("#rows")).to_be_hidden()
        page.get_by_label("Text to continue").fill(body["prompt"])
        for name, key in (("New tokens", "max_new_tokens"), ("Temperature", "temperature")):
            page.get_by_label(name).fill(str(body[key]))
        page.get_by_label("Seed").fill(str(body["seed"]))
        page.get_by_role("button", name="Continue").click()
        expect(page.locator("#note")).to_contain_text("30 new tokens")
        shown = page.locator("#answer").evaluate("element => element.textContent")
        assert shown == body["prompt"] + expected["completion"]
        with held(engine, monkeypatch):  # stopped while it is written
            page.get_by_role("button", name="Continue").click()
            until(lambda: engine.active == 1)
            page.get_by_role("button", name="Stop").click()
            expect(page.locator("#note")).to_have_text("stopped")
        until(lambda: engine.active == 0)


def test_a_row_is_answered_with_text(page, predictors):
    row = {"instruction": "jump", "input": "over the dog"}
    with running(predictors["instructions"]) as (url, _):
        expected = requests.post(f"{url}/generate", json={"row": row}, timeout=30).json()
        page.goto(url)
        for column, text in row.items():
            page.get_by_label(column).fill(text)
        page.get_by_role("button", name="Answer").click()
        expect(page.locator("#row-note")).to_contain_text("prompt: ")
        shown = page.locator("#row-answer").evaluate("element => element.textContent")
    assert shown == expected["completion"]


def test_the_page_asks_for_the_token_and_shows_errors(page, predictors):
    with running(predictors["classification"], token=TOKEN) as (url, _):
        page.goto(url)
        page.get_by_label("text", exact=True).fill("fox")
        send = page.get_by_role("button", name="Classify")
        send.click()
        expect(page.locator("#row-note")).to_contain_text("send Authorization: Bearer")
        page.get_by_label("Token of the server").fill(TOKEN)
        send.click()
        expect(page.locator("#scores tr")).to_have_count(len(LABELS))
        page.get_by_label("text", exact=True).fill(" \n")
        send.click()
        expect(page.locator("#row-note")).to_have_text("text is empty")
        expect(page.locator("#scores tr")).to_have_count(0)
