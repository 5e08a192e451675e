"""Tests of the recipe for Hub datasets, with a small fake Hub on the loopback interface."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow.parquet as pq
import pytest
import yaml

from tests.helpers.paths import ROOT

RECIPE = ROOT / "data" / "datasets" / "hub"
REPO = "someone/moods"
URL = f"hf://datasets/{REPO}"
OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
NAMES = ["calm", "cross", "glad"]
TRAIN: dict[str, list] = {"text": ["a", "b, c", "line\nbreak", "ü 語"], "mood": [0, 2, 1, 2]}
DEV: dict[str, list] = {"text": ["e", ""], "mood": [1, 0]}
Fetched = subprocess.CompletedProcess[str]


def parquet(rows: dict[str, list]) -> bytes:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "mood": ClassLabel(names=NAMES)})
    buffer = io.BytesIO()
    Dataset.from_dict(rows, features=features).to_parquet(buffer)
    return buffer.getvalue()


def card(**configs: dict[str, str]) -> bytes:
    """Return a README.md that lists configs and the file of each split."""
    files = {k: [{"split": s, "path": p} for s, p in v.items()] for k, v in configs.items()}
    entries = [{"config_name": name, "data_files": listed} for name, listed in files.items()]
    return f"---\n{yaml.safe_dump({'configs': entries})}---\n# Moods\n".encode()


class Hub(ThreadingHTTPServer):
    """A fake Hub with one repository: its files by commit."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Endpoints)
        self.commits: dict[str, dict[str, bytes]] = {OLD: {}, NEW: {}}
        self.failure: tuple[int, str] | None = None  # status and code for all files except the card
        self.fetched: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"


