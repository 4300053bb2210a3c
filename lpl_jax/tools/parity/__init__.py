"""Agreement with PyTorch as a command: each frozen part against diffusers, transformers and torchdiffeq.

`lpl parity` is in `program`. The modules named like a part have a function `groups(settings)`, which returns what there
is to compare; `docs/parity.md` has a full table. PyTorch and the others are needed here alone.
"""
