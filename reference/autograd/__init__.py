"""The reference in PyTorch: the stages of `reference` file by file, forward only, with gradients by autograd.

What is no equation is imported from the NumPy level, not repeated: settings, names and shapes, capacity formulas. `MoE` is the layer
as a module; `route` and `apply_experts` are its two seams on plain dicts of tensors.
"""

from .conversion import params_from_numpy, params_to_numpy, routing_from_numpy, routing_to_numpy
from .layer import Aux, MoE, Routing, apply_experts, route, update_bias

__all__ = [
    "Aux", "MoE", "Routing", "apply_experts", "params_from_numpy", "params_to_numpy", "route", "routing_from_numpy", "routing_to_numpy",
    "update_bias",
]  # fmt: skip
