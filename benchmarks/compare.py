"""Speed and memory beside other methods: `python -m benchmarks.compare [--layers 2] [--rounds 3]`.

One GPT-J of full width and few layers, random weights, LoRA of rank 8 on query and value, gradient
checkpointing, on this machine's CPU; every method gets the same shape, tokens and adapters:

    gptj8                this project: 8-bit weights, its kernels, attention and loss
    bfloat16             transformers and PEFT as they are: what the others are compared with
    jit-bitsandbytes     the original 8-bit GPT-J method, written anew on bitsandbytes' operator
    llm-int8, nf4        bitsandbytes' own layers
    torchao              int8 weight-only, if the package is installed

A method runs in a process of its own, in turns with the others; figures are medians over rounds.
Prints Markdown, ratios to bfloat16 first, and writes JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

METHODS = ("gptj8", "bfloat16", "jit-bitsandbytes", "llm-int8", "nf4", "torchao")
TRAINING_TOKENS = (32, 128, 512, 2048)
PREFILL_TOKENS = 512
NEW_TOKENS = 16
DTYPE = torch.bfloat16


class _JustInTime(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, codes, absmax, code):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(codes, absmax, code)
        return nn.functional.linear(x, _restore(codes, absmax, code))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad @ _restore(*ctx.saved_tensors), None, None, None


def _restore(codes: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    return torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, code, 4096, DTYPE)


class JustInTimeLinear(nn.Linear):
    """The layer of the original method: bitsandbytes' codes, restored in forward and backward."""

    def __init__(self, original: nn.Linear) -> None:
        from bitsandbytes.functional import create_dynamic_map

        nn.Module.__init__(self)
        self.in_features, self.out_features = original.in_features, original.out_features
        code = create_dynamic_map().float()
        codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(original.weight, code, 4096)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("absmax", absmax.float())
        self.register_buffer("code", code)
        self.bias = original.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _JustInTime.apply(x, self.weight, self.absmax, self.code)
        return y if self.bias is None else y + self.bias


def build(method: str, layers: int) -> nn.Module:
    """Return the model with its large weights as the method keeps them, and an adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPTJConfig, GPTJForCausalLM

    if method == "gptj8":
        from gptj8 import attention

        attention.register()
    config = GPTJConfig(n_layer=layers, tie_word_embeddings=False)
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPE)
    model = GPTJForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    _convert(method, model)
    if method == "gptj8":
        from gptj8.activations import fuse_activations

        fuse_activations(model)
    model = get_peft_model(
        model.requires_grad_(False), LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    )
    if method == "gptj8":
        from gptj8.checkpointing import set_checkpointing

        set_checkpointing(model, "full")
    else:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    return model


def _convert(method: str, model: nn.Module) -> None:
    if method == "bfloat16":
        return
    if method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
        return
    from bitsandbytes import nn as bnb

    for name, module in list(model.named_modules()):
        if method == "gptj8":
            from gptj8.codec import quantize_blockwise
            from gptj8.layers import frozen_twin

            twin: Any = frozen_twin(module, 4096, DTYPE)
            if twin is None:
                continue
            twin.load_quantized(quantize_blockwise(module.weight))
            if getattr(module, "bias", None) is not None:
                twin.bias = module.bias
        elif type(module) is not nn.Linear:
            continue
        elif method == "jit-bitsandbytes":
            twin = JustInTimeLinear(module)
        elif name == "lm_head":  # bitsandbytes' layers leave the head as it is
            continue
        else:
            shape = (module.in_features, module.out_features, module.bias is not None)
            if method == "llm-int8":
                twin = bnb.Linear8bitLt(*shape, has_fp16_weights=False)
            else:
                twin = bnb.Linear4bit(*shape, quant_type="nf4", compute_dtype=DTYPE)
            twin.load_state_dict(module.state_dict())
            twin = twin.to("cpu")
        model.set_submodule(name, twin)


def training_loss(method: str, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean loss over a sequence; gptj8 as its trainer computes it."""
    if method != "gptj8":
        return model(input_ids=ids, labels=ids).loss
    from gptj8.loss import frozen_cross_entropy, frozen_head, input_of

    head = frozen_head(model)
    assert head is not None
    with input_of(head) as taken:
        model(input_ids=ids)
    return frozen_cross_entropy(taken[0][:, :-1].flatten(0, 1), ids[:, 1:].flatten(), head) / (
        ids.numel() - 1
    )


