"""Models are loaded within a memory limit."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptj8.model import loading
from gptj8.model.generation.batch import generate_greedily
from gptj8.model.loading import load_model, load_original
from gptj8.model.scoring.likelihood import score_labels
from gptj8.model.scoring.perplexity import score_documents
from gptj8.runtime.errors import UserError

CPU = torch.device("cpu")
DOCUMENTS = [[1, 5, 6, 7, 8, 9], [2, 11, 12], list(range(20, 60))]


def measured(model):
    scores = score_documents(model, DOCUMENTS, [1, 1, 1], batch_size=2).nll
    likelihoods = score_labels(model, DOCUMENTS, [[3, 0], [4, 5, 0]], batch_size=2)
    written = generate_greedily(model, DOCUMENTS, max_new_tokens=8, vocab_size=400, eos_id=0)
    return scores.tolist(), likelihoods.tolist(), written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_on_disk_give_identical_results(tiny_model_dir, dtype):
    complete = load_model(tiny_model_dir, dtype, CPU)
    limit = int(0.8 * complete.get_memory_footprint())
    bounded = load_model(tiny_model_dir, dtype, CPU, max_resident_bytes=limit)
    assert set(bounded.hf_device_map.values()) == {"cpu", "disk"}
    held = sum(p.numel() * p.element_size() for p in bounded.parameters() if p.device == CPU)
    assert held <= limit
    assert measured(bounded) == measured(complete)


def test_limit_too_small_for_the_first_layer_is_ignored(tiny_model_dir):
    model = load_model(tiny_model_dir, torch.float32, CPU, max_resident_bytes=1000)
    assert model.device == CPU
    assert measured(model) == measured(load_model(tiny_model_dir, torch.float32, CPU))


def test_model_within_the_limit_stays_in_memory(tiny_model_dir):
    model = load_model(tiny_model_dir, torch.float32, CPU, max_resident_bytes=1 << 30)
    assert not hasattr(model, "hf_device_map")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_not_called_a_wrong_model(tiny_model_dir, monkeypatch, error):
    def runs_out(*args, **kwargs):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", runs_out)
    with pytest.raises(UserError, match="not enough CPU memory to load the model") as caught:
        load_model(tiny_model_dir, torch.float32, CPU)
    assert "causal language model" not in str(caught.value)


def test_original_is_limited_by_the_size_of_its_copy(tiny_model_dir, tiny_8bit_dir, monkeypatch):
    limits = []
    monkeypatch.setattr(
        loading, "load_model", lambda *a, max_resident_bytes: limits.append(max_resident_bytes)
    )
    size = sum(file.stat().st_size for file in tiny_8bit_dir.iterdir())
    load_original(tiny_model_dir, tiny_8bit_dir, torch.float32, CPU)
    monkeypatch.setattr(loading, "LARGE_BYTES", 0)
    load_original(tiny_model_dir, tiny_8bit_dir, torch.float32, CPU)
    assert limits == [1 << 30, size // 2]
