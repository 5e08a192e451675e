"""Measure GPT-J-6B at full size on this machine: `python -m benchmarks.full_size FOLDER`.

Creates a float16 checkpoint with random weights in FOLDER (12 GB, sharded; kept for the next run),
converts it (6 GB), loads the result and trains it: LoRA on q and v, activation checkpointing, 8-bit
AdamW, one sequence of 512 tokens on a CPU or 2,048 on a GPU. Then evaluates it and the original.
Each step runs in its own process; its peak resident memory is reported by the operating system, and
on a GPU the peak GPU memory is shown too. Needs 20 GB of disk and 10 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from gptj8.runtime.process import UNUSED_IN_TRAINING, prepare_to_compute, set_defaults

CONFIG = {
    "architectures": ["GPTJForCausalLM"],
    "model_type": "gptj",
    "vocab_size": 50400,
    "n_positions": 2048,
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "rotary_dim": 64,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "tie_word_embeddings": False,
}
SEQUENCE_LENGTH = 512
TRAINED_LENGTH = {"cpu": SEQUENCE_LENGTH, "cuda": 2048}


def make(folder: Path) -> dict[str, float]:
    """Write the random checkpoint, one shard per layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import GPTJConfig, GPTJForCausalLM

    if (folder / "model.safetensors.index.json").exists():
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = GPTJForCausalLM(GPTJConfig(**CONFIG))
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[2] if ".h." in name else name.split(".")[0]
        shards.setdefault(part, {})[name] = tuple(parameter.shape)
    weight_map, parameters = {}, 0
    for number, (part, shapes) in enumerate(shards.items()):
        torch.manual_seed(number)
        tensors = {}
        for name, shape in shapes.items():
            scale = 1.0 if "ln_" in name and name.endswith("weight") else 0.02
            tensors[name] = (torch.randn(shape) * scale).half()
            parameters += tensors[name].numel()
        file = f"model-{part}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {"parameters": parameters}


