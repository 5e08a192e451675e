"""`gptj8 generate` and `gptj8 serve`, run as processes."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from gptj8.commands import serve
from gptj8.runtime.errors import UserError
from gptj8.serving.sockets import bind
from tests.helpers.paths import ROOT
from tests.helpers.served_models import greedy

PROMPTS = ["the quick", "a lazy dog", "seven wizards box", "jugs", "liquor " * 5]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def gptj8(exports, tiny_8bit_dir, tmp_path):
    def call(command, *arguments, adapter="classification", stdin=""):
        folder = exports.get(adapter, adapter)
        options = ["--model", tiny_8bit_dir, "--adapter", folder, "--dtype", "float32"]
        given = [sys.executable, "-m", "gptj8.commands.main", command, *options, *arguments]
        return subprocess.run(
            list(map(str, given)),
            cwd=tmp_path,
            capture_output=True,
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            env=ENVIRONMENT,
            timeout=60,
        )

    return call


def assert_error(process, reason):
    """Assert one error line, exit code 2 and no traceback."""
    stderr = process.stderr.decode()
    assert process.returncode == 2, stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in stderr
    assert reason in line


def expected(predictor, ids, tokens):
    return "".join(map(predictor.encoder.decode_stream(), greedy(predictor, ids, tokens)))


@pytest.mark.slow
def test_a_prompt_as_argument_or_from_standard_input(gptj8, predictors):
    predictor = predictors["classification"]
    answers = {p: expected(predictor, predictor.encode_prompt(p), 12) for p in PROMPTS}
    prompt, answer = next(pair for pair in answers.items() if len(pair[1]) > 3)
    options = ["--max-new-tokens", 12]
    assert gptj8("generate", prompt, *options).stdout.decode() == answer + "\n"
    assert gptj8("generate", *options, stdin=prompt).stdout.decode() == answer + "\n"


@pytest.mark.slow
def test_a_row_of_a_classification_gets_its_most_likely_label(gptj8, predictors):
    predictor = predictors["classification"]
    row = {"text": "the quick brown fox"}
    (probabilities,) = predictor.classify([predictor.encode_for_labels(row).ids])
    label = predictor.labels[int(probabilities.argmax())]
    process = gptj8("generate", "--row", f"text={row['text']}")
    assert process.stdout.decode() == label + "\n"
    free = gptj8("generate", "--row", f"text={row['text']}", "--max-new-tokens", 12)
    answer = expected(predictor, predictor.encode_row(row).ids, 12).lstrip()
    assert free.stdout.decode() == answer + "\n"


@pytest.mark.slow
def test_a_row_is_answered(gptj8, predictors):
    row = {"instruction": "jump = over", "input": "the dog"}
    predictor = predictors["instructions"]
    answer = expected(predictor, predictor.encode_row(row).ids, 12).lstrip()
    options = [part for cell in row.items() for part in ("--row", "=".join(cell))]
    process = gptj8("generate", *options, "--max-new-tokens", 12, adapter="instructions")
    assert process.stdout.decode() == answer + "\n", process.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["a", "--row", "text=a"], "give either a prompt or --row, not both"),
        (["--row", "text"], "--row text: write COLUMN=TEXT"),
        (["a", "--max-new-tokens", "0"], "max_new_tokens: input should be greater"),
        (["a", "--temperature", "nan"], "temperature: input should be a finite number"),
        (["a", "--dtype", "int4"], "--dtype int4 is not auto, bfloat16"),
        (["a", "--model", "nowhere"], "--model nowhere does not exist"),
        (["a", "--adapter", "nowhere"], "--adapter nowhere does not exist"),
    ],
    ids=str,
)
def test_invalid_generate_options_fail_before_a_model_is_loaded(gptj8, options, reason):
    assert_error(gptj8("generate", *options), reason)


def test_standard_input_that_is_not_text_is_an_error(gptj8):
    assert_error(gptj8("generate", stdin=b"\xff\xfe"), "standard input is not UTF-8")


@pytest.mark.slow
def test_an_unknown_column_is_an_error(gptj8):
    assert_error(gptj8("generate", "--row", "txt=a"), "txt is not a column, did you mean text?")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--port", "-1"], "--port -1"),
        (["--port", "99999"], "--port 99999"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--host", "a..b"], "--host a..b"),
        (["--timeout", "nan"], "--timeout nan must be greater than 0"),
        (["--max-batch", "0"], "--max-batch 0 must be greater than 0"),
        (["--max-prompt-tokens", "0"], "--max-prompt-tokens 0 must be greater than 0"),
        (["--max-connections", "0"], "--max-connections 0 must be greater than 0"),
        (["--send-timeout", "-1"], "--send-timeout -1.0 must be greater than 0"),
        (["--cache-gib", "0"], "--cache-gib 0.0 must be greater than 0"),
        (["--cache-gib", "nan"], "--cache-gib nan must be greater than 0"),
        (["--cache-gib", "inf"], "--cache-gib inf must be a number"),
        (["--cors", "example.org"], "--cors example.org is not an origin"),
        (["--cors", "https://example.org/page"], "--cors https://example.org/page is not an"),
        (["--name", " "], "--name must not be empty"),
        (["--token-file", "no-such-file"], "--token-file no-such-file: "),
        (["--token-file", "/dev/null"], "the token must be printable ASCII"),
    ],
    ids=str,
)
def test_invalid_serve_options_are_errors(gptj8, options, reason):
    assert_error(gptj8("serve", *options), reason)


def test_a_port_in_use_fails_before_a_model_is_loaded(gptj8, tmp_path):
    (tmp_path / "no-model").mkdir()  # loading this model would fail with another message
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert_error(gptj8("serve", "--port", port, "--model", "no-model"), f"--port {port}")


def test_a_port_taken_while_the_model_is_loaded_is_a_one_line_error(predictors, monkeypatch, capfd):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))

        def load(arguments):
            other.listen()
            return predictors["base"]

        monkeypatch.setattr(serve, "load_predictor", load)
        parser = argparse.ArgumentParser()
        serve.add_to(parser.add_subparsers())
        port = other.getsockname()[1]
        arguments = parser.parse_args(["serve", "--port", str(port)])
        with pytest.raises(UserError, match=f"--host 127.0.0.1 --port {port}: .*in use"):
            arguments.command(arguments)
    assert capfd.readouterr() == ("", "")


@contextmanager
def served(exports, tiny_8bit_dir, cwd, host="127.0.0.1", more=()):
    options = ["--model", tiny_8bit_dir, "--adapter", exports["classification"]]
    options += ["--host", host, "--port", 0, *more]
    command = [sys.executable, "-m", "gptj8.commands.main", "serve", *options]
    with subprocess.Popen(
        list(map(str, command)),
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        timeout = threading.Timer(60, process.kill)
        timeout.start()
        try:
            line = process.stdout.readline().decode()
            timeout.cancel()
            url = re.search(r": (http://\S+) \(API docs at /docs\)", line)
            assert url, process.stderr.read().decode()
            yield process, url[1]
        finally:
            timeout.cancel()
            process.kill()


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6")


@pytest.mark.slow
@needs_ipv6
def test_the_printed_url_can_be_opened_at_once(exports, tiny_8bit_dir, tmp_path):
    """With an IPv6 host and any free port."""
    with served(exports, tiny_8bit_dir, tmp_path, "::1") as (_, url):
        assert url.startswith("http://[::1]:")
        assert not url.endswith(":0")
        assert requests.get(url + "/health", timeout=5).json()["status"] == "ok"


@pytest.mark.slow
def test_options_of_the_server(exports, tiny_8bit_dir, tmp_path):
    """The model's name, the memory of keys and values (2 layers, width 64), and an origin."""
    gib = 150 * 2 * 2 * 64 * 2 / 2**30  # 150 tokens in bfloat16
    more = ["--name", "fox", "--cache-gib", gib, "--cors", "https://example.org"]
    more += ["--dtype", "bfloat16"]
    with served(exports, tiny_8bit_dir, tmp_path, more=more) as (_, url):
        (model,) = requests.get(url + "/v1/models", timeout=5).json()["data"]
        assert model["id"] == "fox"
        assert "gptj8_cache_tokens_limit 150.0\n" in requests.get(url + "/metrics", timeout=5).text
        body = {"prompt": "fox", "max_new_tokens": 60}
        origin = {"Origin": "https://example.org"}
        fits = requests.post(url + "/generate", json=body, headers=origin, timeout=30)
        assert fits.status_code == 200
        assert fits.headers["access-control-allow-origin"] == "https://example.org"
        many = {"prompt": "fox " * 60, "max_new_tokens": 60}
        refused = requests.post(url + "/generate", json=many, timeout=30)
        assert refused.status_code == 422
        assert "do not fit into" in refused.json()["detail"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", pytest.param("::", marks=needs_ipv6)])
def test_a_port_is_bound_on_every_address_of_a_host(host):
    sockets = bind(host, 0)
    try:
        assert len({taken.getsockname()[1] for taken in sockets}) == 1
        assert len({taken.getsockname() for taken in sockets}) == len(sockets) >= 1
        for taken in sockets:
            assert taken.proto == socket.IPPROTO_TCP  # otherwise asyncio delays small packets
            taken.listen()
            with socket.create_connection(taken.getsockname()[:2], timeout=5):
                pass
    finally:
        for taken in sockets:
            taken.close()


def test_unavailable_addresses_of_a_host_are_skipped(monkeypatch):
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0)),  # reserved by RFC 5737
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **keywords: found)
    (taken,) = bind("somewhere", 0)
    taken.close()
    del found[1]
    with pytest.raises(UserError, match="--host somewhere --port 0"):
        bind("somewhere", 0)