def measure(method: str, layers: int, tokens: list[int]) -> dict[str, float | str]:
    """Return tokens a second of each kind of work, or why it does not run."""
    started = time.perf_counter()
    model: Any = build(method, layers)
    results: dict[str, float | str] = {"build seconds": time.perf_counter() - started}

    def attempt(name: str, count: int, work: Callable[[], Any]) -> None:
        try:
            work()
            seconds = []
            for _ in range(3):
                begun = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - begun)
            results[name] = count / statistics.median(seconds)
        except Exception as error:
            results[name] = f"fails: {type(error).__name__}"

    model.train()
    for length in tokens:
        ids = torch.randint(0, 50257, (1, length))

        def step(ids: torch.Tensor = ids) -> None:
            training_loss(method, model, ids).backward()
            model.zero_grad()

        attempt(f"training, {length} tokens", length, step)
    model.eval()
    with torch.inference_mode():
        ids = torch.randint(0, 50257, (1, PREFILL_TOKENS))
        attempt(f"prefill, {PREFILL_TOKENS} tokens", PREFILL_TOKENS, lambda: model(input_ids=ids))
        for batch in (1, 8):
            prompts = torch.randint(0, 50257, (batch, 8))
            settings = {
                "input_ids": prompts,
                "attention_mask": torch.ones_like(prompts),
                "max_new_tokens": NEW_TOKENS,
                "min_new_tokens": NEW_TOKENS,
                "use_cache": True,
                "do_sample": False,
                "pad_token_id": 50256,
            }
            generate = functools.partial(model.generate, **settings)
            attempt(f"decode, batch {batch}", batch * NEW_TOKENS, generate)
    return results


def run(method: str, layers: int, tokens: list[int]) -> dict[str, float | str]:
    """Measure one method in a process of its own; adds the process's peak resident set."""
    command = [sys.executable, "-m", "benchmarks.compare", "--method", method]
    command += ["--layers", str(layers), "--tokens", *map(str, tokens)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1 << 20
    )
    output, errors = process.communicate()
    if process.returncode:
        return {"build seconds": errors.strip().splitlines()[-1][:100]}
    return json.loads(output.splitlines()[-1])


def table(figures: dict[str, dict[str, list[float | str]]]) -> list[str]:
    """Return Markdown: one row a kind of work, one column a method, ratio to bfloat16 first."""
    medians: dict[str, dict[str, float | str]] = {}
    for method, rows in figures.items():
        for name, values in rows.items():
            numbers = [v for v in values if isinstance(v, float)]
            value = statistics.median(numbers) if numbers else values[0]
            medians.setdefault(name, {})[method] = value
    lines = ["| | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for name, row in medians.items():
        cells = []
        for method in figures:
            value, base = row.get(method, ""), row.get("bfloat16")
            if isinstance(value, float) and isinstance(base, float):
                cells.append(f"{value / base:.2f}x ({value:,.3g})")
            else:
                cells.append(str(value) if isinstance(value, str) else f"{value:,.3g}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, help="measure one here and print JSON")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=TRAINING_TOKENS)
    parser.add_argument("--json", type=Path, default=Path("reports/benchmarks/compare.json"))
    arguments = parser.parse_args()
    if arguments.method:
        from gptj8.runtime import peak_memory_gib, set_defaults

        set_defaults()
        results = measure(arguments.method, arguments.layers, arguments.tokens)
        print(json.dumps({**results, "peak memory, GiB": peak_memory_gib()}))
        return
    figures: dict[str, dict[str, list[float | str]]] = {m: {} for m in arguments.methods}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    for number in range(arguments.rounds):
        for method in arguments.methods:
            print(f"round {number + 1}: {method}", file=sys.stderr, flush=True)
            for name, value in run(method, arguments.layers, arguments.tokens).items():
                figures[method].setdefault(name, []).append(value)
            # After each, so that a run that is ended early keeps what it measured.
            content = {"machine": machine, "layers": arguments.layers, "figures": figures}
            arguments.json.write_text(json.dumps(content, indent=2))
    print(f"GPT-J of width 4096, {arguments.layers} layers; {machine}; tokens a second\n")
    print("\n".join(table(figures)))


if __name__ == "__main__":
    main()
