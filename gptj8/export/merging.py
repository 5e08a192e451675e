"""A 16-bit model with the adapter merged into it, shown to answer as the trained model does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from gptj8.dataset.prepared.dataset import load_prepared
from gptj8.dataset.prepared.prompts import TextEncoder
from gptj8.evaluation.statistics import Estimate, perplexity_ratio
from gptj8.evaluation.suite import Documents, held_out_documents
from gptj8.export.bundle import copy_tokenizer, require_same_answers
from gptj8.export.reference_answers import compare_in_fresh_process
from gptj8.model.loading import load_adapter, load_model
from gptj8.model.scoring.perplexity import score_documents
from gptj8.runtime.project import ADAPTER, BASE, DATASET, REPORTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptj8.params.sections import Params


def export_merged(
    params: Params, folder: Path, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Write the merged model, prove it and return what it differs by.

    Args:
        folder: to make.
        device, dtype: of the arithmetic that it is compared in.

    Raises:
        UserError: if it does not answer as the trained model did.
    """
    merge(BASE, ADAPTER, folder, torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    compared = compare_in_fresh_process(ADAPTER, folder, None, dtype, device)
    require_same_answers(compared, "the merged model")
    dataset, settings = load_prepared(DATASET), params.evaluate
    _, documents = held_out_documents(
        dataset.task,
        dataset.split("test"),
        dataset.prompt_encoder(TextEncoder.load(BASE), params.data.max_length),
        path=settings.perplexity_text,
        text_column=params.data.text_column,
        limit=settings.max_perplexity_documents,
    )
    ratio = perplexity_against_tuned(
        load_model(folder, dtype, device),
        documents,
        pd.read_csv(REPORTS / "evaluate" / "perplexity.csv")["tuned_nll"].to_numpy(),
        batch_size=settings.per_device_eval_batch_size,
        resamples=settings.bootstrap_resamples,
        seed=params.seed,
    )
    return {
        "merged_logit_difference": compared["max_logit_difference"],
        "merged_identical_generations": compared["identical_generations"],
        "merged_perplexity_ratio": ratio.value,
        "merged_perplexity_ratio_low": ratio.low,
        "merged_perplexity_ratio_high": ratio.high,
    }


def merge(base: Path, adapter: Path, target: Path, dtype: torch.dtype) -> None:
    """Write a 16-bit model with the adapter merged into it, which needs nothing but transformers.

    Each adapted matrix is restored to float32 and merged there, because a merge into 8 bits would
    round the adapter away, and rounded to 16 bits once; so memory holds the 16-bit model and one
    matrix more.

    Args:
        base: the converted base model, with its tokenizer.
        adapter: not changed.
        target: folder to make.
        dtype: of the weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from gptj8.quantization.layers import Frozen8bitModule, full_precision_twin
    from gptj8.quantization.quantizer import restore_modules

    # On the CPU: 16-bit weights are twice what the GPU was chosen for.
    adapted = load_adapter(load_model(base, dtype, torch.device("cpu")), adapter)
    for module in list(adapted.modules()):
        if not isinstance(module, BaseTunerLayer):
            continue
        if isinstance(module.base_layer, Frozen8bitModule):
            module.base_layer = full_precision_twin(module.base_layer, torch.float32)
        module.merge()
        module.get_base_layer().to(dtype)
    merged = restore_modules(adapted.unload(), dtype)
    del merged.config.quantization_config
    merged.save_pretrained(target)
    copy_tokenizer(base, target)


def perplexity_against_tuned(
    model: PreTrainedModel,
    documents: Documents,
    tuned_nll: np.ndarray,
    *,
    batch_size: int,
    resamples: int,
    seed: int,
) -> Estimate:
    """Return a model's perplexity to the tuned one's, which `evaluate` has measured.

    Args:
        model: in eval mode.
        documents: the same that were measured then.
        tuned_nll: (documents,) what the tuned model made of them, in nats.
        batch_size: most windows in one forward pass.
        resamples, seed: of the paired bootstrap.
    """
    scores = score_documents(
        model,
        documents.ids,
        documents.starts,
        batch_size=batch_size,
        description="merged: perplexity",
    )
    rng = np.random.default_rng(seed)
    return perplexity_ratio(scores.nll, tuned_nll, scores.tokens, resamples=resamples, rng=rng)
