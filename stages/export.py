"""Stage `export`: the adapter, ready to hand over, proven equal to what was trained.

python -m stages.export
"""

from __future__ import annotations

from pathlib import Path

from gptj8.files import read_json, replace_directory, write_json
from gptj8.params import load_params, resolved
from gptj8.runtime import run
from gptj8.tracking import REPORTS, STAGES, stage_run

BASE = Path("artifacts/base-8bit")
ADAPTER = Path("artifacts/adapter")
OUTPUT = Path("artifacts/export")
REPORT = REPORTS / "export"


def main() -> None:
    """Collect, reload from disk, compare, and only then put the export in place."""
    params = load_params()
    with stage_run("export", params) as record:
        from gptj8.export import MERGED, adapter_bytes, collect, compare_with_trained, merge
        from gptj8.models import pick_device, pick_dtype

        device = pick_device()
        dtype = pick_dtype(params.model.dtype, device)
        earlier = STAGES[: STAGES.index("export")]
        measured = {stage: read_json(REPORTS / stage / "metrics.json") for stage in earlier}
        with replace_directory(OUTPUT) as staging:
            collect(ADAPTER, BASE, staging, resolved(params), measured)
            metrics = {
                "adapter_bytes": adapter_bytes(staging),
                "max_logit_difference": compare_with_trained(staging, ADAPTER, BASE, dtype, device),
            }
            if params.export.merge:
                metrics["merged_logit_difference"] = merge(staging, BASE, ADAPTER, device)
        write_json(REPORT / "metrics.json", metrics)
        for file in sorted(OUTPUT.iterdir()):
            if file.name != MERGED:
                record.log_artifact(file, OUTPUT.name)
        if params.tracking.registered_model_name:
            record.register_model(params.tracking.registered_model_name, OUTPUT.name)


if __name__ == "__main__":
    run(main)
