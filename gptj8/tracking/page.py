"""Configure what MLflow's page shows for an experiment.

By default, the page is made for agents and their traces, shows no metrics in the table of runs, and
draws 130 charts in alphabetical order. Tags of the experiment change this for every user: its kind,
a description, and a saved view, which the page lists under "Views" and `gptj8 ui` opens.
Only missing tags are set, so users' changes are kept.
"""

from __future__ import annotations

import json
from typing import Any

from gptj8.evaluation.systems import OWN_SYSTEMS

VIEW = "gptj8"
"""Key of the saved view in the page's URL."""
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
NOTE_TAG = "mlflow.note.content"
CHANGED_TAG = "params.changed"

_VIEW_NAME = "Key metrics"
_COLUMNS = {  # kind and key: width
    f"tags.`{CHANGED_TAG}`": 240,
    "metrics.`evaluate/tuned/accuracy`": 190,
    "metrics.`evaluate/base/accuracy`": 190,
    "metrics.`evaluate/tuned/perplexity`": 200,
    "metrics.`evaluate/quantized/perplexity_ratio`": 260,
    "metrics.`finetune/peak_memory_gib`": 210,
    "metrics.`evaluate/tuned/exact_match`": 210,
}
_CHARTS = {
    "evaluate/tuned/accuracy": "BAR",
    "evaluate/base/accuracy": "BAR",
    "finetune/loss": "LINE",
    "finetune/eval_loss": "LINE",
    "finetune/trainable_parameters": "BAR",
    "finetune/peak_memory_gib": "BAR",
}
_CLOSED_SECTIONS = (
    *("convert", "evaluate", *(f"evaluate/{system}" for system in OWN_SYSTEMS)),
    *("export", "finetune", "validate", "validate/findings", "Model metrics", "System metrics"),
)
"""Chart sections that start collapsed, because drawing all charts at once is slow."""
_EXPERIMENT_NOTE = """\
Fine-tuning on frozen 8-bit weights. A run is one combination of params, data, base model, code and
libraries. The tag `stage.<name>` shows whether DVC ran a stage or restored it from its cache (`ran`
or `cached`).

| metric | meaning |
|---|---|
| `evaluate/tuned/accuracy` | accuracy on the test rows after fine-tuning |
| `evaluate/base/accuracy` | accuracy of the original model before fine-tuning |
| `evaluate/quantized/kl_divergence` | cost of 8-bit weights in nats per token; 0 means no loss |
| `evaluate/quantized/perplexity_ratio` | the same as a ratio of perplexities; 1 means no loss |
| `finetune/peak_memory_gib` | peak memory of training |

Select runs and click Compare to see which params differ. The `predictions.json` of a run contains
its answer to every test row, and `examples.json` the prompts and answers of a few.
"""


def experiment_tags(time: int) -> dict[str, str]:
    """Return the tags for an experiment.

    Args:
        time: current time in milliseconds.
    """
    view = {"name": _VIEW_NAME, "createdAt": time, "updatedAt": time, "state": _view_state()}
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": "evaluate/tuned/accuracy",
        "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
        NOTE_TAG: _EXPERIMENT_NOTE,
        VIEW_TAG: json.dumps(view),
    }


def _view_state() -> str:
    """Return the state of the table and the charts in the page's own format."""
    shown = {"metricSectionId": VIEW, "deleted": False, "isGenerated": False}
    shown |= {"runsCountToCompare": 10}
    charts: list[dict[str, Any]] = [
        {"type": kind, "uuid": f"{VIEW}-{key}", "metricKey": key, **_AXES[kind], **shown}
        for key, kind in _CHARTS.items()
    ]
    difference = {
        "type": "DIFFERENCE",
        "uuid": f"{VIEW}-difference",
        "chartName": "Differences",
        "compareGroups": ["Parameters", "Model metrics"],
        "showChangeFromBaseline": True,
        "showDifferencesOnly": True,
        "baselineColumnUuid": "",
    }
    sections = [
        {"uuid": VIEW, "name": _VIEW_NAME, "display": True, "isReordered": True},
        *({"uuid": name, "name": name, "display": False} for name in _CLOSED_SECTIONS),
    ]
    state = {
        "selectedColumns": list(_COLUMNS),
        "columnWidths": _COLUMNS,
        "columnOrder": list(_COLUMNS),
        "compareRunCharts": [*charts, difference | shown],
        "compareRunSections": sections,
        "isAccordionReordered": True,  # otherwise the sections are sorted by name
    }
    return json.dumps(state, separators=(",", ":"))


_AXES: dict[str, dict[str, Any]] = {
    "BAR": {},
    "LINE": {
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "range": {},
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    },
}
