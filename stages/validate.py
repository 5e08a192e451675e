"""Stage `validate`: check and split the dataset, and write artifacts/dataset and reports/validate.

Reads the files named in the params' `data` section and the tokenizer of `model.path`. An unusable
dataset stops the pipeline here, before any model is loaded. If its files can be read, the report
shows the reasons and is also stored in MLflow. The report of an earlier dataset is always removed.
"""

from __future__ import annotations

import shutil

from gptj8.dataset.inputs import check_model
from gptj8.dataset.prepared.dataset import SPLITS
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.readers.row_shapes import shape_of
from gptj8.dataset.validation.checks import CHECKS
from gptj8.dataset.validation.conversation_rows import describe_template
from gptj8.dataset.validation.report import write_report
from gptj8.dataset.validation.run import validate
from gptj8.params.sections import load_params
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import replace_directory
from gptj8.runtime.messages import counted
from gptj8.runtime.process import run
from gptj8.runtime.project import DATASET, REPORTS
from gptj8.runtime.story import Story
from gptj8.tracking.stage import stage_run

STAGE = "validate"
REPORT = REPORTS / STAGE


def main() -> None:
    """Run the stage in the current folder."""
    story = Story(STAGE)
    params = load_params()
    check_model(params.model.path, params.data.max_length)
    story.say(
        f"{params.data.train}, task {params.data.task}, at most {params.data.max_length} tokens, "
        f"tokenizer of {params.model.path}"
    )
    encoder = TextEncoder.load(params.model.path)
    for line in describe_template(params.data, shape_of(params.data), encoder):
        story.say(line)
    with stage_run(STAGE, params), replace_directory(DATASET) as staging:
        try:
            validated = validate(params.data, encoder, staging)
        except UserError:
            shutil.rmtree(REPORT, ignore_errors=True)  # it is of another dataset
            raise
        write_report(REPORT, validated, params.data, staging)
        for note in validated.notes:
            story.say(note)
        if validated.problems:
            problems = "\n".join(validated.problems)
            raise UserError(f"{problems} (full report: {REPORT}/report.html)")
    sizes = ", ".join(f"{validated.rows[name]:,} {name}" for name in SPLITS)
    dropped = validated.findings.dropped_rows
    ignored = (
        f"; {counted(len(validated.ignored), 'file')} without rows or not read"
        if validated.ignored
        else ""
    )
    if validated.rewritten_rows:
        story.say(
            f"the chat template rewrites the earlier answers of "
            f"{counted(validated.rewritten_rows, 'conversation')}; each answer is an example"
        )
    total = validated.total_rows.total()
    kinds = [
        f"{CHECKS[check].heading}: {validated.findings.count(check):,}"
        for check in validated.findings.checks()
    ]
    if kinds:
        story.say(f"found {'; '.join(kinds)}")
    story.end(f"{total:,} rows read: {sizes}; {dropped:,} dropped{ignored} ({REPORT}/report.html)")


if __name__ == "__main__":
    run(main)
