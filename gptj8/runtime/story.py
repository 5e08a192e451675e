"""What one stage says at the terminal, from why it runs to what came of it."""

from __future__ import annotations

import os
import time

from gptj8.runtime import progress
from gptj8.runtime.distributed import is_main_process
from gptj8.runtime.progress import format_seconds


class Story:
    """What one stage says, from why it runs to what came of it. One a process.

    Args:
        stage: its name, with which every line begins.
    """

    def __init__(self, stage: str) -> None:
        self._stage = stage
        progress.set_speaker(stage)
        # transformers shows a bar for each model that it loads, which takes no time: weights stay
        # in their file until they are used. Where a download is to be seen, no story is told.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        self._started = time.perf_counter()
        if os.environ.get("DVC_STAGE"):  # started by hand, it runs because somebody said so
            from gptj8.runtime.dvc_changes import explain

            self.say(explain(stage))

    def say(self, text: str) -> None:
        """Print a line now: in a log, what is kept back would stand behind what came later."""
        if is_main_process():
            print(f"{self._stage}: {text}", flush=True)

    def end(self, text: str) -> None:
        """Say what came of the stage, and how long it took; what follows is said by nobody."""
        self.say(f"{text}; {format_seconds(time.perf_counter() - self._started)}")
        progress.set_speaker("")
