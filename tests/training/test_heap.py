"""Test that free heap memory is returned to the operating system when large blocks are trained."""

import platform

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

import gptj8
from benchmarks import memory as benchmark
from gptj8.memory.skeleton import build
from gptj8.model.adapters import AdapterSpec
from gptj8.runtime.machine import own_bytes
from gptj8.training.heap import large_blocks, trimmed
from tests.helpers.architectures import COMMON

SHAPE = AdapterSpec(target="attention")


class Block(GradientCheckpointingLayer):
    def __init__(self, weights):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(weights, device="meta"))

    def forward(self, x):
        return x + 1


def fragmented(mib):
    """Fill `mib` MiB of the heap, free all but the last piece and return that piece.

    The last piece keeps the heap from shrinking.
    """
    pieces = [b"1" * 99_000 for _ in range((mib << 20) // 99_000)]  # below malloc's mmap threshold
    last = pieces[-1]
    pieces.clear()
    return last


def fraction_kept(weights, mib):
    """Return the fraction of `mib` free MiB that the process keeps after a block has run."""
    model = nn.Sequential(Block(weights))
    with trimmed(model):
        before = own_bytes()
        last = fragmented(mib)
        model(torch.zeros(3))
        left = own_bytes() - before
        assert last
    assert torch.equal(model(torch.zeros(3)), torch.ones(3))
    assert not model[0]._forward_pre_hooks
    return left / (mib << 20)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tests glibc's heap")
def test_only_large_blocks_return_free_memory():
    own = own_bytes()
    mib = max(256, own >> 20)  # more than the growth that triggers a trim
    assert fraction_kept(1 << 27, mib) < 0.1
    assert fraction_kept(1 << 20, mib) > 0.9  # a small block does not trim


def test_large_blocks():
    quantization = gptj8.Blockwise8bitConfig()
    sizes = dict(benchmark.FULL_SIZE[1])
    config = transformers.AutoConfig.for_model(**{**sizes, "n_layer": 3}, **benchmark._COMMON)
    model = build(config, quantization, torch.bfloat16, SHAPE)
    assert large_blocks(model) == list(model.get_base_model().transformer.h)
    small = transformers.GPTJConfig(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, **COMMON)
    assert not large_blocks(build(small, quantization, torch.float32, SHAPE))