def resident_mb(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1000


@pytest.mark.slow
def test_memory_stays_constant_and_sigterm_stops_the_server(exports, tiny_8bit_dir, tmp_path):
    with served(exports, tiny_8bit_dir, tmp_path) as (process, url):
        session = requests.Session()

        def send(times):
            for n in range(times):
                body = {"prompt": "fox " * (n % 20 + 1), "max_new_tokens": 8}
                assert session.post(url + "/generate", json=body, timeout=30).ok
                body = {"row": {"text": "fox " * (n % 20 + 1)}}
                assert session.post(url + "/classify", json=body, timeout=30).ok

        send(40)
        before = resident_mb(process.pid)
        send(120)
        assert resident_mb(process.pid) < before + 10
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=20)
    assert process.returncode in (0, 143)
    assert stdout == b""  # the URL line was already read
    assert "Traceback" not in stderr.decode()


@pytest.mark.slow
def test_sigterm_stops_the_server_during_a_stream(exports, tiny_8bit_dir, tmp_path):
    with served(exports, tiny_8bit_dir, tmp_path) as (process, url):
        session = requests.Session()
        # Enough requests that the last one has not started.
        bodies = [{"prompt": "a", "max_new_tokens": 120, "stream": True}] * 40
        streams = []
        for body in bodies:
            streams.append(session.post(url + "/generate", json=body, stream=True, timeout=30))
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
    assert time.monotonic() - started < 15
    assert process.returncode in (0, 143)
    assert "Traceback" not in stderr.decode()
