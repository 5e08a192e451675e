"""Train the default base model in two minutes: a byte-level BPE tokenizer and a small GPT-J.

The architecture is that of GPT-J (rotary positions, attention and MLP in parallel, untied head), so
the pipeline runs the same code as with GPT-J-6B. The model sees only the text of the corpus: no
labels, no prompts, and no validation or test rows.

Documents are packed in the order of their source files, each after `<|endoftext|>`, without a mask
between them. A sequence then holds docstrings of one module, and the model learns to predict the
topic of a docstring from those before it, which is the feature that the classification task needs.

The number of steps is fixed, not the time, so the output is byte-identical on the same machine. To
read as much text as possible in two minutes on 2 CPU cores, training uses:

- Muon for the matrices and AdamW for the rest: with only AdamW, the same loss takes twice the time;
- bfloat16 autocast, if the CPU multiplies bfloat16 natively;
- two layers and short sequences: four layers read half the text in the same time. Fused attention
  does not help at this length (measured: its backward pass is slower);
- the fused GELU;
- an allocator that keeps freed memory: the logits take tens of megabytes per step, and getting
  their pages from the kernel again takes a third of the time.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from gptj8.runtime.process import run, set_defaults

set_defaults()

import numpy as np
import torch
from muon import Muon
from pydantic import Field, model_validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from gptj8.params.yaml_files import Section, read_checked
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import replace_directory
from gptj8.runtime.progress import progress
from gptj8.runtime.story import Story

HERE = Path(__file__).resolve().parent
CORPUS = Path("../../datasets/docstrings/corpus.jsonl")
END_OF_TEXT = "<|endoftext|>"
HELD_OUT = 64  # sequences, for the loss printed at the end

Count = Annotated[int, Field(ge=1, le=1 << 20)]
Rate = Annotated[float, Field(gt=0)]


class Params(Section):
    """The keys of params.yaml, which documents them."""

    seed: Annotated[int, Field(ge=0, lt=1 << 63)]
    vocab_size: Annotated[int, Field(ge=257, le=1 << 20)]  # at least the bytes and `<|endoftext|>`
    n_positions: Count
    n_embd: Count
    n_layer: Count
    n_head: Count
    rotary_dim: Count
    sequence_length: Annotated[int, Field(ge=2)]
    batch_size: Count
    steps: Count
    warmup_steps: Count
    cooldown: Annotated[float, Field(gt=0, le=1)]
    muon_learning_rate: Rate
    embedding_learning_rate: Rate
    adamw_learning_rate: Rate
    weight_decay: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def check_shapes(self) -> Params:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.rotary_dim > self.n_embd // self.n_head or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_dim {self.rotary_dim} must be even and at most n_embd / n_head"
            )
        if self.sequence_length > self.n_positions:
            raise ValueError("sequence_length is greater than n_positions")
        return self


def read_corpus(path: Path) -> list[str]:
    """Return the texts in a corpus file.

    Raises:
        UserError: if the file is missing or malformed.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in file]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; make it with `dvc repro`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} was not written by the docstrings recipe: {error!r}; rerun that recipe"
        ) from None


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer, as in GPT-2 and GPT-J; it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Tensor:
    """Return the texts as token sequences (n x length), with `<|endoftext|>` before each text."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [token for found in tokenizer.encode_batch(texts) for token in (end, *found.ids)]
    n = len(ids) // length
    return torch.from_numpy(np.array(ids[: n * length], dtype=np.int64).reshape(n, length))


def build_model(params: Params, end_of_text: int | None) -> GPTJForCausalLM:
    config = GPTJConfig(
        vocab_size=params.vocab_size,
        n_positions=params.n_positions,
        n_embd=params.n_embd,
        n_layer=params.n_layer,
        n_head=params.n_head,
        rotary_dim=params.rotary_dim,
        activation_function="gelu_pytorch_tanh",  # equals GPT-J's gelu_new, in one kernel
        resid_pdrop=0.0,  # no token is seen twice
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    return GPTJForCausalLM(config)


def compute_dtype() -> torch.dtype:
    """Return bfloat16 if the CPU multiplies it natively, otherwise the faster float32."""
    fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def optimizers(model: GPTJForCausalLM, params: Params) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    embeddings = [model.transformer.wte.weight]
    rest = [p for p in model.parameters() if not any(p is q for q in (*matrices, *embeddings))]
    return [
        Muon(
            matrices,
            lr=params.muon_learning_rate,
            weight_decay=params.weight_decay,
            dtype=compute_dtype(),
        ),
        torch.optim.AdamW(
            [
                {"params": embeddings, "lr": params.embedding_learning_rate},
                {"params": rest, "lr": params.adamw_learning_rate},
            ],
            betas=(0.9, 0.95),
            weight_decay=0.0,
        ),
    ]


def learning_rate_factor(step: int, steps: int, warmup_steps: int, cooldown: float) -> float:
    """Return the factor for linear warmup, a constant phase and linear decay to zero.

    Args:
        cooldown: fraction of the steps in the decay.
    """
    up = (step + 1) / warmup_steps
    down = (steps - step) / (cooldown * steps)
    return min(1.0, up, down)


def batches(sequences: Tensor, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield batches in random order; each pass over the sequences uses a new order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(sequences), generator=generator)])
        yield sequences[order[:batch_size]]
        order = order[batch_size:]


def loss_of(model: GPTJForCausalLM, tokens: Tensor) -> Tensor:
    """Return the mean loss over the tokens (batch x length), in bfloat16 if the CPU supports it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=compute_dtype() is torch.bfloat16):
        loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


