"""Download GPT-J-6B with the recipe in ../hub; its revision has only PyTorch weights."""

from __future__ import annotations

import runpy

from gptj8.runtime.process import run

if __name__ == "__main__":
    main = runpy.run_path("../hub/download.py")["main"]
    run(lambda: main(pytorch_weights=True))
