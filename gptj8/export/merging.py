"""Merge the adapter into a 16-bit model and check that it matches the trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from gptj8.dataset.prepared.dataset import load_prepared
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.evaluation.statistics import Estimate, perplexity_ratio
from gptj8.evaluation.suite import Documents, held_out_documents
from gptj8.export.bundle import copy_tokenizer, require_same_answers, write_chat
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
    """Write the merged model, compare it with the trained model and return the differences.

    Args:
        params: All params.
        folder: Folder to create.
        device: Device of the comparison.
        dtype: Compute dtype of the comparison.

    Returns:
        The `merged_*` metrics.

    Raises:
        UserError: If its answers differ from the trained model's.
    """
    merge(BASE, ADAPTER, folder, torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    dataset, settings, encoder = load_prepared(DATASET), params.evaluate, TextEncoder.load(BASE)
    write_chat(folder, dataset, encoder)
    compared = compare_in_fresh_process(ADAPTER, folder, None, dtype, device)
    require_same_answers(compared, "the merged model")
    length = params.data.max_length
    _, documents = held_out_documents(
        dataset.task,
        dataset.split("test"),
        dataset.prompt_encoder(encoder, length),
        path=settings.perplexity_text,
        text_column=params.data.text_column,
        limit=settings.max_perplexity_documents,
        conversations=dataset.conversation_encoder(encoder, length),
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
    """Write a 16-bit model with the adapter merged into its weights; it needs only transformers.

    Each adapted matrix is dequantized to float32, merged and rounded once to 16 bits, because a
    merge in 8 bits would lose the adapter to rounding. Memory holds the 16-bit model and one
    float32 matrix.

    Args:
        base: Folder of the converted base model, with its tokenizer.
        adapter: Folder of the adapter; not changed.
        target: Folder to create.
        dtype: Dtype of the weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from gptj8.quantization.layers import Frozen8bitModule
    from gptj8.quantization.quantizer import restore_modules
    from gptj8.quantization.twins import full_precision_twin

    # Merge on the CPU: 16-bit weights are twice as large as the 8-bit weights that fit on the GPU.
    adapted = load_adapter(load_model(base, dtype, torch.device("cpu")), adapter)
    layers = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    if _share_a_weight(layers, adapted.get_base_model()):
        _untie(adapted.get_base_model())
    for module in layers:
        if isinstance(module.base_layer, Frozen8bitModule):
            module.base_layer = full_precision_twin(module.base_layer, torch.float32)
        module.merge()
        module.get_base_layer().to(dtype)
    merged = restore_modules(adapted.unload(), dtype)
    del merged.config.quantization_config
    merged.save_pretrained(target)
    copy_tokenizer(base, target)


def _share_a_weight(layers: Sequence[Any], model: Any) -> bool:
    """Return whether an adapted module has a weight that another module uses too."""
    users: dict[int, int] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users[weight.data_ptr()] = users.get(weight.data_ptr(), 0) + 1
    return any(users.get(layer.get_base_layer().weight.data_ptr(), 0) > 1 for layer in layers)


def _untie(model: Any) -> None:
    """Let head and embedding have weights of their own, so that a merge changes only one."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    for inner in model.modules():
        if hasattr(inner, "all_tied_weights_keys"):
            inner.all_tied_weights_keys = {}


def perplexity_against_tuned(
    model: PreTrainedModel,
    documents: Documents,
    tuned_nll: np.ndarray,
    *,
    batch_size: int,
    resamples: int,
    seed: int,
) -> Estimate:
    """Return the ratio of a model's perplexity to the tuned model's, which `evaluate` measured.

    Args:
        model: A model in eval mode.
        documents: The documents that `evaluate` scored.
        tuned_nll: (documents,) negative log-likelihood under the tuned model, in nats.
        batch_size: Maximum windows per forward pass.
        resamples: Resamples of the paired bootstrap.
        seed: Seed of the paired bootstrap.
    """
    scores = score_documents(
        model,
        documents.ids,
        documents.starts,
        batch_size=batch_size,
        description="merged: perplexity",
        spans=documents.spans,
    )
    rng = np.random.default_rng(seed)
    return perplexity_ratio(scores.nll, tuned_nll, scores.tokens, resamples=resamples, rng=rng)
