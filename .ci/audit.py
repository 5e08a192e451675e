"""Sum up what pip-audit has found out: `audit.py REQUIREMENTS AUDIT.json [--lenient]`.

Exits with 1 if a pinned package has a known advisory, and with 2 if not every pinned package was
compared with the advisories. Where no database of them is in reach, pip-audit skips all packages
and says that it has found nothing; that alone `--lenient` lets pass.
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
        print(f"audit: pip-audit has come to no result ({error!r})")
        return 2
    compared = len(packages) - skipped
    print(
        f"audit: of {pinned} pinned packages {compared} were compared with known advisories, and "
        f"{len(affected)} have some"
    )
    if affected:
        return 1
    is_whole = len(packages) >= pinned and (not skipped or (arguments.lenient and not compared))
    return 0 if is_whole else 2


if __name__ == "__main__":
    sys.exit(main())
