"""The page at /, /metrics for Prometheus, HEAD and requests from web pages of other origins."""

from __future__ import annotations

import re

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from gptj8.model.generation.sampling import Sampling
from tests.helpers.served_models import held, running, until

ORIGIN = "https://example.org"


@pytest.fixture(scope="module")
def guarded(predictors):
    with running(predictors["classification"], token="open-sesame") as (url, _):
        yield url


def measured(url):
    """Return the values of /metrics by name and labels."""
    response = requests.get(f"{url}/metrics", timeout=10)
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_the_page_needs_no_token_and_no_other_server(guarded):
    response = requests.get(guarded, timeout=10)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", response.text)
    assert "open-sesame" not in response.text
    for link in re.findall(r"""href="([^":]+)\"""", response.text):
        assert requests.get(f"{guarded}/{link}", timeout=10).status_code == 200


@pytest.mark.parametrize("path", ["/", "/health"])
def test_head_has_the_headers_of_get_and_no_body(guarded, path):
    head, get = (requests.request(m, guarded + path, timeout=10) for m in ("HEAD", "GET"))
    assert head.status_code == get.status_code == 200
    assert head.content == b""
    for name in ("content-type", "content-length"):
        assert head.headers[name] == get.headers[name]


def test_health_tells_what_the_page_shows(guarded):
    health = requests.get(f"{guarded}/health", timeout=10).json()
    assert health["columns"] == {"text": True}
    assert health["needs_token"] is True


def test_metrics_need_the_token(guarded):
    assert requests.get(f"{guarded}/metrics", timeout=10).status_code == 401
    headers = {"Authorization": "Bearer open-sesame"}
    assert requests.get(f"{guarded}/metrics", headers=headers, timeout=10).status_code == 200


def test_metrics_count_requests_and_tokens(predictors):
    with running(predictors["classification"]) as (url, _):
        body = {"prompt": "the quick", "max_new_tokens": 7, "temperature": 1, "seed": 1}
        whole = requests.post(f"{url}/generate", json=body, timeout=30).json()
        row = {"row": {"text": "a lazy dog"}}
        requests.post(f"{url}/classify", json=row, timeout=30)
        requests.post(f"{url}/generate", json={}, timeout=30)
        requests.get(f"{url}/nothing/1", timeout=30)
        requests.get(f"{url}/nothing/2", timeout=30)
        asked = requests.post(f"{url}/v1/completions", json={"model": "x", "prompt": "a"})
        assert asked.status_code == 404
        classified = predictors["classification"].encode_for_labels(row["row"])
        found = measured(url)
    assert found["gptj8_requests_total", "/generate", "200"] == 1
    assert found["gptj8_requests_total", "/generate", "422"] == 1
    assert found["gptj8_requests_total", "/classify", "200"] == 1
    assert found["gptj8_requests_total", "/v1/completions", "404"] == 1
    assert found["gptj8_requests_total", "other", "404"] == 2
    assert found["gptj8_request_seconds_count", "/generate"] == 2
    assert found["gptj8_time_to_first_token_seconds_count",] == 1
    assert found["gptj8_tokens_total", "answer"] == whole["new_tokens"]
    prompts = whole["prompt_tokens"] + len(classified.ids)
    assert found["gptj8_tokens_total", "prompt"] == prompts


def test_metrics_show_the_load(predictors, monkeypatch):
    with running(predictors["base"], max_batch=2) as (url, engine):
        idle = measured(url)
        with held(engine, monkeypatch):
            futures = [engine.generate([5, 6], Sampling(9)) for _ in range(3)]
            until(lambda: engine.active == 2 and engine.cache_tokens > 0)
            busy = measured(url)
        assert [len(future.result(20).ids) for future in futures] == [9] * 3
    limit = idle["gptj8_cache_tokens_limit",]
    assert (idle["gptj8_active_rows",], idle["gptj8_waiting_requests",]) == (0, 0)
    assert idle["gptj8_cache_tokens",] == 0 < limit
    assert (busy["gptj8_active_rows",], busy["gptj8_waiting_requests",]) == (2, 1)
    assert 2 * 2 <= busy["gptj8_cache_tokens",] <= limit


def asked_by_page(url, origin):
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        # The last two are sent by OpenAI's client for JavaScript.
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang,"
        "x-stainless-retry-count",
    }
    before = requests.options(f"{url}/v1/completions", headers=headers, timeout=10)
    after = requests.post(f"{url}/generate", json={}, headers={"Origin": origin}, timeout=10)
    name = "access-control-allow-origin"
    return before.status_code, before.headers.get(name), after.headers.get(name)


def test_pages_of_other_origins_are_refused_by_default(guarded):
    assert asked_by_page(guarded, ORIGIN) == (401, None, None)


def test_pages_of_a_chosen_origin_are_allowed(predictors):
    """The browser's question has no token; a rejection can be read by the page."""
    with running(predictors["base"], token="open-sesame", origins=[ORIGIN]) as (url, _):
        assert asked_by_page(url, ORIGIN) == (200, ORIGIN, ORIGIN)
        assert asked_by_page(url, "https://other.example") == (400, None, None)
    with running(predictors["base"], origins=["*"]) as (url, _):
        assert asked_by_page(url, ORIGIN) == (200, "*", "*")
