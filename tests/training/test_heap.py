"""The heap of a process that trains large blocks gives back what lies free in it."""

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


def full_of_holes(mib):
    """Return what keeps a heap of so many MiB from being given back, though nearly all is free."""
    pieces = [b"1" * 99_000 for _ in range((mib << 20) // 99_000)]  # smaller than is mapped
    last = pieces[-1]
    pieces.clear()
    return last


def left_of(weights, mib):
    """Return how much of so many MiB a process keeps, once they are free and a block was run."""
    model = nn.Sequential(Block(weights))
    with trimmed(model):
        before = own_bytes()
        last = full_of_holes(mib)
        model(torch.zeros(3))
        left = own_bytes() - before
        assert last
    assert torch.equal(model(torch.zeros(3)), torch.ones(3))
    assert not model[0]._forward_pre_hooks
    return left / (mib << 20)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's heap")
def test_a_large_block_gives_back_what_is_free():
    own = own_bytes()
    mib = max(256, own >> 20)  # more than a process may grow by
    assert left_of(1 << 27, mib) < 0.1
    assert left_of(1 << 20, mib) > 0.9  # a small block leaves it


def test_which_blocks_are_large():
    quantization = gptj8.Blockwise8bitConfig()
    sizes = dict(benchmark.FULL_SIZE[1])
    config = transformers.AutoConfig.for_model(**{**sizes, "n_layer": 3}, **benchmark._COMMON)
    model = build(config, quantization, torch.bfloat16, SHAPE)
    assert large_blocks(model) == list(model.get_base_model().transformer.h)
    small = transformers.GPTJConfig(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, **COMMON)
    assert not large_blocks(build(small, quantization, torch.float32, SHAPE))
