"""From prepared rows to what a model is trained on: ids, and which of them are learned.

Only the completion is learned: the loss of prompt tokens is masked, by position and not by the
padding token's id, because where padding is the end-of-text token a model that never sees its end
never learns to stop. Running text has no prompt: every token is learned, and documents are packed.
"""

from __future__ import annotations

from collections.abc import Sequence

from gptj8.dataset import PreparedDataset
from gptj8.prompts import PromptEncoder, TextEncoder

IGNORED = -100
"""The label of a token that is not learned, by torch's convention."""

Example = dict[str, list[int]]
"""`input_ids` and, as long, `labels`."""


def split_examples(dataset: PreparedDataset, split: str, prompts: PromptEncoder) -> list[Example]:
    """Encode one split of a prepared dataset, as its task asks."""
    rows = dataset.split(split)
    if dataset.task == "text":
        return text_examples(list(rows["text"]), prompts.encoder, prompts.max_length)
    prompt, completion = prompt_columns(dataset.task)
    return completion_examples(list(zip(rows[prompt], rows[completion], strict=True)), prompts)


def prompt_columns(task: str) -> tuple[str, str]:
    """Return the columns of a prepared dataset that hold prompt text and completion."""
    return ("prompt", "completion") if task == "completion" else ("text", "label")


def prompt_ids(example: Example) -> list[int]:
    """Return the ids before the first one that is learned; all of them for running text."""
    ids, labels = example["input_ids"], example["labels"]
    learned_from = next(i for i, label in enumerate(labels) if label != IGNORED)
    return ids[:learned_from] or ids


def completion_examples(rows: Sequence[tuple[str, str]], prompts: PromptEncoder) -> list[Example]:
    """Encode (text, completion) rows; labels are masked on the prompt."""
    examples = []
    for text, completion in rows:
        encoded = prompts.example(text, completion)
        learned = encoded.ids[encoded.prompt_length :]
        labels = [IGNORED] * encoded.prompt_length + learned
        examples.append({"input_ids": encoded.ids, "labels": labels})
    return examples


def text_examples(texts: Sequence[str], encoder: TextEncoder, max_length: int) -> list[Example]:
    """Pack documents end to end into examples of exactly `max_length` tokens, every one learned.

    Each document is closed by the end-of-text token. The last example may be shorter.
    """
    stream: list[int] = []
    for ids in encoder.encode_batch(list(texts)):
        stream += [*encoder.prefix_ids, *ids, encoder.eos_id]
    pieces = [stream[start : start + max_length] for start in range(0, len(stream), max_length)]
    return [{"input_ids": piece, "labels": list(piece)} for piece in pieces if len(piece) > 1]
