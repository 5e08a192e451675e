"""The exit codes of the audit for different results of pip-audit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

CLEAN = {"name": "sound", "version": "1.0", "vulns": []}
AFFECTED = {"name": "broken", "version": "2.0", "vulns": [{"id": "PYSEC-1"}, {"id": "PYSEC-2"}]}
SKIPPED = {"name": "unknown", "skip_reason": "no database"}


def audit(folder, *options):
    files = [folder / "requirements.txt", folder / "audit.json"]
    command = [sys.executable, ROOT / ".ci" / "audit.py", *files, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def dependencies(*packages):
    return json.dumps({"dependencies": packages, "fixes": []})


@pytest.mark.parametrize(
    ("result", "code", "lenient_code"),
    [
        (dependencies(CLEAN, CLEAN), 0, 0),
        (dependencies(CLEAN, AFFECTED), 1, 1),
        (dependencies(SKIPPED, AFFECTED), 1, 1),
        (dependencies(SKIPPED, SKIPPED), 2, 0),
        (dependencies(CLEAN, SKIPPED), 2, 2),
        (dependencies(CLEAN), 2, 2),
        (dependencies(), 2, 2),
        ("[]", 2, 2),
        ('{"dependencies": [', 2, 2),
        (None, 2, 2),
    ],
)
def test_the_audit_passes_only_if_every_package_was_checked(tmp_path, result, code, lenient_code):
    (tmp_path / "requirements.txt").write_text("sound==1.0\nother==2.0\n")
    if result is not None:
        (tmp_path / "audit.json").write_text(result)
    strict, lenient = audit(tmp_path), audit(tmp_path, "--lenient")
    assert (strict.returncode, lenient.returncode) == (code, lenient_code), strict.stderr
    assert not strict.stderr
    assert ("broken 2.0: PYSEC-1, PYSEC-2" in strict.stdout) == (code == 1)
    assert strict.stdout.splitlines()[-1].startswith("audit: ")
