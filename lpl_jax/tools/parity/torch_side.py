"""Small things on PyTorch's side that several parts need."""

import copy
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch

Model: TypeAlias = Any  # a torch.nn.Module: its submodules, as attributes, have no types


def nchw(array: np.ndarray) -> torch.Tensor:
    """(B, H, W, C) -> a new tensor (B, C, H, W), float32."""
    return torch.from_numpy(np.array(array, np.float32).transpose(0, 3, 1, 2).copy())


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    """(B, C, H, W) -> (B, H, W, C), without gradient; NumPy has no bfloat16, which becomes float32."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().transpose(0, 2, 3, 1)


def arrays(state: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A state dict in NumPy."""
    return {name: tensor.detach().numpy() for name, tensor in state.items()}


def cast(module: Model, dtype: torch.dtype) -> Model:
    """A copy with all parameters in another type; diffusers' own `.to` has a warning for each."""
    return torch.nn.Module.to(copy.deepcopy(module), dtype)


def randomize(module: Model, seed: int) -> Model:
    """Weights in which every part matters: no norm is the identity, no bias is 0, a stored table is not its formula."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name not in parameters:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
            elif tensor.ndim > 1:
                tensor.normal_(0, 0.8 * tensor[0].numel() ** -0.5, generator=generator)
            elif tensor.ndim == 1:
                centre, spread = (1.0, 0.5) if name.endswith("weight") else (0.0, 0.3)
                tensor.uniform_(centre - spread, centre + spread, generator=generator)
    return module.eval().requires_grad_(False)
