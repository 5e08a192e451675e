"""Assemble the export: the adapter and everything needed to use and evaluate it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptj8.dataset.prepared.dataset import PreparedDataset
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.export.model_card import hub_name, model_card
from gptj8.export.reference_answers import require_unchanged
from gptj8.model.loading import ADAPTER_CONFIG, ADAPTER_FILE
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import list_files, read_json, write_json
from gptj8.runtime.manifest import write_manifest

MERGED = "merged"

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_IDENTICAL = 0.9


def collect(adapter: Path, base: Path, folder: Path, original: Path) -> None:
    """Copy the adapter and the tokenizer to `folder`, with the name of the original base model.

    Args:
        adapter: Output folder of stage `finetune`.
        base: Folder of the converted base model, with its tokenizer.
        folder: Existing folder to copy to.
        original: Folder of the base model before its conversion, which PEFT loads by this name.

    Raises:
        UserError: If the adapter is incomplete or was changed after training.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_FILE):
        if not (adapter / name).is_file():
            raise UserError(f"{adapter} has no {name}; rerun finetune")
        shutil.copyfile(adapter / name, folder / name)
    require_unchanged(adapter)
    name, revision = hub_name(original)
    config = {"base_model_name_or_path": name, "revision": revision}
    write_json(folder / ADAPTER_CONFIG, {**read_json(folder / ADAPTER_CONFIG), **config})
    copy_tokenizer(base, folder)


def describe(
    folder: Path,
    params: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, float]],
    dataset: Mapping[str, Any],
) -> None:
    """Write params, metrics, dataset description, model card and the manifest to `folder`.

    Args:
        folder: Folder of the export.
        params: Resolved params.
        metrics: Stage -> flat name -> value, including the export's own metrics.
        dataset: Task, labels, template and digests of the dataset files.
    """
    write_json(folder / "params.json", params)
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "dataset.json", dataset)
    (folder / "README.md").write_text(model_card(params, metrics, dataset), encoding="utf-8")
    write_manifest(folder)


def describe_dataset(prepared: Path, inputs: Path) -> dict[str, Any]:
    """Return the description of a prepared dataset, with DVC's digests of its input files and of
    itself."""
    digests = read_json(inputs)
    return {**read_json(prepared / "dataset.json"), **digests}


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files that exist."""
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_chat(folder: Path, dataset: PreparedDataset, encoder: TextEncoder) -> None:
    """Write how conversations were written in training, as transformers reads it.

    `apply_chat_template` then gives the prompts of training, and `generate` ends with an answer.

    Args:
        folder: Folder with a tokenizer, and with generation_config.json if it has a model.
        dataset: The dataset of the training; nothing is written if its rows are prompts.
        encoder: The model's tokenizer.
    """
    if dataset.chat is None:
        return
    (folder / "chat_template.jinja").write_text(dataset.chat.template, encoding="utf-8")
    file = folder / "generation_config.json"
    if file.is_file():
        write_json(file, {**read_json(file), "eos_token_id": list(dataset.end_ids(encoder))})


def adapter_bytes(folder: Path) -> int:
    """Return the size of the export in bytes, without a merged model."""
    return sum(f.stat().st_size for f in list_files(folder) if MERGED not in f.parts)


def require_same_answers(compared: Mapping[str, float], what: str) -> None:
    """Raise an error if a copy does not give the same answers as the trained model.

    Args:
        compared: From `reference_answers.compare_in_fresh_process`.
        what: Name of the copy in the error message.

    Raises:
        UserError: If the tokens differ for more than a tenth of the prompts. Some differences are
            allowed, because rounding on another machine can change the token in a near tie.
    """
    same, of = compared["identical_generations"], compared["compared_prompts"]
    if same < _IDENTICAL * of:
        raise UserError(
            f"{what} answers only {same:.0f} of {of:.0f} prompts as the trained model did (logits "
            f"differ by up to {compared['max_logit_difference']:.3g}), so it was not exported; "
            "rerun finetune on this machine"
        )
