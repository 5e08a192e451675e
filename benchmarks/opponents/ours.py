"""This project: converted, loaded, adapted and trained as its pipeline does it."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.opponents.server import Options
from benchmarks.opponents.torch_models import TorchModel
from gptj8 import Blockwise8bitConfig, convert_checkpoint
from gptj8.kernels.fused import register_fused_attention
from gptj8.model.loading import load_model
from gptj8.training.activation_checkpointing import set_checkpointing
from gptj8.training.loss import frozen_cross_entropy, frozen_head, input_of


class Ours(TorchModel):
    """The model in this project's 8-bit format."""

    def convert(self) -> None:
        convert_checkpoint(self.options.original, self._converted, Blockwise8bitConfig())

    def load_base(self) -> Any:
        return load_model(self._converted, self.dtype, self.device)

    def loss(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        return training_loss(model, ids)

    def about(self) -> dict[str, str]:
        from gptj8.kernels import cpu

        return {**super().about(), "gptj8's library": "yes" if cpu.library() else "no"}

    @property
    def _converted(self) -> Any:
        return self.options.folder / "model"


class Selective(Ours):
    """With selective checkpointing, which recomputes only cheap operations."""

    def _set_checkpointing(self, model: Any) -> None:
        set_checkpointing(model, "selective")


class Restored(Ours):
    """The 8-bit weights restored to float32: the reference for the error of the arithmetic."""

    def load_base(self) -> Any:
        return load_model(self._converted, torch.float32, self.device).dequantize(torch.float32)

    def loss(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss


def training_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean loss over rows of the same length, computed as in this project's trainer."""
    head = frozen_head(model)
    assert head is not None
    with input_of(head) as taken:
        model(input_ids=ids)
    targets = ids[:, 1:].flatten()
    return frozen_cross_entropy(taken[0][:, :-1].flatten(0, 1), targets, head) / targets.numel()


def create(options: Options) -> Ours:
    """Return the variant that has this name."""
    register_fused_attention()
    kinds = {"gptj8": Ours, "gptj8-selective": Selective, "restored": Restored}
    return kinds[options.name](options)
