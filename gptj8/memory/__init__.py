"""Estimate the peak memory of training and evaluation from only a model's config.json.

The model is built without weights (`skeleton`), and a training step is run on tensors that have
shapes but no memory (`trace`). This counts what the layers, the adapter, checkpointing and the loss
actually allocate, for every architecture. (Alternative considered: formulas per architecture; it
was rejected because they become wrong as soon as the code that they describe changes.)
"""
