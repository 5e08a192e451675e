"""Measure the perplexity cost of 8 bits: `python -m benchmarks.perplexity [MODEL [DATASET]]`.

Compares the model in float32 with its 8-bit versions with the dynamic and the fitted codebook, on
the test split written by `validate`. Prints the ratio of perplexities with its 95 % confidence
interval from a paired bootstrap over documents.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from gptj8 import Blockwise8bitConfig
from gptj8.dataset.prepared.dataset import load_prepared
from gptj8.dataset.prepared.prompts import TextEncoder
from gptj8.evaluation.statistics import perplexity_ratio
from gptj8.evaluation.suite import Documents
from gptj8.model.scoring.perplexity import DocumentScores, score_documents
from gptj8.runtime.process import run

BATCH_SIZE = 16
RESAMPLES = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default="data/models/tiny-gptj/model")
    parser.add_argument("dataset", nargs="?", type=Path, default="artifacts/dataset")
    arguments = parser.parse_args()
    texts = load_prepared(arguments.dataset).split("test")["text"]
    documents = Documents.of_texts(texts, TextEncoder.load(arguments.model))

    def scores(codebook: str | None) -> DocumentScores:
        quantization = (
            {"quantization_config": Blockwise8bitConfig(codebook=codebook)} if codebook else {}
        )
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.float32, **quantization
        )
        return score_documents(
            model.eval(),
            documents.ids,
            documents.starts,
            batch_size=BATCH_SIZE,
            description=codebook or "float32",
        )

    original = scores(None)
    print(f"{len(texts)} documents, {int(original.tokens.sum()):,} tokens\n")
    print("| weights | perplexity | ratio to float32 | 95 % interval |\n|---|---|---|---|")
    print(f"| float32 | {original.perplexity:.4f} | 1 | |")
    for codebook in ("dynamic", "fitted"):
        quantized = scores(codebook)
        ratio = perplexity_ratio(
            quantized.nll,
            original.nll,
            original.tokens,
            resamples=RESAMPLES,
            rng=np.random.default_rng(0),
        )
        print(
            f"| {codebook} | {quantized.perplexity:.4f} | {ratio.value:.6f} | "
            f"{ratio.low:.6f} to {ratio.high:.6f} |"
        )


if __name__ == "__main__":
    run(main)
