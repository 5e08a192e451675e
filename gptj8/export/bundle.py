"""The deliverable: an adapter with everything that someone else needs to use and to judge it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptj8.export.model_card import model_card
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


def collect(adapter: Path, base: Path, folder: Path) -> None:
    """Fill `folder` with what answers: the adapter and the tokenizer.

    Args:
        adapter: as the stage `finetune` leaves it.
        base: the converted base model, for its tokenizer.

    Raises:
        UserError: if the adapter is incomplete, or is not the one that was trained.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_FILE):
        if not (adapter / name).is_file():
            raise UserError(f"{adapter} has no {name}; rerun finetune")
        shutil.copyfile(adapter / name, folder / name)
    require_unchanged(adapter)
    copy_tokenizer(base, folder)


def describe(
    folder: Path,
    params: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, float]],
    dataset: Mapping[str, Any],
) -> None:
    """Put into `folder` what tells of it: params, metrics, the dataset's description, a model card,
    and then the manifest of all that is there.

    Args:
        params: resolved.
        metrics: stage -> flat name -> value, the export's own among them.
        dataset: task, labels, template and the digests of the files that were read.
    """
    write_json(folder / "params.json", params)
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "dataset.json", dataset)
    (folder / "README.md").write_text(model_card(params, metrics, dataset), encoding="utf-8")
    write_manifest(folder)


def describe_dataset(prepared: Path, inputs: Path) -> dict[str, Any]:
    """Return what is known of a prepared dataset: its own description, and the digests of the files
    it was made of and of itself, as DVC knows them."""
    digests = read_json(inputs)
    return {**read_json(prepared / "dataset.json"), **digests}


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy whichever files of a tokenizer there are."""
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def adapter_bytes(folder: Path) -> int:
    """Return the size of what a user of the adapter downloads, without a merged model."""
    return sum(f.stat().st_size for f in list_files(folder) if MERGED not in f.parts)


def require_same_answers(compared: Mapping[str, float], what: str) -> None:
    """Refuse a copy that does not answer as the trained model did.

    Args:
        compared: from `reference.compare_in_fresh_process`.
        what: is compared, for people.

    Raises:
        UserError: if more than a tenth of the prompts is continued by other tokens; rounding alone,
            as on another machine, turns a near tie here and there.
    """
    same, of = compared["identical_generations"], compared["compared_prompts"]
    if same < _IDENTICAL * of:
        raise UserError(
            f"{what} answers only {same:.0f} of {of:.0f} prompts as the trained model did (logits "
            f"differ by up to {compared['max_logit_difference']:.3g}); it was not exported. Rerun "
            "finetune on this machine"
        )
