"""Stage `evaluate`: measure the effects of 8-bit conversion and of fine-tuning.

python -m stages.evaluate
"""

from __future__ import annotations

import time

from gptj8.params.sections import load_params
from gptj8.runtime.distributed import join, launch, leave
from gptj8.runtime.files import write_json
from gptj8.runtime.process import run
from gptj8.runtime.project import ADAPTER, BASE, DATASET, REPORTS
from gptj8.runtime.story import Story
from gptj8.tracking.stage import stage_run

REPORT = REPORTS / "evaluate"


def main() -> None:
    """Evaluate the original, the 8-bit and the tuned model on the same held-out rows."""
    params = load_params()
    if launch(params.finetune.launcher, "stages.evaluate"):
        return
    story = Story("evaluate")
    with stage_run("evaluate", params):
        from gptj8.dataset.prepared.dataset import load_prepared
        from gptj8.evaluation.run import Evaluation

        started = time.perf_counter()
        evaluation = Evaluation.prepare(params, load_prepared(DATASET), BASE)
        story.say(str(evaluation))
        for line in evaluation.measure_baseline():
            story.say(line)
        join()
        for line in evaluation.measure_models(BASE, ADAPTER):
            story.say(line)
        leave()
        metrics = evaluation.report(REPORT, started)
        write_json(REPORT / "metrics.json", metrics)
    ratio = metrics["quantized/perplexity_ratio"]
    story.end(f"8-bit perplexity is {ratio:.5f} times the original's ({REPORT})")


if __name__ == "__main__":
    run(main, computes=True)
