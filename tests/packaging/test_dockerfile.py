"""The parts of Dockerfile that can be tried without Docker."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from gptj8.commands.main import _parser
from tests.helpers.paths import ROOT
from tests.helpers.served_models import running
from tests.helpers.servers import free_port

TEXT = (ROOT / "Dockerfile").read_text().replace("\\\n", "")


def array_of(instruction):
    """Return the JSON array at the end of an instruction."""
    (line,) = [line for line in TEXT.splitlines() if line.startswith(instruction)]
    return json.loads(line[line.index("[") :])


def test_what_is_copied_is_there_and_not_ignored():
    copied = re.findall(r"^COPY (.+) \S+$", TEXT, re.M)
    names = {name for line in copied for name in line.split()}
    assert names == {"pyproject.toml", "README.md", "LICENSE", "gptj8", "requirements.txt"}
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    assert rules[1] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == names
    assert all((ROOT / name).exists() for name in names)


def test_the_server_starts_with_known_options_as_another_user():
    command, *arguments = array_of("ENTRYPOINT")
    assert command == "gptj8"
    parsed = _parser().parse_args(arguments)
    assert (parsed.host, parsed.port) == ("0.0.0.0", 8000)
    assert (parsed.model, parsed.adapter) == ("/models/base-8bit", "/models/export")
    assert "EXPOSE 8000" in TEXT
    assert TEXT.index("USER gptj8") < TEXT.index("ENTRYPOINT")


def test_torch_has_one_pinned_version():
    found = subprocess.run(
        ["grep", re.search(r"grep '([^']+)'", TEXT)[1], ROOT / "requirements.txt"],
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert len(found) == 1 and re.fullmatch(r"torch==[\d.]+", found[0])


@pytest.mark.parametrize("is_running", [True, False])
def test_the_health_check_finds_a_server(predictors, is_running):
    python, *options = array_of("HEALTHCHECK")
    assert python == "python"

    def code(port):
        changed = [option.replace(":8000/", f":{port}/") for option in options]
        return subprocess.run([sys.executable, *changed], capture_output=True).returncode

    if is_running:
        with running(predictors["base"]) as (url, _):
            assert code(url.rpartition(":")[2]) == 0
    else:
        assert code(free_port()) == 1
