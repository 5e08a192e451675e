"""Compare estimated and measured peak training memory: `python -m benchmarks.memory FOLDER`.

Each configuration is trained for two steps (one step if a step takes a minute) in its own process,
as in the finetune stage. The estimate is made before the model is loaded, and the measured peak is
that of the process (VmHWM). The models have random 8-bit weights, are created in FOLDER and are
removed afterwards. `--full-size` adds GPT-J-6B: 6 GB of disk, 8 GB of memory, several minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptj8.runtime.process import UNUSED_IN_TRAINING, prepare_to_compute

if TYPE_CHECKING:
    from gptj8.training.activation_checkpointing import Kind

_GPTJ = {"model_type": "gptj", "n_positions": 2048, "n_head": 16, "rotary_dim": 64}
_LLAMA = {"model_type": "llama", "num_attention_heads": 16, "num_key_value_heads": 4}
_NEOX = {"model_type": "gpt_neox", "num_attention_heads": 16}


def _gptj(width: int, layers: int, vocabulary: int = 50400) -> dict[str, Any]:
    return {**_GPTJ, "n_embd": width, "n_layer": layers, "vocab_size": vocabulary}


def _named(sizes: dict[str, Any], width: int, layers: int, inner: int) -> dict[str, Any]:
    return {
        **sizes,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "vocab_size": 32000,
    }


# Name, config, rows, tokens, tokens with loss (0: all), method or target, checkpointing.
CONFIGURATIONS: list[tuple[str, dict[str, Any], int, int, int, str, Kind]] = [
    ("GPT-J 1024 x 4", _gptj(1024, 4), 4, 512, 0, "attention", "full"),
    ("GPT-J 1024 x 4", _gptj(1024, 4), 4, 512, 0, "attention", "none"),
    ("GPT-J 1024 x 4", _gptj(1024, 4), 4, 512, 64, "all-linear", "full"),
    ("GPT-J 1024 x 4", _gptj(1024, 4), 8, 256, 8, "layernorm", "full"),
    ("GPT-J 1024 x 12", _gptj(1024, 12), 2, 512, 0, "attention", "full"),
    ("GPT-J 1024 x 12", _gptj(1024, 12), 2, 512, 0, "attention", "selective"),
    ("GPT-J 1024 x 12", _gptj(1024, 12), 1, 512, 0, "all-linear", "none"),
    ("GPT-J 2048 x 4", _gptj(2048, 4), 2, 512, 0, "attention", "full"),
    ("GPT-J 2048 x 4", _gptj(2048, 4), 1, 1024, 0, "attention", "none"),
    ("GPT-J 2048 x 8", _gptj(2048, 8), 4, 256, 0, "all-linear", "full"),
    ("Llama 1024 x 6", _named(_LLAMA, 1024, 6, 2816), 4, 256, 0, "all-linear", "full"),
    ("Llama 2048 x 4", _named(_LLAMA, 2048, 4, 5632), 2, 512, 0, "layernorm", "none"),
    ("Llama 2048 x 4", _named(_LLAMA, 2048, 4, 5632), 2, 512, 0, "all-linear", "selective"),
    ("GPT-NeoX 1024 x 6", _named(_NEOX, 1024, 6, 4096), 4, 256, 0, "attention", "none"),
]
FULL_SIZE = ("GPT-J-6B", _gptj(4096, 28), 1, 512, 0, "attention", "full")
_LONG = 512 * 4096
_COMMON = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}


def make(folder: Path, sizes: dict[str, Any]) -> None:
    """Write a model with random 8-bit weights, one shard per block."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from gptj8.kernels.fused import register_fused_attention
    from gptj8.quantization.quantizer import Blockwise8bitConfig, swap_modules

    register_fused_attention()
    folder.mkdir(parents=True)
    config = AutoConfig.for_model(**sizes, **_COMMON)
    quantization = Blockwise8bitConfig()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    swap_modules(model, quantization, torch.bfloat16)
    torch.manual_seed(0)
    shards: dict[str, list[str]] = {}
    state = model.state_dict()
    for name in state:
        number = next((part for part in name.split(".") if part.isdigit()), "rest")
        shards.setdefault(number, []).append(name)
    weight_map = {}
    for number, names in shards.items():
        file = f"model-{number}.safetensors"
        tensors = {name: _random(name, state[name]) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    content = {**config.to_dict(), "quantization_config": quantization.to_dict()}
    content |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(content))


