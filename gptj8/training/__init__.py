"""Fine-tune an adapter on the frozen 8-bit model with `transformers.Trainer`.

`loop.train` trains from the beginning, or resumes from a checkpoint (`saved_states`). This file
imports nothing, so that importing one module does not import Trainer.
"""
