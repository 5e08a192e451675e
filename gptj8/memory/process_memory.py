"""Measure the memory that Python and the libraries use in a training process."""

from __future__ import annotations

import functools
import gc
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gptj8.runtime.errors import UserError
from gptj8.runtime.machine import resident_bytes
from gptj8.runtime.messages import why_process_failed

# Modules that stage finetune has imported when it trains. Names, because this layer must not import
# higher layers.
_IMPORTED_IN_TRAINING = (
    "transformers.trainer",
    "gptj8.dataset.prepared.dataset",
    "gptj8.export.reference_answers",
    "gptj8.tracking.stage",
)


def measure_process_memory(dtype: str) -> int:
    """Return the memory of Python and the libraries after one training step of a small model.

    Code is loaded into memory when it first runs, and libraries keep their buffers. So one step is
    run in this process on a model of negligible size. The state of random number generators does
    not change.

    Args:
        dtype: Compute dtype, as a name in torch.

    Returns:
        Resident memory in bytes.
    """
    import bitsandbytes
    import torch
    from transformers import GPTJConfig, GPTJForCausalLM

    from gptj8.kernels.fused import register_fused_attention
    from gptj8.model.adapters import AdapterSpec, add_adapter
    from gptj8.quantization.layers import Frozen8bitModule
    from gptj8.quantization.quantizer import Blockwise8bitConfig, swap_modules

    register_fused_attention()
    kind = getattr(torch, dtype)
    config = GPTJConfig(
        vocab_size=256,
        n_positions=64,
        n_embd=128,
        n_layer=1,
        n_head=2,
        rotary_dim=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    config.use_cache = False
    state = torch.get_rng_state()
    try:
        model = GPTJForCausalLM._from_config(config, dtype=kind)
        swap_modules(model, Blockwise8bitConfig(), kind)
        for module in model.modules():
            if isinstance(module, Frozen8bitModule):
                module.codebook.copy_(torch.linspace(-1, 1, 256))
                assert module.levels is not None
                module.levels.fill_(0.1)
        adapted = add_adapter(model, AdapterSpec()).train()
        ids = torch.arange(64).expand(4, -1)
        adapted(input_ids=ids, labels=ids).loss.backward()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        bitsandbytes.optim.AdamW8bit(trained).step()
    finally:
        torch.set_rng_state(state)
    del adapted, model
    gc.collect()
    return resident_bytes()


@contextmanager
def measuring_process_memory(dtype: str) -> Iterator[Callable[[], int]]:
    """Run `measure_process_memory` in a new process without other imports, beside other work.

    Yields:
        A function that waits for the result. It raises UserError if the process fails.
    """
    command = [sys.executable, "-m", "gptj8.memory.process_memory", dtype]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)

    @functools.cache
    def result() -> int:
        shown, errors = process.communicate()
        if process.returncode:
            reason = why_process_failed(process.returncode, errors)
            raise UserError(f"cannot measure the memory of the libraries: {reason}")
        return int(json.loads(shown.splitlines()[-1]))

    try:
        yield result
    finally:
        process.kill()  # no effect if it has ended
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


if __name__ == "__main__":
    from gptj8.runtime.process import UNUSED_IN_TRAINING, prepare_to_compute

    prepare_to_compute(UNUSED_IN_TRAINING)  # as in the stage
    for name in _IMPORTED_IN_TRAINING:
        importlib.import_module(name)
    print(json.dumps(measure_process_memory(sys.argv[1])))
