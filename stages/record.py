"""Stage `record`: the experiment's row in MLflow, whole whatever came from DVC's cache.

A stage that DVC takes from its cache starts no process and so records nothing. This one runs
whenever a param or a report is another than the last time, records what is missing, and has no
outputs that DVC could take from a cache in its place.

python -m stages.record
"""

from __future__ import annotations

from gptj8.params.sections import load_params
from gptj8.runtime.process import run
from gptj8.runtime.story import Story
from gptj8.tracking.stage import stage_run


def main() -> None:
    """Record what the stages have left in reports/ and artifacts/."""
    story = Story("record")
    with stage_run("record", load_params()) as record:
        pass  # what lies there is all there is to record
    story.end(record.outcome())


if __name__ == "__main__":
    run(main)