def train(model: GPTJForCausalLM, sequences: Tensor, params: Params) -> None:
    chosen = optimizers(model, params)
    factor = (params.steps, params.warmup_steps, params.cooldown)
    schedules = [LambdaLR(o, lambda step: learning_rate_factor(step, *factor)) for o in chosen]
    model.train()
    order = batches(sequences, params.batch_size, params.steps, params.seed)
    with progress(params.steps, "training", "steps") as advance:
        for tokens in order:
            loss = loss_of(model, tokens)
            loss.backward()
            for optimizer, schedule in zip(chosen, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            advance.show(f"loss {loss.item():.3f}")
            advance()


def save(model: nn.Module, tokenizer: Tokenizer, n_positions: int, target: Path) -> None:
    """Write model and tokenizer to a directory."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=n_positions,
    )
    model.save_pretrained(target)
    fast.save_pretrained(target)


def keep_memory() -> None:
    """Make glibc keep freed memory; has no effect with other C libraries."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def main(folder: Path = HERE) -> None:
    story = Story("train")
    params = read_checked(Params, folder / "params.yaml")
    story.say(
        f"a GPT-J with {params.n_layer} layers of width {params.n_embd} from scratch, on "
        f"{CORPUS.name}: {params.steps:,} steps of {params.batch_size} x "
        f"{params.sequence_length} tokens"
    )
    logging.disable_progress_bar()
    torch.manual_seed(params.seed)
    texts = read_corpus(folder / CORPUS)
    tokenizer = train_tokenizer(texts, params.vocab_size)
    sequences = pack(tokenizer, texts, params.sequence_length)
    if len(sequences) <= HELD_OUT:
        raise UserError(
            f"{CORPUS}: {len(sequences)} sequences are too few; more than {HELD_OUT} are needed"
        )
    mixed = sequences[torch.randperm(len(sequences))]
    model = build_model(params, tokenizer.token_to_id(END_OF_TEXT))
    with replace_directory(folder / "model") as staging:  # fails before training if impossible
        train(model, mixed[HELD_OUT:], params)
        with torch.inference_mode():
            held_out_loss = loss_of(model.eval(), mixed[:HELD_OUT]).item()
        if not math.isfinite(held_out_loss):
            raise UserError(f"the held-out loss is {held_out_loss}; lower the learning rates")
        save(model, tokenizer, params.n_positions, staging)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    story.end(f"{millions:.1f} million parameters, held-out loss {held_out_loss:.3f}")


if __name__ == "__main__":
    keep_memory()
    run(main)
