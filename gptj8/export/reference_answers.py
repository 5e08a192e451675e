"""Save reference answers of the trained model, and compare copies of the model with them.

An exported adapter can differ from the trained one. So the training process writes logits and
continuations of real prompts next to the adapter, and a new process loads the export and recomputes
them (`gptj8.export.replay`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gptj8.export import replay
from gptj8.model.loading import ADAPTER_FILE
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import sha256_file
from gptj8.runtime.messages import why_process_failed
from gptj8.runtime.progress import Progress, each

REFERENCE_FILE = "reference_answers.safetensors"

PROMPTS = 100
"""Maximum number of prompts to compare."""

_DIGEST = "adapter_sha256"
_TOKENS = 1 << 14  # of all prompts together; takes 1 to 10 minutes with a large model on a CPU


def choose_prompts(prompts: Iterable[Sequence[int]]) -> list[Sequence[int]]:
    """Return the first prompts, limited to `PROMPTS` prompts and 16,384 tokens."""
    chosen: list[Sequence[int]] = []
    tokens = 0
    for prompt in prompts:
        tokens += len(prompt)
        if len(chosen) == PROMPTS or (chosen and tokens > _TOKENS):
            break
        chosen.append(prompt)
    return chosen


def save_reference(
    folder: str | Path,
    model: torch.nn.Module,
    prompts: Iterable[Sequence[int]],
    end_ids: Sequence[int],
) -> None:
    """Write prompts, the model's answers and the adapter's digest to the folder of the adapter.

    Args:
        folder: Folder of the saved adapter.
        model: The trained model with its adapter.
        prompts: Token ids; only the first are used, see `choose_prompts`.
        end_ids: Tokens that end an answer.
    """
    prompts = choose_prompts(prompts)
    model.eval()
    shown = each(prompts, len(prompts), "reference answers", "prompts")
    answers = [replay.answer(model, prompt, end_ids) for prompt in shown]
    tensors = {
        "logits": torch.stack([logits for logits, _ in answers]),
        "eos_id": torch.tensor(list(end_ids)),
    }
    for number, (prompt, (_, tokens)) in enumerate(zip(prompts, answers, strict=True)):
        tensors[f"prompt.{number:03d}"] = torch.tensor(list(prompt))
        tensors[f"answer.{number:03d}"] = tokens.clone()
    digest = {_DIGEST: sha256_file(Path(folder) / ADAPTER_FILE)}
    save_file(tensors, Path(folder) / REFERENCE_FILE, metadata=digest)


def require_unchanged(folder: str | Path) -> None:
    """Raise an error if an adapter is not byte-identical to the one with the reference answers.

    Raises:
        UserError: If the adapter was changed, or there are no reference answers.
    """
    file = Path(folder) / REFERENCE_FILE
    if not file.is_file():
        raise UserError(f"{file} does not exist; rerun finetune")
    with safe_open(file, framework="pt") as reference:
        expected = (reference.metadata() or {}).get(_DIGEST)
    found = sha256_file(Path(folder) / ADAPTER_FILE)
    if found != expected:
        raise UserError(
            f"{Path(folder) / ADAPTER_FILE} was changed after training: its SHA-256 is {found}, "
            f"not {expected}; restore it with `dvc checkout`, or rerun finetune"
        )


def compare_in_fresh_process(
    reference: str | Path,
    model: str | Path,
    adapter: str | Path | None,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, float]:
    """Load a saved model in a new process and compare its answers with the reference answers.

    Args:
        reference: Folder of the adapter, with the output of `save_reference`.
        model: Directory of a converted or merged model.
        adapter: Adapter to load onto the model, or None.
        dtype: Compute dtype.
        device: CPU or GPU.

    Returns:
        `max_logit_difference`: maximum absolute difference at the first new token over all prompts;
        0.0 if the model is unchanged and was trained on the same machine. `compared_prompts`:
        number of prompts. `identical_generations`: number of prompts with the same new tokens.

    Raises:
        UserError: If there are no reference answers, or the model cannot be loaded.
    """
    file = Path(reference) / REFERENCE_FILE
    if not file.is_file():
        raise UserError(f"{file} does not exist; rerun finetune")
    command = [sys.executable, "-P", replay.__file__, str(model), str(file)]
    command += ["--dtype", str(dtype).removeprefix("torch."), "--device", device.type]
    if adapter is not None:
        command += ["--adapter", str(adapter)]
    # Sums round differently with another number of threads.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    if adapter is not None:  # a merged model must load without this package
        paths = [str(Path(replay.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    code, last, errors = _run(command, environment)
    if code:
        reason = why_process_failed(code, errors)
        raise UserError(f"cannot load {adapter or model} in a new process: {reason}")
    return json.loads(last)


def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str, str]:
    """Run `gptj8.export.replay` and show its progress.

    Returns:
        Exit code, last line of stdout, and stderr.
    """
    shown, last = None, ""
    # stderr goes to a file, because a second pipe would fill up while it is not read.
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                counted = re.fullmatch(r"(\d+) of (\d+)\n", line)
                if counted is None:
                    last = line
                    continue
                shown = shown or Progress(int(counted[2]), "answers in a new process", "prompts")
                shown()
        except BaseException:
            process.kill()
            raise
        finally:
            if shown is not None:
                shown.close()
        code = process.wait()
        errors.seek(0)
        return code, last, errors.read()
