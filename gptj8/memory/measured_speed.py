"""How fast this machine trains, as the last run of the finetune stage measured it.

Kept at the project's top in .gptj8/calibration.json, which neither git nor DVC knows: it is about
this machine.
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
    """What a run measured.

    Attributes:
        flops_per_second: of matrix products in training steps, padding included.
        process_bytes: what the stage's libraries took; 0 on a GPU.
    """

    flops_per_second: float
    process_bytes: int = 0


def read(device: str, dtype: str) -> Calibration | None:
    """Return what was measured on a device in an arithmetic, None if nothing was."""
    file = project_root() / FILE
    try:
        content = read_json(file)
        return Calibration(**content[_key(device, dtype)])
    except (UserError, KeyError, TypeError):
        return None


def write(device: str, dtype: str, measured: Calibration) -> None:
    """Keep what was measured, in place of what was there for the same device and arithmetic."""
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
