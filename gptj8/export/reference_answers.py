"""What the trained model answered before it was saved, so that a copy can be proven equal.

Adapters have been exported that differ from what was trained. So the training process itself writes
logits and continuations of real prompts beside the adapter, and a process that knows nothing of it
loads the export and computes them again (`gptj8.export.replay`).
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
from gptj8.runtime.progress import Progress, each

REFERENCE_FILE = "reference_answers.safetensors"

PROMPTS = 100
"""At most so many prompts are compared."""

_DIGEST = "adapter_sha256"
_TOKENS = 1 << 14  # of all prompts together: a minute or ten of a large model on a CPU


def choose_prompts(prompts: Iterable[Sequence[int]]) -> list[Sequence[int]]:
    """Return the first prompts, as many as are compared."""
    chosen: list[Sequence[int]] = []
    tokens = 0
    for prompt in prompts:
        tokens += len(prompt)
        if len(chosen) == PROMPTS or (chosen and tokens > _TOKENS):
            break
        chosen.append(prompt)
    return chosen


def save_reference(
    folder: str | Path, model: torch.nn.Module, prompts: Iterable[Sequence[int]], eos_id: int
) -> None:
    """Write prompts and the model's answers into the folder in which its adapter was saved, with
    the adapter's digest.

    Args:
        folder: of the adapter.
        model: with the adapter, as it was trained.
        prompts: token ids; the first ones are taken, as `choose_prompts` says.
        eos_id: ends an answer.
    """
    prompts = choose_prompts(prompts)
    model.eval()
    shown = each(prompts, len(prompts), "answers to compare exports with", "prompts")
    answers = [replay.answer(model, prompt, eos_id) for prompt in shown]
    tensors = {
        "logits": torch.stack([logits for logits, _ in answers]),
        "eos_id": torch.tensor(eos_id),
    }
    for number, (prompt, (_, tokens)) in enumerate(zip(prompts, answers, strict=True)):
        tensors[f"prompt.{number:03d}"] = torch.tensor(list(prompt))
        tensors[f"answer.{number:03d}"] = tokens.clone()
    digest = {_DIGEST: sha256_file(Path(folder) / ADAPTER_FILE)}
    save_file(tensors, Path(folder) / REFERENCE_FILE, metadata=digest)


def require_unchanged(folder: str | Path) -> None:
    """Refuse an adapter that is not, byte for byte, the one whose answers were written down.

    Raises:
        UserError: also if nothing was written down.
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
            f"not {expected}; `dvc checkout` brings it back, or rerun finetune"
        )


def compare_in_fresh_process(
    reference: str | Path,
    model: str | Path,
    adapter: str | Path | None,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, float]:
    """Load a model from the disk in a process of its own and compare what it answers.

    Args:
        reference: the adapter's folder, in which `save_reference` wrote.
        model: a model directory, converted or merged.
        adapter: to put on it.
        dtype: of the arithmetic.
        device: CPU or GPU.

    Returns:
        `max_logit_difference`, absolute, over the first new token of all prompts: 0.0 where
        nothing was lost and the machine is the one that trained; `compared_prompts`, and
        `identical_generations`: how many of them are continued by the same tokens.

    Raises:
        UserError: if there is no reference, or the model cannot be loaded.
    """
    file = Path(reference) / REFERENCE_FILE
    if not file.is_file():
        raise UserError(f"{file} does not exist; rerun finetune")
    command = [sys.executable, "-P", replay.__file__, str(model), str(file)]
    command += ["--dtype", str(dtype).removeprefix("torch."), "--device", device.type]
    if adapter is not None:
        command += ["--adapter", str(adapter)]
    # With another number of threads, or other kernels, sums round differently.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    if adapter is not None:  # a merged model has to do without this package
        paths = [str(Path(replay.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    code, last, errors = _run(command, environment)
    if code:
        reason = (errors.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{adapter or model} cannot be loaded by a new process: {reason[:300]}")
    return json.loads(last)


def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str, str]:
    """Run `gptj8.export.replay`, show how far it is, and return its exit code, its last line and
    what it wrote to stderr."""
    shown, last = None, ""
    # stderr in a file: a second pipe would fill up while nobody reads it.
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
                shown = shown or Progress(int(counted[2]), "answers of a new process", "prompts")
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
