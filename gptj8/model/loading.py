"""Load a base model for this machine, and load an adapter onto it."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gptj8.quantization.model_files import (
    build_skeleton,
    check_model_directory,
    check_tensors,
)
from gptj8.quantization.shards import ShardedWeights
from gptj8.runtime.distributed import process_count, processes_here
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import list_files, read_json
from gptj8.runtime.machine import is_out_of_memory
from gptj8.runtime.manifest import verify_manifest
from gptj8.runtime.messages import one_line

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LARGE_BYTES = 1 << 30
"""Original models below this size are kept in memory completely, even if the 8-bit copy is much
smaller."""


def pick_device() -> torch.device:
    """Return the GPU if one is available, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in.

    Args:
        name: "bfloat16", "float16", "float32" or "auto". "auto" selects bfloat16 if the hardware
            supports it (GPUs with compute capability 8 or higher, CPUs with AVX-512 BF16 or AMX),
            float16 on other GPUs with fast float16, and float32 otherwise. Pascal consumer GPUs
            (6.1) run float16 at 1/64 of the float32 speed, and CPUs without bfloat16 support
            convert to float32 and back.
        device: device to compute on.
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
    """Return the device and dtype to compute with on this machine.

    Args:
        dtype: name of the dtype, see `pick_dtype`.
    """
    device = pick_device()
    return device, pick_dtype(dtype, device)


ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
"""Names of the files in which PEFT stores an adapter."""


def load_model(
    path: str | Path,
    dtype: torch.dtype,
    device: torch.device,
    max_resident_bytes: int | None = None,
) -> PreTrainedModel:
    """Load a causal language model, converted or original, in eval mode.

    Code in the model directory is never executed, and pickled weights may contain only tensors. If
    the directory has a manifest, its files are verified first.

    Args:
        path: model directory.
        dtype: dtype to compute in.
        device: CPU or GPU. Layers that do not fit into GPU memory are kept in CPU memory.
        max_resident_bytes: limit for weights in CPU memory, for evaluation only. Layers beyond the
            limit stay in their safetensors files and are read in each forward pass, with identical
            results. None means no limit.

    Raises:
        UserError: if the directory is not a causal language model, or its first layer does not fit
            into memory.
    """
    from gptj8.kernels.fused import fuse_activations, register_fused_attention

    verify_manifest(path)
    check_model_directory(path)
    register_fused_attention()
    # The original model may not fit into GPU memory although its 8-bit copy does. "auto" places the
    # remaining layers in CPU memory.
    placement: dict[str, Any] = {"device_map": "auto"} if device.type == "cuda" else {}
    if device.type == "cuda" and process_count() > 1:  # one GPU per process
        placement = {"device_map": {"": torch.cuda.current_device()}}
    if (
        max_resident_bytes is not None
        and device.type == "cpu"
        and _is_larger(path, dtype, max_resident_bytes)
    ):
        placement = {"device_map": "auto", "max_memory": {"cpu": max_resident_bytes}}
    try:
        model, missing = _from_files(Path(path), dtype=dtype, **placement)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: the weights contain objects other than tensors; save them as safetensors"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            where = "GPU" if device.type == "cuda" else "CPU"
            raise UserError(
                f"{path}: not enough {where} memory to load the model; free some memory, or use a "
                "smaller model"
            ) from error
        check_tensors(path)  # names the wrong tensor; transformers only counts the mismatches
        raise UserError(
            f"{path} cannot be loaded as a causal language model: {one_line(error)}"
        ) from error
    if missing:  # transformers fills them with random numbers
        raise UserError(f"{path}: the checkpoint has no tensor {min(missing)}")
    if model.device.type == "meta":  # the first layer does not fit, so inputs have no device
        if max_resident_bytes is None:
            raise UserError(f"{path}: not enough memory for the first layer of the model")
        return load_model(path, dtype, device)
    fuse_activations(model)  # also in the original, so comparisons differ only in the weights
    return model.eval()


def _from_files(path: Path, **arguments: Any) -> tuple[PreTrainedModel, set[str]]:
    """Return the model in a directory, and the names of the tensors that its files lack."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    arguments |= {"trust_remote_code": False, "output_loading_info": True}
    loaded: Any
    weights = ShardedWeights(path)
    if not read_json(path / "config.json").get("quantization_config"):
        weights.require_floats(path)
    state = weights.lazily() if weights.is_wrapped else None
    del weights  # a file that cannot be memory-mapped is in memory
    if state is None:
        loaded = AutoModelForCausalLM.from_pretrained(path, **arguments)
    else:
        skeleton: Any = build_skeleton(path)
        if arguments.get("device_map") == "auto":
            arguments.pop("max_memory", None)  # layers cannot stay in files with other names
        loaded = type(skeleton).from_pretrained(
            None, config=skeleton.config, state_dict=state, **arguments
        )
        if (path / "generation_config.json").is_file():
            loaded[0].generation_config = GenerationConfig.from_pretrained(path)
    return loaded[0], set(loaded[1]["missing_keys"])


def load_original(
    path: str | Path, copy: str | Path, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Load the unquantized model without using more memory than its 8-bit copy.

    A machine that can train the 8-bit copy can therefore also evaluate the original. Models below
    `LARGE_BYTES` are kept in memory completely.

    Args:
        path: directory of the original model.
        copy: directory of the 8-bit copy.
        dtype, device: see `load_model`.
    """
    size = sum(file.stat().st_size for file in list_files(copy))
    # Half, because the file pages also count as memory, in addition to the converted weights.
    limit = max(size // 2, LARGE_BYTES) // processes_here()
    return load_model(path, dtype, device, max_resident_bytes=limit)


def _is_larger(path: str | Path, dtype: torch.dtype, limit: int) -> bool:
    """Return whether the safetensors weights take more than `limit` bytes as `dtype`."""
    from safetensors import safe_open

    total = 0
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            shapes = (tensors.get_slice(name).get_shape() for name in tensors.keys())
            total += sum(math.prod(shape) for shape in shapes) * dtype.itemsize
    return total > limit


def load_adapter(model: PreTrainedModel, path: str | Path) -> PeftModel:
    """Load a trained adapter onto its base model, in eval mode; base weights are not changed.

    Raises:
        UserError: if `path` is not an adapter, or a file does not match the manifest, if there is
            one.
    """
    from peft import PeftModel

    if not (Path(path) / ADAPTER_CONFIG).is_file():
        raise UserError(f"{path} has no {ADAPTER_CONFIG}; is it an adapter?")
    if not (Path(path) / ADAPTER_FILE).is_file():  # otherwise PEFT looks for a pickle
        raise UserError(f"{path} has no {ADAPTER_FILE}; is it an adapter?")
    verify_manifest(path, only=(ADAPTER_CONFIG, ADAPTER_FILE))
    return PeftModel.from_pretrained(model, str(path)).eval()
