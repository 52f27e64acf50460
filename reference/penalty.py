"""ReMoE's penalty: an L1 norm of the gates whose weight follows how many experts a token uses, and so sets their number."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .config import MoEConfig, require

if TYPE_CHECKING:
    from .balancing import LossInputs


class GateL1Cache(NamedTuple):
    """weight_TE: ∂loss/∂scores."""

    weight_TE: np.ndarray


def gate_l1_forward(inputs: LossInputs) -> tuple[np.ndarray, GateL1Cache]:
    """The L1 norm of the gates, dearer for busy experts (loss-gate-l1): L = E/T Σ_t Σ_e f_e s_te, f_e = load_e / (K T), for scores ≥ 0.

    Without a lower bound but 0, where no expert is on: hence its weight is multiplied by a penalty that moves (`update_penalty`).
    Gradient: ds_te = E f_e / T; f is a count and has none.
    Source: Wang et al. 2024 (ReMoE), §3.4, its load-balancing L1 term.
    Deviates: ReMoE averages over all layers and has one penalty for all; here each layer has its own.
    """
    scores_TE, real_T = inputs.scores_TE, inputs.tokens.real_T
    real, experts = max(int(real_T.sum()), 1), scores_TE.shape[1]
    load_E = np.bincount(inputs.expert_TK[inputs.picked_TK], minlength=experts)
    weight_TE = (experts * load_E / (inputs.top_k * real**2) * real_T[:, None]).astype(scores_TE.dtype)
    return (weight_TE * scores_TE).sum(), GateL1Cache(weight_TE)


def gate_l1_backward(dloss: float, cache: GateL1Cache) -> dict[str, np.ndarray]:
    """Cotangents of `gate_l1_forward`."""
    return {"scores": dloss * cache.weight_TE}


def loss_weights(config: MoEConfig, penalty: np.ndarray | None) -> dict[str, float]:
    """The weight of each loss in the total, by name: those of the config, gate_l1's multiplied by the penalty [1]."""
    return {name: weight * float(penalty[0]) if name == "gate_l1" else weight for name, weight in config.balance.losses}


def update_penalty(penalty: np.ndarray, load_E: np.ndarray, tokens: int, config: MoEConfig) -> np.ndarray:
    """The penalty after one optimizer step (penalty-update): λ ← λ · α^sign(load / T − K): more while tokens use too many experts.

    Shapes: penalty [1], load [E] over the whole batch, all ranks and micro-batches; tokens: T, its real tokens → new penalty [1], in
    the old one's dtype.
    Source: Wang et al. 2024 (ReMoE), §3.3, with the sparsity S = 1 − load / (T E) against its target 1 − K / E; λ₀ = 1e-8, α = 1.2.
    Raises: ValueError for a load of another shape.
    """
    experts = config.experts.count
    require(np.shape(load_E) == (experts,), f"load has shape {np.shape(load_E)}; the layer has {experts} experts")
    step = np.sign(int(np.sum(load_E)) - tokens * config.gating.top_k)
    return (penalty * config.balance.penalty_rate ** float(step)).astype(penalty.dtype)
