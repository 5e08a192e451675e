"""`gptj8 generate` and `gptj8 serve`, as processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests.serving.conftest import free_port, greedy, until

PROMPTS = ["the quick", "a lazy dog", "seven wizards box", "jugs", "liquor " * 5]
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def gptj8(exports, tiny_8bit_dir, tmp_path):
    def call(command, *arguments, adapter="classification", stdin=""):
        folder = exports.get(adapter, adapter)
        options = ["--model", tiny_8bit_dir, "--adapter", folder, "--dtype", "float32"]
        given = [sys.executable, "-m", "gptj8.cli", command, *options, *arguments]
        return subprocess.run(
            list(map(str, given)),
            cwd=tmp_path,
            capture_output=True,
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            env=ENVIRONMENT,
            timeout=60,
        )

    return call


def assert_refused(process, reason):
    """One line, exit code 2, no traceback."""
    stderr = process.stderr.decode()
    assert process.returncode == 2, stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in stderr
    assert reason in line


def expected(predictor, ids, tokens):
    return "".join(map(predictor.encoder.decode_stream(), greedy(predictor, ids, tokens)))


def test_a_prompt_as_argument_or_at_standard_input(gptj8, predictors):
    predictor = predictors["classification"]
    answers = {p: expected(predictor, predictor.encode_prompt(p), 12) for p in PROMPTS}
    prompt, answer = next(pair for pair in answers.items() if len(pair[1]) > 3)
    options = ["--max-new-tokens", 12]
    assert gptj8("generate", prompt, *options).stdout.decode() == answer + "\n"
    assert gptj8("generate", *options, stdin=prompt).stdout.decode() == answer + "\n"


def test_a_row(gptj8, predictors):
    row = {"instruction": "jump = over", "input": "the dog"}
    predictor = predictors["instructions"]
    answer = expected(predictor, predictor.encode_row(row, 12).ids, 12).lstrip()
    options = [part for cell in row.items() for part in ("--row", "=".join(cell))]
    process = gptj8("generate", *options, "--max-new-tokens", 12, adapter="instructions")
    assert process.stdout.decode() == answer + "\n", process.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["a", "--row", "text=a"], "give either a prompt or --row"),
        (["--row", "text"], "--row text: write COLUMN=TEXT"),
        (["a", "--max-new-tokens", "0"], "max_new_tokens: input should be greater"),
        (["a", "--temperature", "nan"], "temperature: input should be a finite number"),
        (["a", "--dtype", "int4"], "--dtype int4 is none of"),
        (["a", "--model", "nowhere"], "--model nowhere does not exist"),
        (["a", "--adapter", "nowhere"], "--adapter nowhere does not exist"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_before_a_model_is_loaded(gptj8, options, reason):
    assert_refused(gptj8("generate", *options), reason)


def test_standard_input_that_is_no_text_is_refused(gptj8):
    assert_refused(gptj8("generate", stdin=b"\xff\xfe"), "standard input is not UTF-8")


def test_what_the_model_has_no_room_for_is_refused(gptj8):
    assert_refused(gptj8("generate", "--row", "txt=a"), "txt is no column, did you mean text?")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--port", "-1"], "--port -1"),
        (["--port", "99999"], "--port 99999"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--host", "a..b"], "--host a..b"),
        (["--timeout", "nan"], "--timeout nan must be more than 0"),
        (["--max-batch", "0"], "--max-batch 0 must be more than 0"),
        (["--max-prompt-tokens", "0"], "--max-prompt-tokens 0 must be more than 0"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused(gptj8, options, reason):
    assert_refused(gptj8("serve", *options), reason)


def test_a_port_in_use_is_refused_before_a_model_is_loaded(gptj8, tmp_path):
    (tmp_path / "no-model").mkdir()  # loading it would fail with another message
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert_refused(gptj8("serve", "--port", port, "--model", "no-model"), f"--port {port}")


@contextmanager
def served(exports, tiny_8bit_dir, cwd):
    port = free_port()
    options = ["--model", tiny_8bit_dir, "--adapter", exports["classification"]]
    command = [sys.executable, "-m", "gptj8.cli", "serve", "--port", port, *options]
    with subprocess.Popen(
        list(map(str, command)),
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: process.poll() is not None or answers(url), 60)
            yield process, url
        finally:
            process.kill()


def answers(url):
    try:
        return requests.get(url + "/health", timeout=5).status_code == 200
    except requests.ConnectionError:
        return False


def resident_mb(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1000


def test_it_serves_keeps_its_memory_and_ends_when_told(exports, tiny_8bit_dir, tmp_path):
    with served(exports, tiny_8bit_dir, tmp_path) as (process, url):
        session = requests.Session()

        def ask(times):
            for n in range(times):
                body = {"prompt": "fox " * (n % 20 + 1), "max_new_tokens": 8}
                assert session.post(url + "/generate", json=body, timeout=30).ok
                body = {"row": {"text": "fox " * (n % 20 + 1)}}
                assert session.post(url + "/classify", json=body, timeout=30).ok

        ask(40)
        before = resident_mb(process.pid)
        ask(120)
        assert resident_mb(process.pid) < before + 10
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=20)
    assert process.returncode in (0, 143)
    assert url in stdout.decode()
    assert "Traceback" not in stderr.decode()


def test_it_ends_when_told_also_in_the_midst_of_a_stream(exports, tiny_8bit_dir, tmp_path):
    with served(exports, tiny_8bit_dir, tmp_path) as (process, url):
        session = requests.Session()
        # Many, so that the last of them has not begun.
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