def copy(source: Path, target: Path) -> dict[str, float]:
    """Read all bytes and write half of them, like a conversion; the baseline for its time."""
    started = time.perf_counter()
    target.mkdir(parents=True)
    for file in sorted(source.glob("*.safetensors")):
        with open(file, "rb") as stream, open(target / file.name, "wb") as out:
            keep = True
            while chunk := stream.read(1 << 24):
                if keep:
                    out.write(chunk)
                keep = not keep
            out.flush()
            os.fsync(out.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return {"seconds": seconds}


def convert(source: Path, target: Path) -> dict[str, float]:
    """Convert; see `gptj8.quantization.conversion`."""
    import gptj8

    shutil.rmtree(target, ignore_errors=True)
    started = time.perf_counter()
    report = gptj8.convert_checkpoint(source, target, gptj8.Blockwise8bitConfig())
    return {
        "seconds": time.perf_counter() - started,
        "bytes": report.converted_bytes,
        "parameters": report.parameters,
        "relative_rmse": report.relative_rmse,
    }


def load(converted: Path) -> dict[str, float]:
    """Load the converted model."""
    from gptj8.model.loading import load_model, pick_device, pick_dtype

    device = pick_device()
    started = time.perf_counter()
    load_model(converted, pick_dtype("auto", device), device)
    return {"seconds": time.perf_counter() - started}


def train(converted: Path) -> dict[str, float]:
    """Take two training steps; fail unless the loss is finite and all adapter weights change."""
    import bitsandbytes
    import torch

    from benchmarks.opponents.ours import training_loss
    from gptj8.model.adapters import AdapterSpec, add_adapter
    from gptj8.model.loading import load_model, pick_device, pick_dtype
    from gptj8.training.activation_checkpointing import set_checkpointing
    from gptj8.training.heap import trimmed

    device = pick_device()
    dtype = pick_dtype("auto", device)
    torch.manual_seed(0)
    model = add_adapter(load_model(converted, dtype, device), AdapterSpec(target="attention"))
    set_checkpointing(model, "full")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # loading is a separate step
    model.config.use_cache = False
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    before = [w.detach().clone() for w in weights]
    optimizer = bitsandbytes.optim.AdamW8bit(weights, lr=1e-3)
    length = TRAINED_LENGTH[device.type]
    ids = torch.randint(0, 50257, (1, length), device=device)
    taken = []
    with trimmed(model):
        for _ in range(2):
            started = time.perf_counter()
            loss = training_loss(model, ids)  # as the trainer computes it
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert torch.isfinite(loss), loss  # also synchronizes with a GPU
            taken.append(time.perf_counter() - started)
    moved = sum(not torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert moved == len(weights), f"{moved} of {len(weights)} adapter weights changed"
    return {
        "loss": float(loss),
        "seconds_per_step": min(taken),
        "tokens_per_second": length / min(taken),
    }


def evaluate(converted: Path) -> dict[str, float]:
    """Score documents, classify and generate with the 8-bit model, as the evaluate stage does."""
    from gptj8.model.generation.batch import generate_greedily
    from gptj8.model.loading import load_model, pick_device, pick_dtype
    from gptj8.model.scoring.likelihood import score_labels
    from gptj8.model.scoring.perplexity import score_documents

    device = pick_device()
    model = load_model(converted, pick_dtype("auto", device), device)
    documents = _documents(4)
    started = time.perf_counter()
    scores = score_documents(model, documents, [1] * len(documents), batch_size=16)
    seconds = time.perf_counter() - started
    labels = [[label, 1, 2] for label in range(10, 16)]
    score_labels(model, documents[:2], labels, batch_size=16)
    prompts = [document[:128] for document in documents]
    begun = time.perf_counter()
    written = generate_greedily(model, prompts, max_new_tokens=16, vocab_size=50257, eos_id=-1)
    return {
        "perplexity": scores.perplexity,
        "tokens_per_second": float(scores.tokens.sum()) / seconds,
        "generated_per_second": sum(map(len, written)) / (time.perf_counter() - begun),
    }


def evaluate_original(source: Path, converted: Path) -> dict[str, float]:
    """Score the same documents with the unquantized model, in the memory of its 8-bit copy."""
    from gptj8.model.loading import load_original, pick_device, pick_dtype
    from gptj8.model.scoring.perplexity import score_documents

    device = pick_device()
    model = load_original(source, converted, pick_dtype("auto", device), device)
    documents = _documents(4)
    started = time.perf_counter()
    scores = score_documents(model, documents, [1] * len(documents), batch_size=16)
    seconds = time.perf_counter() - started
    return {
        "perplexity": scores.perplexity,
        "tokens_per_second": float(scores.tokens.sum()) / seconds,
    }


def _documents(count: int) -> list[list[int]]:
    import torch

    torch.manual_seed(0)
    return torch.randint(0, 50257, (count, SEQUENCE_LENGTH)).tolist()


def _gpu_peak() -> dict[str, float]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    return {"gpu_peak_gb": torch.cuda.max_memory_allocated() / 1e9}


STEPS = {
    "make": make,
    "copy": copy,
    "convert": convert,
    "load": load,
    "train": train,
    "evaluate": evaluate,
    "evaluate-original": evaluate_original,
}


def run(step: str, *folders: Path) -> dict[str, float]:
    """Run one step in a separate process; add the peak resident memory of the process in GB."""
    command = [sys.executable, "-m", "benchmarks.full_size", "--step", step, *map(str, folders)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{step} failed")
    result = {**json.loads(output.splitlines()[-1]), "peak_gb": usage.ru_maxrss * 1024 / 1e9}
    print(
        f"{step}: " + ", ".join(f"{key} {value:,.4g}" for key, value in result.items()), flush=True
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", choices=STEPS, help="run one step in this process")
    parser.add_argument("--runs", type=int, default=3, help="alternating copies and conversions")
    parser.add_argument("folders", nargs="+", type=Path)
    arguments = parser.parse_args()
    if arguments.step:
        # Use the same settings as the stages.
        if arguments.step in ("make", "copy", "convert"):
            set_defaults()
        else:
            prepare_to_compute(UNUSED_IN_TRAINING if arguments.step == "train" else ())
        print(json.dumps(STEPS[arguments.step](*arguments.folders) | _gpu_peak()))
        return
    (folder,) = arguments.folders
    source, converted = folder / "float16", folder / "8bit"
    run("make", source)
    ratios = []
    for _ in range(arguments.runs):
        copied = run("copy", source, folder / "copy")
        ratios.append(run("convert", source, converted)["seconds"] / copied["seconds"])
    loaded = run("load", converted)
    run("train", converted)
    run("evaluate", converted)
    run("evaluate-original", source, converted)
    size = sum(f.stat().st_size for f in converted.glob("*.safetensors")) / 1e9
    print(f"conversion takes {statistics.median(ratios):.2f}x the time of copying")
    print(f"loading peaks at {loaded['peak_gb'] / size:.2f}x the file size of {size:.3f} GB")


if __name__ == "__main__":
    main()
