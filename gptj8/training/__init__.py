"""Fine-tuning on the frozen 8-bit model through `transformers.Trainer`.

`loop.train` runs it from wherever it was interrupted (`saved_states`) to its end. This file imports
nothing: whoever asks for a part does not pay for the Trainer.
"""
