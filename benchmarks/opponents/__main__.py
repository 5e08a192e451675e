"""List the systems, or make environments: `python -m benchmarks.opponents install [NAME ...]`."""

from __future__ import annotations

import argparse
import sys

from benchmarks.opponents import OPPONENTS
from benchmarks.opponents.environments import NotInstalled, python_of
from benchmarks.opponents.isa import ISAS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("list", "install"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--isa", choices=ISAS, default="native", help="for what is compiled here")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(OPPONENTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(OPPONENTS)}")
    names = arguments.names or list(OPPONENTS)
    failures = 0
    for name in names:
        if arguments.action == "list":
            opponent = OPPONENTS[name]
            packages = ", ".join(opponent.requires) or "the project's environment"
            print(f"{name}: {opponent.what} ({packages})")
            continue
        try:
            print(f"{name}: {python_of(name, arguments.isa)}")
        except NotInstalled as error:
            print(f"{name}: {error}")
            failures += 1
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