class Endpoints(BaseHTTPRequestHandler):
    """The endpoints that `datasets` uses."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        hub = self.server
        posted = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        # (api/)datasets/<owner>/<name>/<kind>/<revision>/<path>
        parts = unquote(urlsplit(self.path).path).strip("/").removeprefix("api/").split("/")
        kind, revision, *rest = parts[3:] or ["revision", "main"]
        name, commit = "/".join(rest), {"main": NEW}.get(revision, revision)
        files = hub.commits.get(commit, {})
        if "/".join(parts[1:3]) != REPO:
            self.send(401, code="RepoNotFound")
        elif commit not in hub.commits:
            self.send(404, code="RevisionNotFound")
        elif kind == "revision":
            siblings = [{"rfilename": n, "size": len(files[n])} for n in files]
            self.send(200, {"id": REPO, "sha": commit, "siblings": siblings})
        elif kind in ("tree", "paths-info"):
            entries = [{"type": "file", "path": n, "size": len(files[n]), "oid": n} for n in files]
            folders = {parent.as_posix() for n in files for parent in Path(n).parents}
            entries += [{"type": "directory", "path": n, "oid": n} for n in folders]
            requested = parse_qs(posted).get("paths", [])
            below = Path(name) if kind == "tree" else None  # at any depth; the client filters
            found = [n for n in (*files, *folders) if n in requested or below in Path(n).parents]
            self.send(200, [entry for entry in entries if entry["path"] in found])
        elif hub.failure is not None and name != "README.md":
            self.send(hub.failure[0], code=hub.failure[1])
        elif name not in files:
            self.send(404, code="EntryNotFound")
        else:
            hub.fetched += [name] if self.command == "GET" else []
            self.send(200, files[name], commit)

    do_HEAD = do_POST = do_GET

    def send(self, status: int, content: Any = None, commit: str = "", code: str = "") -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit, "X-Error-Code": code}
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
        files = {"data/a.parquet": parquet(TRAIN), "data/b.parquet": parquet(DEV)}
        readme = card(default={"train": "data/a.parquet", "dev": "data/b.parquet"})
        hub.commits[NEW] = {"README.md": readme} | files
        yield hub
        hub.shutdown()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe").mkdir()
    return Path(shutil.copy(RECIPE / "fetch.py", tmp_path / "recipe")).parent


def fetch(recipe: Path, endpoint: str, patch: str = "", **params: Any) -> Fetched:
    """Run the recipe; `patch` is Python code that its interpreter runs first."""
    home = recipe.parent / "home"
    home.mkdir(exist_ok=True)
    (recipe.parent / "sitecustomize.py").write_text(patch)
    content = {"dataset": REPO, "revision": None, "config": None} | params
    (recipe / "params.yaml").write_text(yaml.safe_dump(content))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    env |= {"PYTHONPATH": f"{home.parent}:{ROOT}", "HOME": str(home), "HF_ENDPOINT": endpoint}
    command = [sys.executable, "fetch.py"]
    done = subprocess.run(command, cwd=recipe, env=env, capture_output=True, text=True, timeout=60)
    assert not any(path.is_file() for path in home.rglob("*"))
    return done


def fetched(recipe: Path, endpoint: str, column: str = "text", **params: Any) -> dict[str, list]:
    """Return one column of each split."""
    done = fetch(recipe, endpoint, **params)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in recipe.iterdir()} == {"fetch.py", "params.yaml", "splits"}
    files = (recipe / "splits").glob("*.parquet")
    return {path.stem: pq.read_table(path)[column].to_pylist() for path in files}


def error_of(recipe: Path, endpoint: str, patch: str = "", **params: Any) -> str:
    """Run the recipe and return its one-line error; `splits/` must be unchanged."""
    before = {p: p.read_bytes() for p in recipe.glob("splits/*")}
    done = fetch(recipe, endpoint, patch, **params)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    left = {path.name for path in recipe.iterdir()} - {"fetch.py", "params.yaml"}
    assert left == ({"splits"} if before else set())
    assert before == {p: p.read_bytes() for p in recipe.glob("splits/*")}
    return line


def test_splits_are_downloaded_with_label_names(hub: Hub, recipe: Path) -> None:
    from gptj8.dataset.readers.formats import read_rows
    from gptj8.dataset.readers.options import ReadOptions

    assert fetched(recipe, hub.endpoint)
    for rows, split in ((TRAIN, "train"), (DEV, "validation")):
        path = recipe / "splits" / f"{split}.parquet"
        assert pq.read_table(path).to_pydict() == rows
        read = read_rows(path, ReadOptions({"text": "text", "label": "mood"}))
        assert list(read["label"]) == [NAMES[code] for code in rows["mood"]]
    source = json.loads((recipe / "splits" / "source.json").read_text())
    assert (source["dataset"], source["revision"]) == (REPO, NEW)
    assert (source["rows"], source["columns"]) == ({"train": 4, "validation": 2}, ["text", "mood"])


@pytest.mark.slow
def test_pinned_revision_replaces_another(hub: Hub, recipe: Path) -> None:
    hub.commits[OLD] = {"train.csv": b"text,n\nold,1\n", "test.csv": b"text,n\nolder,2\n"}
    assert fetched(recipe, hub.endpoint).keys() == {"train", "validation"}
    assert fetched(recipe, hub.endpoint, "n", revision=OLD) == {"train": [1], "test": [2]}
    assert json.loads((recipe / "splits" / "source.json").read_text())["revision"] == OLD


@pytest.mark.slow
def test_files_are_selected_by_path(hub: Hub, recipe: Path) -> None:
    texts = {"x1": "one two", "x2": "three", "y": "no", "more/train": "four", "more/test": "five"}
    for name, words in texts.items():
        lines = [json.dumps({"text": word}) for word in words.split()]
        hub.commits[NEW][f"{name}.jsonl"] = "\n".join(lines).encode()
    hub.commits[OLD] = {"y.jsonl": b'{"text": "old"}\n'}
    for path, expected in {
        "/x*.jsonl": {"train": ["one", "two", "three"]},
        f"@{OLD}/y.jsonl": {"train": ["old"]},
        "/more": {"train": ["four"], "test": ["five"]},
    }.items():
        assert fetched(recipe, hub.endpoint, dataset=URL + path) == expected


@pytest.mark.slow
def test_config_is_selected_and_its_only_split_is_train(hub: Hub, recipe: Path) -> None:
    files = {"small.csv": b"text\na\n", "large.csv": b"text\nb\nc\n"}
    hub.commits[NEW] = files | {
        "README.md": card(small={"all_of_it": "small.csv"}, large={"all_of_it": "large.csv"})
    }
    listed = "; set config to one of: large, small"
    wrong = error_of(recipe, hub.endpoint, config="huge")
    assert f"config = huge does not exist in {REPO}{listed}" in wrong
    assert f"has several configs but no default{listed}" in error_of(recipe, hub.endpoint)
    assert fetched(recipe, hub.endpoint, config="large") == {"train": ["b", "c"]}
    assert "small.csv" not in hub.fetched


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"dataset": None}, "dataset = null; set it"),
        ({"dataset": "imdb"}, "dataset = imdb is neither owner/name, such as"),
        ({"dataset": "some/one"}, "dataset = some/one does not exist on http"),
        ({"dataset": f"{URL}/x.csv"}, "has no file x.csv; its files: README.md, data/a.parquet"),
        ({"dataset": f"{URL}/x*.csv"}, "has no file x*.csv in a supported format"),
        ({"dataset": f"{URL}/x.csv", "config": "c"}, "config = c, but dataset has a path to files"),
        (
            {"dataset": f"{URL}@{OLD}", "revision": NEW},
            f"revision = {NEW} conflicts with dataset = hf",
        ),
        ({"revision": 12}, "revision: not a string; put it in quotes"),
        ({"revision": "no"}, "revision = no does not exist in someone/moods"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_params_raise(hub: Hub, recipe: Path, params: dict, message: str) -> None:
    assert message in error_of(recipe, hub.endpoint, **params)
    assert not any(name.endswith(".parquet") for name in hub.fetched)


def test_split_with_an_unknown_name_is_not_used_but_recorded(hub: Hub, recipe: Path) -> None:
    readme = card(default={"train": "data/a.parquet", "extra": "data/b.parquet"})
    hub.commits[NEW] = hub.commits[NEW] | {"README.md": readme}
    assert fetched(recipe, hub.endpoint)
    assert {path.name for path in (recipe / "splits").iterdir()} == {"train.parquet", "source.json"}
    assert json.loads((recipe / "splits" / "source.json").read_text())["left_out"] == ["extra"]


@pytest.mark.slow
def test_unusable_dataset_raises_and_keeps_the_previous_one(hub: Hub, recipe: Path) -> None:
    files = dict(hub.commits[NEW])
    assert fetched(recipe, hub.endpoint)
    hub.fetched.clear()
    readme = card(default={"one": "data/a.parquet", "two": "data/b.parquet"})
    hub.commits[NEW] = files | {"README.md": readme}
    assert "has the splits one, two, which do not map to train" in error_of(recipe, hub.endpoint)
    assert not any(name.endswith(".parquet") for name in hub.fetched)  # found before the download
    hub.commits[NEW] = files | {"data/b.parquet": b"PAR1 is not all of it"}
    assert "cannot be read: Arrow" in error_of(recipe, hub.endpoint)
    hub.commits[NEW] = files | {"moods.py": b"raise SystemExit('never run')"}
    assert "set revision to refs/convert/parquet" in error_of(recipe, hub.endpoint)
    hub.commits[NEW] = {"train.csv": b"text\na\n", "test.jsonl": b'{"text": "b"}\n'}
    assert "cannot be read: ValueError: Couldn't infer the same" in error_of(recipe, hub.endpoint)
    hub.commits[NEW] = {"notes.xyz": b"nothing to read"}
    assert "has no files in a supported format" in error_of(recipe, hub.endpoint)


@pytest.mark.slow
def test_no_access_no_network_or_failing_hub_raises(hub: Hub, recipe: Path) -> None:
    for hub.failure in ((401, "GatedRepo"), (403, "GatedRepo")):
        line = error_of(recipe, hub.endpoint)
        assert f"is gated; request access at {hub.endpoint}/datasets/{REPO} and set" in line
    for endpoint in ("http://127.0.0.1:9", "http://hub.invalid"):
        line = error_of(recipe, endpoint)
        assert f"dataset = {REPO} cannot be downloaded from {endpoint}" in line
        assert line.endswith("; check the network connection")
    hub.failure = (451, "")  # a status that the client does not retry
    line = error_of(recipe, hub.endpoint)
    assert f"cannot be downloaded from {hub.endpoint}: " in line and "451" in line


def test_full_disk_raises(hub: Hub, recipe: Path) -> None:
    none_free = "import shutil; shutil.disk_usage = lambda _: shutil._ntuple_diskusage(9, 9, 0)"
    assert "the disk has 0 B free; make room" in error_of(recipe, hub.endpoint, none_free)
    fills = "import os, pyarrow.parquet as pq; pq.ParquetWriter.write_table = "
    fills += "lambda *_: os.write(os.open('/dev/full', os.O_WRONLY), b'-')"  # ENOSPC
    assert "no space left on the disk; free some space" in error_of(recipe, hub.endpoint, fills)


def test_stage_depends_only_on_its_params() -> None:
    stage = yaml.safe_load((RECIPE / "dvc.yaml").read_text())["stages"]["fetch"]
    params = yaml.safe_load((RECIPE / "params.yaml").read_text())
    assert (stage["params"], stage["outs"]) == (list(params), ["splits"])
    assert set(params.values()) == {None} and "deps" not in stage
