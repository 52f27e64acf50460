"""The layer of `reference.autograd` on the fast track: the same module, whose two seams run on the backend that fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reference.autograd import MoE as ReferenceMoE
from reference.autograd import Routing
from reference.autograd.layer import check_input, check_mix, check_params, mixed
from reference.autograd.tokens import TokenInfo
from reference.config import MoEConfig, require

from . import backends
from .backends import AUTO, Backend
from .contracts import contract
from .operators import compute_dtype


@contract(
    equals="reference.layer.apply_experts",
    backend=AUTO,
    grads=("x", "gate", "params"),
    dtypes=("float32", "bfloat16"),
    limits="those of the backend that runs",
)
def apply_experts(x_TD: Tensor, routing: Routing, params: Mapping[str, Tensor], config: MoEConfig, *, backend: str = AUTO) -> Tensor:
    """The second seam on a backend of the table: y [T, D] of the routed experts for a given routing (no shared experts).

    Shapes and gradients: those of `reference.apply_experts`, on tensors. Raises ValueError for a wrong shape or dtype, an unknown
    backend, or one that cannot run here, with the reason.
    """
    check_input(x_TD, config)
    check_params(x_TD, params, config, ("experts",))
    check_mix(routing, config)
    seam = backends.resolve(backend, x_TD.device, compute_dtype(x_TD), config).apply_experts
    return mixed(x_TD, routing, lambda rows, own: seam(rows, own, params, config))


class MoE(ReferenceMoE):
    """A Mixture-of-Experts layer (moe): `reference.autograd.MoE`, faster.

    backend: "auto", the best that runs on the layer's device in its dtype, or the name of a row of `backends.BACKENDS`. Where the
    named one cannot run, the call says why; the layer may still move to a device where it can.
    Parameters, state dict, call and aux are those of the reference. Forward-mode derivatives and those of `torch.func.grad` take the
    reference's way, at its speed; a backward through the backward is refused, reference.autograd.MoE has it.
    Raises ValueError for an unknown backend.
    """

    def __init__(self, config: MoEConfig, *, backend: str = AUTO, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.requested_backend = backends.check_name(backend)

    @property
    def backend(self) -> str:
        """Name of the backend that runs on the parameters as they are. Raises ValueError where the requested one cannot."""
        weight = self.get_parameter("router.weight")
        return backends.resolve(self.requested_backend, weight.device, weight.dtype, self.config).name

    def _resolve(self, x_TD: Tensor) -> Backend:
        return backends.resolve(self.requested_backend, x_TD.device, compute_dtype(x_TD), self.config)

    def route_tokens(self, x_TD: Tensor, tokens: TokenInfo, replay: Any = None) -> tuple[Routing, dict[str, Tensor]]:
        """The first seam, where the backend has one of its own."""
        route = self._resolve(x_TD).route
        if route is None:
            return super().route_tokens(x_TD, tokens, replay)
        return route(x_TD, self.tensors(), self.config, tokens, training=self.training, replay=replay)

    def apply_experts(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """The second seam on the backend."""
        return self._resolve(x_TD).apply_experts(x_TD, routing, self.tensors(), self.config)

    def extra_repr(self) -> str:
        """Sizes and the requested backend for `print(model)`."""
        return f"{super().extra_repr()}, backend={self.requested_backend!r}"


def set_backend(module: nn.Module, name: str) -> nn.Module:
    """Request a backend for every `MoE` inside a module, in place, and return the module.

    Raises ValueError for an unknown name, and where the module holds no `MoE` of the fast track.
    """
    backends.check_name(name)
    layers = [layer for layer in module.modules() if isinstance(layer, MoE)]
    require(bool(layers), f"{type(module).__name__} holds no optimized.MoE; is it built from reference.autograd.MoE?")
    for layer in layers:
        layer.requested_backend = name
    return module
