"""Fine-tuning on the frozen 8-bit model through `transformers.Trainer`.

`train` runs it from wherever it was interrupted (`gptj8.training.checkpoints`) to its end.
"""

from gptj8.training.checkpoints import Checkpoints, training_key
from gptj8.training.loop import train, try_step
from gptj8.training.settings import TrainingResult, TrainingSettings
from gptj8.training.trouble import LossLost

__all__ = [
    "Checkpoints",
    "LossLost",
    "TrainingResult",
    "TrainingSettings",
    "train",
    "training_key",
    "try_step",
]
