"""Will it fit? Peak memory of training and evaluation, told from a model's config.json alone.

The model is built without weights (`skeleton`), and the step that training takes is run on tensors
that have shapes and no memory (`trace`): whatever the layers, the adapter, checkpointing and the
loss really allocate is counted as they allocate it, in every architecture alike. (Rejected:
formulas for each architecture, which are wrong as soon as the code that they describe changes.)
"""
