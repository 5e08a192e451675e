"""What the audit of the pinned packages makes of pip-audit's results."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.project_clone import ROOT

CLEAN = {"name": "sound", "version": "1.0", "vulns": []}
AFFECTED = {"name": "broken", "version": "2.0", "vulns": [{"id": "PYSEC-1"}, {"id": "PYSEC-2"}]}
SKIPPED = {"name": "unknown", "skip_reason": "no database"}


def audit(file, *options):
    command = [sys.executable, ROOT / ".ci" / "audit.py", file, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("packages", "code", "lenient_code"),
    [
        ([CLEAN], 0, 0),
        ([CLEAN, AFFECTED], 1, 1),
        ([CLEAN, SKIPPED], 2, 0),
        ([SKIPPED, AFFECTED], 1, 1),
        (None, 2, 0),
    ],
    ids=["clean", "affected", "skipped", "both", "no-result"],
)
def test_an_advisory_ends_the_run_and_ignorance_only_where_it_is_one(
    tmp_path, packages, code, lenient_code
):
    file = tmp_path / "audit.json"
    if packages is not None:
        file.write_text(json.dumps({"dependencies": packages, "fixes": []}))
    strict, lenient = audit(file), audit(file, "--unreachable-is-no-error")
    assert (strict.returncode, lenient.returncode) == (code, lenient_code), strict.stderr
    assert strict.stdout == lenient.stdout
    assert ("broken 2.0: PYSEC-1, PYSEC-2" in strict.stdout) == (code == 1)
    assert strict.stdout.splitlines()[-1].startswith("audit: ")
