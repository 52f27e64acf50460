"""NumPy ⇄ PyTorch: parameters and routings of one track as those of the other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..layer import BUFFERS
from ..layer import Routing as NumpyRouting
from ..soft import SoftMix as NumpyMix
from .layer import Routing
from .soft import SoftMix

ARRAYS = tuple(name for name in Routing._fields if name not in ("draws", "mix"))


def array_of(tensor: Tensor) -> np.ndarray:
    """The tensor's values as an array of the same dtype; bf16, which NumPy lacks, becomes fp32, which holds its values exactly."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def params_from_numpy(
    params: Mapping[str, np.ndarray], *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Copies of NumPy parameters as tensors, a state dict for `MoE`; dtype None keeps theirs, and buffers stay fp32 in any case."""
    return {name: torch.tensor(array, device=device, dtype=None if name in BUFFERS else dtype) for name, array in params.items()}


def params_to_numpy(params: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Parameters by name (a state dict, or `MoE.tensors()`) for the NumPy layer."""
    return {name: array_of(tensor).copy() for name, tensor in params.items()}


def routing_from_numpy(routing: NumpyRouting, *, device: torch.device | str | None = None) -> Routing:
    """A NumPy routing as tensors in its own dtypes, without gradients."""
    arrays = (getattr(routing, name) for name in ARRAYS)
    draws = {name: torch.tensor(array, device=device) for name, array in routing.draws.items()}
    mix = None
    if routing.mix is not None:
        dispatch, combine, group = (torch.tensor(part, device=device) for part in routing.mix[:3])
        mix = SoftMix(dispatch, combine, group, routing.mix.groups)
    return Routing(*(torch.tensor(array, device=device) for array in arrays), draws=draws, mix=mix)


def routing_to_numpy(routing: Routing) -> NumpyRouting:
    """A routing as arrays, for example to replay it in the NumPy layer."""
    arrays = {name: array_of(getattr(routing, name)) for name in ARRAYS}
    mix = None
    if routing.mix is not None:
        dispatch, combine, group = (array_of(part) for part in routing.mix[:3])
        mix = NumpyMix(dispatch, combine, group, routing.mix.groups)
    return NumpyRouting(**arrays, draws={name: array_of(tensor) for name, tensor in routing.draws.items()}, mix=mix)
