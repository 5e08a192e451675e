"""Stage `record`: complete the experiment's MLflow run.

DVC starts no process for a stage whose outputs come from its cache, so such a stage records
nothing. This stage runs whenever a param or a report changed and records what is missing. It has no
outputs, so DVC cannot skip it by using its cache.

python -m stages.record
"""

from __future__ import annotations

from gptj8.params.sections import load_params
from gptj8.runtime.process import run
from gptj8.runtime.story import Story
from gptj8.tracking.stage import stage_run


def main() -> None:
    """Record the outputs of the stages in reports/ and artifacts/."""
    story = Story("record")
    with stage_run("record", load_params()) as record:
        pass  # `stage_run` records the existing outputs
    story.end(record.outcome())


if __name__ == "__main__":
    run(main)
