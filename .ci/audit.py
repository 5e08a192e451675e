"""Summarize the result of pip-audit: `audit.py REQUIREMENTS AUDIT.json [--lenient]`.

Exits with code 1 if a pinned package has a known advisory, and with code 2 if a pinned package was
not checked. If no advisory database can be reached, pip-audit skips all packages and reports no
vulnerabilities; `--lenient` accepts only this case.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("requirements", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--lenient", action="store_true")
    arguments = parser.parse_args()
    pinned = len(re.findall(r"^[\w.-]+==", arguments.requirements.read_text("utf-8"), re.M))
    try:
        packages = json.loads(arguments.result.read_text(encoding="utf-8"))["dependencies"]
        affected = [package for package in packages if package.get("vulns")]
        skipped = sum("skip_reason" in package for package in packages)
        for package in affected:
            names = ", ".join(advisory["id"] for advisory in package["vulns"])
            print(f"{package['name']} {package['version']}: {names}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"audit: pip-audit gave no result ({error!r})")
        return 2
    checked = len(packages) - skipped
    print(
        f"audit: {checked} of {pinned} pinned packages were checked, {len(affected)} have known "
        "advisories"
    )
    if affected:
        return 1
    is_complete = len(packages) >= pinned and (not skipped or (arguments.lenient and not checked))
    return 0 if is_complete else 2


if __name__ == "__main__":
    sys.exit(main())
