"""Read and write the training speed of this machine, measured by the last run of stage finetune.

The calibration is stored in .gptj8/calibration.json in the project root. Neither git nor DVC tracks
this file, because it describes one machine.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptj8.runtime.errors import UserError
from gptj8.runtime.files import read_json, write_json
from gptj8.runtime.project import project_root

FILE = Path(".gptj8/calibration.json")


@dataclass(frozen=True)
class Calibration:
    """Measurements of a run.

    Attributes:
        flops_per_second: Speed of matrix products in training steps, including padding.
        process_bytes: Memory of Python and the stage's libraries; 0 on a GPU.
    """

    flops_per_second: float
    process_bytes: int = 0


def read(device: str, dtype: str) -> Calibration | None:
    """Return the calibration for a device and dtype, or None if there is none."""
    file = project_root() / FILE
    try:
        content = read_json(file)
        return Calibration(**content[_key(device, dtype)])
    except (UserError, KeyError, TypeError):
        return None


def write(device: str, dtype: str, measured: Calibration) -> None:
    """Save a calibration and replace the previous one for the same device and dtype."""
    file = project_root() / FILE
    content: dict[str, Any] = {}
    if file.is_file():
        try:
            content = dict(read_json(file))
        except (UserError, TypeError, ValueError):
            content = {}
    write_json(file, {**content, _key(device, dtype): asdict(measured)})


def _key(device: str, dtype: str) -> str:
    return f"{device}, {dtype}"