def _random(name: str, like: Any) -> Any:
    import torch

    if like.dtype == torch.uint8:
        return torch.randint(0, 256, like.shape, dtype=torch.uint8)
    if name.endswith("codebook"):
        return torch.linspace(-1, 1, 256)
    if name.endswith(("absmax", "levels")):
        return torch.full(like.shape, 0.05)
    is_scale = ("ln_" in name or "norm" in name) and name.endswith("weight")
    return torch.full(like.shape, float(is_scale), dtype=like.dtype)


def measure(
    folder: Path, rows: int, length: int, learned: int, what: str, checkpointing: Kind
) -> dict[str, Any]:
    """Estimate the peak, then train one or two steps; return both peaks in GiB."""
    import torch

    from gptj8.memory import process_memory
    from gptj8.memory.estimate import Estimator, Plan
    from gptj8.memory.skeleton import read_config
    from gptj8.model.adapters import AdapterSpec, add_adapter
    from gptj8.model.loading import load_model, pick_device, pick_dtype
    from gptj8.quantization.quantizer import Blockwise8bitConfig
    from gptj8.runtime.machine import peak_memory_gib
    from gptj8.training.loop import train
    from gptj8.training.settings import TrainingSettings

    device = pick_device()
    dtype = pick_dtype("auto", device)
    method, target = ("layernorm", "attention") if what == "layernorm" else ("lora", what)
    config = read_config(folder)
    learned = learned or length - 1
    plan = Plan(
        config,
        Blockwise8bitConfig(),
        AdapterSpec(method, target),
        dtype,
        device.type,
        length,
        learned,
        checkpointing,
        padded=False,
    )
    process = process_memory.measure_process_memory(str(dtype).removeprefix("torch."))
    estimate = Estimator(plan, process).training(rows)
    model = add_adapter(load_model(folder, dtype, device), AdapterSpec(method, target, 8, 16, 0.0))
    settings = TrainingSettings(1e-4, 1, rows, checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(0)
    steps = 1 if length * config.hidden_size >= _LONG else 2  # a step takes a minute or more
    ids = torch.randint(0, config.vocab_size, (steps * rows, length), generator=generator).tolist()
    examples = [
        {"input_ids": row, "learned": [length - learned, length], "length": length} for row in ids
    ]
    train(model, examples, examples[:rows], settings, 0)
    return {
        "estimated": estimate.total / 2**30,
        "measured": peak_memory_gib(),
        "components": {name: round(size / 2**20, 1) for name, size in estimate.components.items()},
    }


def run(step: str, *arguments: Any) -> dict[str, Any]:
    """Run a step in a separate process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--step", step, json.dumps(arguments)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def compare(number: int, folder: Path) -> dict[str, Any]:
    """Create, estimate and measure the configuration with an index; -1 is the full size."""
    chosen = FULL_SIZE if number < 0 else CONFIGURATIONS[number]
    _, sizes, *rest = chosen
    model = folder / f"model-{number}"
    shutil.rmtree(model, ignore_errors=True)
    try:
        run("make", str(model), sizes)
        return run("measure", str(model), *rest)
    finally:
        shutil.rmtree(model, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", choices=("make", "measure"), help="run one step in this process")
    parser.add_argument("--full-size", action="store_true", help="also measure GPT-J-6B")
    parser.add_argument("--only", type=int, nargs="*", help="indices of configurations")
    parser.add_argument("folder", help="folder for the models")
    arguments = parser.parse_args()
    if arguments.step:
        prepare_to_compute(UNUSED_IN_TRAINING)
        folder, *rest = json.loads(arguments.folder)
        done = {"make": make, "measure": measure}[arguments.step](Path(folder), *rest)
        print(json.dumps(done))
        return
    numbers = list(range(len(CONFIGURATIONS))) if arguments.only is None else arguments.only
    if arguments.full_size:
        numbers.append(-1)
    print(
        "| model, width x layers | batch | trained | checkpointing "
        "| estimated, GiB | measured, GiB | ratio |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for number in numbers:
        name, _, rows, length, learned, what, checkpointing = (
            FULL_SIZE if number < 0 else CONFIGURATIONS[number]
        )
        found = compare(number, Path(arguments.folder))
        estimated, measured = found["estimated"], found["measured"]
        batch = f"{rows} x {length}" + (f", {learned} with loss" if learned else "")
        print(
            f"| {name} | {batch} | {what} | {checkpointing} | "
            f"{estimated:.2f} | {measured:.2f} | {estimated / measured:.3f} |",
            flush=True,
        )
        print(json.dumps(found["components"]), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
