"""Sum up what pip-audit has found out: `audit.py AUDIT.json [--unreachable-is-no-error]`.

Exits with 1 if a pinned package has a known advisory, and with 2 if packages could not be compared
with any: a clean result is one in which every package was. Where no database of advisories is in
reach, pip-audit itself says that it has found none.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--unreachable-is-no-error", action="store_true")
    arguments = parser.parse_args()
    unknown = 0 if arguments.unreachable_is_no_error else 2
    try:
        packages = json.loads(arguments.result.read_text(encoding="utf-8"))["dependencies"]
    except FileNotFoundError:
        print("audit: pip-audit has come to no result")
        return unknown
    skipped = [package for package in packages if "skip_reason" in package]
    affected = [package for package in packages if package.get("vulns")]
    for package in affected:
        names = ", ".join(advisory["id"] for advisory in package["vulns"])
        print(f"{package['name']} {package['version']}: {names}")
    print(
        f"audit: of {len(packages)} pinned packages {len(affected)} have known advisories, "
        f"{len(skipped)} could not be compared with any"
    )
    if affected:
        return 1
    return unknown if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
