"""Stage `record`: the experiment's row in MLflow, whole, and its result at the terminal.

A stage that DVC takes from its cache starts no process and so records nothing. This one runs
whenever a param or a report is another than the last time, records what is missing, and has no
outputs that DVC could take from a cache in its place.

python -m stages.record
"""

from __future__ import annotations

from gptj8.files import read_json
from gptj8.params import load_params
from gptj8.runtime import run
from gptj8.summary import summary_lines
from gptj8.tracking import REPORTS, STAGES, flatten, stage_run


def main() -> None:
    """Record what the stages have left in reports/, and print what matters of it."""
    with stage_run("record", load_params()):
        measured = {
            f"{stage}/{key}": value
            for stage in STAGES
            for key, value in flatten(read_json(REPORTS / stage / "metrics.json"), "/").items()
        }
    print()
    for line in summary_lines(measured):
        print(line)


if __name__ == "__main__":
    run(main)
