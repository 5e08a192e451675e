"""Tests of the recipes for models on the Hub, with a small fake Hub on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from tests.helpers.paths import ROOT

MODELS = ROOT / "data" / "models"
RECIPE = MODELS / "gpt-j-6b"
REPO = "someone/small-j"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

SMALL = {
    "config.json": b'{"model_type": "gptj"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "vocab.json": b"{}",
    "merges.txt": b"#version: 0.2\n",
}
UNWANTED = {
    "README.md": b"# Model card",
    "modeling_own.py": b"raise SystemExit('never run')",
    "flax_model.msgpack": b"f" * 1000,
    "tf_model.h5": b"t" * 1000,
    "onnx/model.safetensors": b"o" * 1000,
}
LARGE = {"pytorch_model.bin": os.urandom(300_000)}


class Hub:
    """A fake Hub with the endpoints that the recipe uses and one repository."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.sent: dict[str, bytes] = dict(files)  # what the server sends; tests damage it
        self.stalls_after: int | None = None
        self.stalled = threading.Event()
        self.closing = threading.Event()
        self.failing: str | None = None
        self.branch = COMMIT
        self.ranges: list[str] = []
        self.fetched: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.partition("?")[0]
        resolve = f"/{REPO}/resolve/{COMMIT}/"
        revisions = [f"/api/models/{REPO}/revision/{at}" for at in (COMMIT, self.branch)]
        if path in revisions:
            siblings = [{"rfilename": name, **self.describe(name)} for name in self.files]
            self.send_json(request, {"id": REPO, "sha": COMMIT, "siblings": siblings})
        elif self.failing is not None and path == resolve + self.failing:
            self.send_json(request, {"error": "down for maintenance"}, status=503)
        elif path.startswith(resolve) and path.removeprefix(resolve) in self.files:
            self.send_file(request, path.removeprefix(resolve), body)
        else:
            self.send_json(request, {"error": "not found"}, status=404)

    def describe(self, name: str) -> dict:
        content = self.files[name]
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        described: dict = {"size": len(content), "blobId": blob}
        if name in LARGE or name.endswith(".safetensors"):
            sha256 = hashlib.sha256(content).hexdigest()
            described["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(content)}
            described["lfs"]["pointerSize"] = 134
        return described

    def send_file(self, request: BaseHTTPRequestHandler, name: str, body: bool) -> None:
        described, content = self.describe(name), self.sent[name]
        start = 0
        if body:
            self.fetched.add(name)
            if span := request.headers.get("Range"):
                self.ranges.append(span)
                start = int(span.removeprefix("bytes=").partition("-")[0])
        request.send_response(206 if start else 200)
        etag = described.get("lfs", {}).get("sha256") or described["blobId"]
        request.send_header("ETag", f'"{etag}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(len(content) - start))
        if start:
            size = len(content)
            request.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        request.end_headers()
        if not body:
            return
        if self.stalls_after is not None and len(content) > self.stalls_after:
            request.wfile.write(content[start : self.stalls_after])
            self.stalled.set()
            self.closing.wait(30)
        else:
            request.wfile.write(content[start:])

    def send_json(
        self, request: BaseHTTPRequestHandler, content: object, status: int = 200
    ) -> None:
        body = json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(SMALL | UNWANTED | LARGE)
    yield hub
    hub.closing.set()
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    folder = tmp_path / "recipe"
    folder.mkdir()
    shutil.copy(RECIPE / "download.py", folder)
    (tmp_path / "hub").mkdir()
    shutil.copy(MODELS / "hub" / "download.py", tmp_path / "hub")
    (folder / "params.yaml").write_text(f"repo: {REPO}\nrevision: {COMMIT}\n")
    return folder


@pytest.fixture
def any_model(recipe: Path) -> Path:
    """The general recipe, which accepts safetensors only."""
    shutil.copy(recipe / "params.yaml", recipe.parent / "hub")
    return recipe.parent / "hub"


def start(recipe: Path, endpoint: str, **environment: str) -> subprocess.Popen[str]:
    home = recipe.parent / "home"
    home.mkdir(exist_ok=True)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    own = {"PYTHONPATH": str(ROOT), "HOME": str(home), "HF_ENDPOINT": endpoint}
    return subprocess.Popen(
        [sys.executable, "download.py"],
        cwd=recipe,
        env=inherited | own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def download(recipe: Path, endpoint: str, **environment: str) -> subprocess.CompletedProcess[str]:
    process = start(recipe, endpoint, **environment)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_files_that_the_pipeline_reads_are_downloaded(hub: Hub, recipe: Path) -> None:
    done = download(recipe, hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert names(recipe / "model") == {*SMALL, *LARGE, "source.json"}
    for name, content in (SMALL | LARGE).items():
        assert (recipe / "model" / name).read_bytes() == content
    source = json.loads((recipe / "model" / "source.json").read_text())
    assert source["revision"] == COMMIT
    digest = hashlib.sha256(LARGE["pytorch_model.bin"]).hexdigest()
    assert source["sha256"]["pytorch_model.bin"] == digest
    assert hub.fetched == {*SMALL, *LARGE}
    assert {path.name for path in recipe.iterdir()} == {"download.py", "params.yaml", "model"}
    assert names(recipe.parent / "home") == set()


def test_safetensors_are_preferred(hub: Hub, recipe: Path) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": os.urandom(1000) for i in (1, 2)}
    index = {"model.safetensors.index.json": b"{}"}
    hub.files = hub.sent = SMALL | shards | index | LARGE
    done = download(recipe, hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert names(recipe / "model") == {*SMALL, *shards, *index, "source.json"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("pytorch_model.bin", bytes(300_000), id="large-file"),
        pytest.param("vocab.json", b"[]", id="small-file"),
    ],
)
def test_wrong_checksum_raises(hub: Hub, recipe: Path, name: str, content: bytes) -> None:
    hub.sent[name] = content
    done = download(recipe, hub.endpoint)
    assert done.returncode == 2
    assert f"error: {name} does not match the Hub's size" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (recipe / "model").exists()
    hub.sent[name] = hub.files[name]
    assert download(recipe, hub.endpoint).returncode == 0


def test_interrupted_download_is_resumed(hub: Hub, recipe: Path) -> None:
    weights = os.urandom(13 << 20)  # the client writes chunks of 10 MiB
    hub.files = hub.sent = SMALL | {"pytorch_model.bin": weights}
    hub.stalls_after = 12 << 20
    process = start(recipe, hub.endpoint)
    assert hub.stalled.wait(timeout=30)
    partial = recipe / ".model.incomplete" / "pytorch_model.bin"
    wait_until(lambda: partial.exists() and partial.stat().st_size >= 10 << 20)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert not (recipe / "model").exists()

    hub.stalls_after = None
    done = download(recipe, hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert hub.ranges == [f"bytes={10 << 20}-"]
    assert (recipe / "model" / "pytorch_model.bin").read_bytes() == weights
    assert not (recipe / ".model.incomplete").exists()


def test_failing_hub_raises_one_line_and_a_rerun_resumes(hub: Hub, recipe: Path) -> None:
    hub.failing = "pytorch_model.bin"
    done = download(recipe, hub.endpoint)
    assert done.returncode == 2
    assert "interrupted at pytorch_model.bin; rerun to resume it" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (recipe / "model").exists()
    hub.failing = None
    hub.fetched.clear()
    assert download(recipe, hub.endpoint).returncode == 0
    assert hub.fetched == {"pytorch_model.bin"}


@pytest.mark.parametrize(
    ("endpoint", "environment"),
    [
        pytest.param("http://127.0.0.1:9", {}, id="connection-refused"),
        pytest.param("http://hub.invalid", {}, id="no-such-host"),
        pytest.param("http://127.0.0.1:9", {"HF_HUB_OFFLINE": "1"}, id="offline-mode"),
    ],
)
def test_no_network_raises_one_line_and_leaves_no_files(
    recipe: Path, endpoint: str, environment: dict[str, str]
) -> None:
    done = download(recipe, endpoint, **environment)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {REPO} at {COMMIT} cannot be looked up on {endpoint}")
    assert {path.name for path in recipe.iterdir()} == {"download.py", "params.yaml"}


def test_unknown_revision_raises(hub: Hub, recipe: Path) -> None:
    (recipe / "params.yaml").write_text(f"repo: {REPO}\nrevision: nosuch\n")
    done = download(recipe, hub.endpoint)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {REPO} at nosuch cannot be looked up")
    assert len(done.stderr.splitlines()) == 1


def test_repository_without_weights_raises(hub: Hub, recipe: Path) -> None:
    hub.files = SMALL | UNWANTED
    done = download(recipe, hub.endpoint)
    assert done.returncode == 2
    assert "has no safetensors or PyTorch weights" in done.stderr
    assert {path.name for path in recipe.iterdir()} == {"download.py", "params.yaml"}


def test_any_model_is_downloaded_as_safetensors(hub: Hub, any_model: Path) -> None:
    own = {"model.safetensors": os.urandom(1000), "tokenizer.model": b"sentencepiece"}
    own["chat_template.jinja"] = b"{{ messages }}"
    hub.files = hub.sent = SMALL | UNWANTED | LARGE | own
    done = download(any_model, hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert names(any_model / "model") == {*SMALL, *own, "source.json"}
    source = json.loads((any_model / "model" / "source.json").read_text())
    assert (source["repo"], source["revision"]) == (REPO, COMMIT)


def test_pickles_are_refused_by_the_general_recipe(hub: Hub, any_model: Path) -> None:
    done = download(any_model, hub.endpoint)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"error: {REPO} at {COMMIT} has no model.safetensors, only .bin, .h5" in line
    assert {path.name for path in any_model.iterdir()} == {"download.py", "params.yaml"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "repo: null\nrevision: null\n",
            "error: params.yaml: repo = null; set it to the owner/name",
        ),
        ("repo: a/b\nrevision: 1234\n", "error: params.yaml: revision: not a string"),
        ("repo: a b\nrevision: null\n", "error: a b at main cannot be looked up"),
        ("repos: a/b\n", "error: params.yaml: repos is not a known key; did you mean repo?"),
    ],
    ids=["no-repo", "number", "no-name", "unknown-key"],
)
def test_wrong_params_are_one_line(any_model: Path, content: str, message: str) -> None:
    (any_model / "params.yaml").write_text(content)
    done = download(any_model, "http://127.0.0.1:9")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(message)


def test_a_branch_is_resolved_to_a_commit(hub: Hub, any_model: Path) -> None:
    hub.files = hub.sent = SMALL | {"model.safetensors": b"weights"}
    hub.branch = "main"
    (any_model / "params.yaml").write_text(f"repo: {REPO}\nrevision: null\n")
    done = download(any_model, hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert json.loads((any_model / "model" / "source.json").read_text())["revision"] == COMMIT


def test_recipe_pins_a_commit() -> None:
    params = yaml.safe_load((RECIPE / "params.yaml").read_text())
    stage = yaml.safe_load((RECIPE / "dvc.yaml").read_text())["stages"]["download"]
    assert len(params["revision"]) == 40
    assert int(params["revision"], 16)
    assert set(stage["params"]) == set(params)
    assert stage["outs"] == ["model"]
