"""llama.cpp with Q8_0 weights: a Llama with as many weights as the GPT-J, all of them random.

Called through the C functions of llama-cpp-python, because several sequences at once need them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as library
import numpy as np

from benchmarks.opponents.server import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    Options,
    System,
    seconds_per_position,
)
from benchmarks.opponents.shapes import Shape

_MAX_ROWS, _MAX_TOKENS = 8, 512
_BLOCK = 32  # weights with a common scale in Q8_0


class LlamaCpp(System):
    """A context for several sequences."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._shape = options.shape.as_llama()
        self._file = options.folder / "model.gguf"
        self._model: Any = None
        self._context: Any = None
        self._batch = library.llama_batch_init(_MAX_TOKENS, 0, 1)

    def convert(self) -> None:
        _write(self._file, self._shape)

    def load(self) -> None:
        library.llama_backend_init()
        self._model = library.llama_model_load_from_file(
            str(self._file).encode(), library.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {self._file}")
        settings = library.llama_context_default_params()
        settings.n_ctx = 2 * _MAX_TOKENS
        settings.n_batch = settings.n_ubatch = _MAX_TOKENS
        settings.n_seq_max = _MAX_ROWS
        settings.kv_unified = True
        settings.n_threads = settings.n_threads_batch = self.options.threads
        self._context = library.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self.prefill(8)

    def unload(self) -> None:
        library.llama_free(self._context)
        library.llama_model_free(self._model)
        self._context = self._model = None

    def about(self) -> dict[str, str]:
        system = library.llama_print_system_info().decode()
        features = [part.split(" = ")[0].split(":")[-1].strip() for part in system.split("|")]
        return {
            "llama-cpp-python": library.__version__,
            "compiled with": " ".join(name for name in features if name.isupper()),
        }

    def prefill(self, tokens: int) -> None:
        self._clear()
        (row,) = self.sequences(1, tokens)
        entries = [(token, place, 0) for place, token in enumerate(row)]
        self._decode(entries, range(len(entries)))

    def decode(self, rows: int) -> float:
        self._clear()
        prompts = self.sequences(rows, PROMPT_TOKENS)
        entries = [
            (t, place, row) for row, ids in enumerate(prompts) for place, t in enumerate(ids)
        ]
        last = range(PROMPT_TOKENS - 1, len(entries), PROMPT_TOKENS)
        logits, times = self._decode(entries, last), [time.perf_counter()]
        for place in range(PROMPT_TOKENS, PROMPT_TOKENS + NEW_TOKENS - 1):
            tokens = logits.argmax(-1)
            entries = [(int(token), place, row) for row, token in enumerate(tokens)]
            logits = self._decode(entries, range(rows))
            times.append(time.perf_counter())
        return seconds_per_position(times)

    def _clear(self) -> None:
        library.llama_memory_clear(library.llama_get_memory(self._context), True)

    def _decode(self, entries: Sequence[tuple[int, int, int]], wanted: Sequence[int]) -> np.ndarray:
        """Return the logits of the wanted entries, each a token, its position and its sequence."""
        batch, chosen = self._batch, set(wanted)
        batch.n_tokens = len(entries)
        for number, (token, place, row) in enumerate(entries):
            batch.token[number], batch.pos[number] = token, place
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, row
            batch.logits[number] = number in chosen
        if code := library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        logits = library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (len(wanted), self._shape.vocabulary))


def _write(file: Path, shape: Shape) -> None:
    """Write a GGUF file with random Q8_0 matrices, and without a vocabulary."""
    import gguf

    draw, head = np.random.default_rng(0), shape.width // shape.heads
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("none")
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_heads)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)

    def matrix(name: str, rows: int, columns: int) -> None:
        blocks = np.empty((rows, columns // _BLOCK, _BLOCK + 2), np.uint8)
        scale = np.array([0.02 / 73], np.float16)  # a standard deviation of 0.02
        blocks[..., :2] = scale.view(np.uint8)
        blocks[..., 2:] = draw.integers(0, 256, blocks[..., 2:].shape, np.uint8)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape.width, np.float32))

    matrix("token_embd", shape.vocabulary, shape.width)
    matrix("output", shape.vocabulary, shape.width)
    norm("output_norm")
    for layer in range(shape.layers):
        prefix = f"blk.{layer}"
        norm(f"{prefix}.attn_norm")
        norm(f"{prefix}.ffn_norm")
        matrix(f"{prefix}.attn_q", shape.width, shape.width)
        matrix(f"{prefix}.attn_k", shape.key_heads * head, shape.width)
        matrix(f"{prefix}.attn_v", shape.key_heads * head, shape.width)
        matrix(f"{prefix}.attn_output", shape.width, shape.width)
        matrix(f"{prefix}.ffn_gate", shape.inner, shape.width)
        matrix(f"{prefix}.ffn_up", shape.inner, shape.width)
        matrix(f"{prefix}.ffn_down", shape.width, shape.inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def create(options: Options) -> LlamaCpp:
    """Return the system."""
    return LlamaCpp(options)
