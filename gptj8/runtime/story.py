"""Print the messages of a stage, from the reason why it runs to its result."""

from __future__ import annotations

import os
import time

from gptj8.runtime import progress
from gptj8.runtime.distributed import is_main_process
from gptj8.runtime.progress import format_seconds


class Story:
    """The messages of a stage, from the reason why it runs to its result. One per process.

    Args:
        stage: the stage's name, which starts every line.
    """

    def __init__(self, stage: str) -> None:
        self._stage = stage
        progress.set_speaker(stage)
        # Hide transformers' bar for each model that it loads: loading is instant, because weights
        # are memory-mapped. Code that downloads something does not use a Story.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        self._started = time.perf_counter()
        if os.environ.get("DVC_STAGE"):  # not if the stage was started by hand
            from gptj8.runtime.dvc_changes import explain

            self.say(explain(stage))

    def say(self, text: str) -> None:
        """Print a line. It is flushed, so that lines keep their order in a log."""
        if is_main_process():
            print(f"{self._stage}: {text}", flush=True)

    def end(self, text: str) -> None:
        """Print the result of the stage and its duration. Later lines have no stage name."""
        self.say(f"{text}; {format_seconds(time.perf_counter() - self._started)}")
        progress.set_speaker("")
