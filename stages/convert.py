"""Stage `convert`: convert the base model's large weights to 8 bits.

python -m stages.convert
"""

from __future__ import annotations

import time
from dataclasses import asdict, fields

from gptj8.params.sections import load_params
from gptj8.runtime.files import write_json
from gptj8.runtime.machine import peak_memory_gib
from gptj8.runtime.process import run
from gptj8.runtime.project import BASE, REPORTS
from gptj8.runtime.story import Story
from gptj8.runtime.tables import write_csv
from gptj8.tracking.stage import stage_run

REPORT = REPORTS / "convert"


def main() -> None:
    """Convert `model.path` with the settings of the params' `quantization` section."""
    story = Story("convert")
    params = load_params()
    story.say(
        f"{params.model.path} to 8 bits, block size {params.quantization.block_size:,} "
        f"(embeddings {params.quantization.embedding_block_size:,}), "
        f"{params.quantization.codebook} codebook"
    )
    with stage_run("convert", params):
        from gptj8.quantization.conversion import TensorError, convert_checkpoint, summarize
        from gptj8.quantization.quantizer import Blockwise8bitConfig

        started = time.perf_counter()
        config = Blockwise8bitConfig.from_params(params.quantization)
        text = params.quantization.calibration
        report = convert_checkpoint(params.model.path, BASE, config, text)
        columns = [field.name for field in fields(TensorError)]
        write_csv(REPORT / "tensors.csv", map(asdict, report.tensors), columns)
        write_json(
            REPORT / "metrics.json",
            {
                "parameters": report.parameters,
                "source_bytes": report.source_bytes,
                "converted_bytes": report.converted_bytes,
                "relative_rmse": report.relative_rmse,
                "seconds": time.perf_counter() - started,
                "peak_memory_gib": peak_memory_gib(),
            },
        )
    story.end(summarize(report))


if __name__ == "__main__":
    run(main)
