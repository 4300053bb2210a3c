"""Agreement with PyTorch as a command: each frozen part against diffusers, transformers and torchdiffeq.

    python -m lpl_jax.tools.parity                                  everything, on tiny random weights
    python -m lpl_jax.tools.parity samplers text                    some parts
    python -m lpl_jax.tools.parity --autoencoder FOLDER --out OUT   the weights in a folder; parity.json and parity.md

The modules named like a part have a function `groups(settings)`, which returns what there is to compare;
`docs/parity.md` has a full table. PyTorch and the others are needed here and nowhere else in the library.
"""
