"""Load a base model for arithmetic on this machine, and put an adapter on it."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gptj8.quantization.model_files import check_model_directory, check_tensors
from gptj8.runtime.distributed import process_count, processes_here
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import list_files
from gptj8.runtime.manifest import verify_manifest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LARGE_BYTES = 1 << 30
"""A smaller original is held in memory whole, however small its 8-bit copy is."""


def pick_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the arithmetic's dtype.

    Args:
        name: "bfloat16", "float16", "float32" or "auto": bfloat16 where the hardware multiplies in
            it (compute capability 8 on, CPUs with AVX-512 BF16 or AMX), float16 on GPUs whose
            float16 is fast, float32 elsewhere: Pascal's consumer GPUs (6.1) run float16 at 1/64 of
            float32's speed, and plain CPUs convert to float32 and back.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return torch.bfloat16
        return torch.float32 if capability < (6, 0) or capability == (6, 1) else torch.float16
    features = torch.cpu.get_capabilities()
    has_bfloat16 = features.get("amx_bf16") or features.get("avx512_bf16")
    return torch.bfloat16 if has_bfloat16 else torch.float32


def pick_arithmetic(dtype: str) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype to compute with here; `dtype` as for `pick_dtype`."""
    device = pick_device()
    return device, pick_dtype(dtype, device)


ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
"""What PEFT writes of an adapter, and reads."""


def load_model(
    path: str | Path,
    dtype: torch.dtype,
    device: torch.device,
    max_resident_bytes: int | None = None,
) -> PreTrainedModel:
    """Load a causal language model, converted or original, in eval mode.

    Code from the model directory is never run, and pickles are read as tensors only. A directory
    with a manifest is compared with it first.

    Args:
        path: model directory.
        dtype: of the arithmetic.
        device: CPU or GPU. What a GPU has no room for stays in the CPU's memory.
        max_resident_bytes: of weights on the CPU. Layers beyond stay in their safetensors files and
            are read anew by each forward pass, which gives the same numbers; for evaluation only.
            None: all are held.
    """
    from transformers import AutoModelForCausalLM

    from gptj8.kernels.fused import fuse_activations, register_fused_attention

    verify_manifest(path)
    check_model_directory(path)
    register_fused_attention()
    # A GPU too small for the original model (the one with an 8-bit twin that fits) shares the
    # layers with the CPU's memory.
    placement: dict[str, Any] = {"device_map": "auto"} if device.type == "cuda" else {}
    if device.type == "cuda" and process_count() > 1:  # each process has its own GPU
        placement = {"device_map": {"": torch.cuda.current_device()}}
    if (
        max_resident_bytes is not None
        and device.type == "cpu"
        and _is_larger(path, dtype, max_resident_bytes)
    ):
        placement = {"device_map": "auto", "max_memory": {"cpu": max_resident_bytes}}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, **placement
        )
    except pickle.UnpicklingError:
        raise UserError(f"{path}: its weights hold more than tensors and are not read") from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        check_tensors(path)  # knows the tensor, where transformers only counts the mismatches
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} cannot be loaded as a causal language model: {reason}") from error
    if model.device.type == "meta":  # not even the first layer fits, and inputs have no place
        if max_resident_bytes is None:
            raise UserError(f"{path}: there is not enough memory for its first layer")
        return load_model(path, dtype, device)
    fuse_activations(model)  # in the original as well: what is compared are the weights
    return model.eval()


def load_original(
    path: str | Path, copy: str | Path, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Load the unquantized model into no more memory than its 8-bit copy takes: who could train on
    this machine can evaluate on it. A small one is held whole, as it costs little.

    Args:
        path, copy: model directories.
        dtype, device: as for `load_model`.
    """
    size = sum(file.stat().st_size for file in list_files(copy))
    # Half, because the files' own pages count beside what is made of them.
    most = max(size // 2, LARGE_BYTES) // processes_here()
    return load_model(path, dtype, device, max_resident_bytes=most)


def _is_larger(path: str | Path, dtype: torch.dtype, most: int) -> bool:
    """Whether the weights in safetensors files, as `dtype`, take more than `most` bytes."""
    from safetensors import safe_open

    total = 0
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            shapes = (tensors.get_slice(name).get_shape() for name in tensors.keys())
            total += sum(math.prod(shape) for shape in shapes) * dtype.itemsize
    return total > most


def load_adapter(model: PreTrainedModel, path: str | Path) -> PeftModel:
    """Put a trained adapter on its base model, in eval mode; no weight of the base changes.

    Raises:
        UserError: if it is none, or its files are not what its manifest, if it has one, says.
    """
    from peft import PeftModel

    if not (Path(path) / ADAPTER_CONFIG).is_file():
        raise UserError(f"{path} has no {ADAPTER_CONFIG}; is it an adapter?")
    if not (Path(path) / ADAPTER_FILE).is_file():  # PEFT would go on to look for a pickle
        raise UserError(f"{path} has no {ADAPTER_FILE}; is it an adapter?")
    verify_manifest(path, only=(ADAPTER_CONFIG, ADAPTER_FILE))
    return PeftModel.from_pretrained(model, str(path)).eval()
