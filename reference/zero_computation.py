"""Experts that are no networks: they answer with nothing, with the token itself, or with a mix of it and a learned vector.

They are the last of a layer's experts, in the order of `ExpertsConfig.zero_computation`, and routed to like any other. Since some of a
token's choices then cost nothing, tokens differ in how many networks they pass through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .checks import is_amount, is_count, require
from .config import ExpertsConfig, MoEConfig
from .scores import at_least_fp32, softmax_backward, softmax_forward

if TYPE_CHECKING:
    from .experts import Params


def zero_forward(x_ND: np.ndarray, arrays: Params) -> tuple[np.ndarray, None]:
    """Nothing (expert-zero): out = 0; the token's other experts answer alone. [N, D] → [N, D]. Source: Jin et al. 2024 (MoE++), eq. 3."""
    return np.zeros_like(x_ND), None


def zero_backward(dout_ND: np.ndarray, cache: None) -> tuple[np.ndarray, Params]:
    """(dx of zeros, no gradients) of `zero_forward`."""
    return np.zeros_like(dout_ND), {}


def copy_forward(x_ND: np.ndarray, arrays: Params) -> tuple[np.ndarray, None]:
    """The token itself (expert-copy): out = x, so that its gate makes it a residual connection of its own. [N, D] → [N, D].

    Source: Jin et al. 2024 (MoE++), eq. 4; LongCat-Flash technical report (Meituan 2025), §2.1, its only kind.
    """
    return x_ND, None


def copy_backward(dout_ND: np.ndarray, cache: None) -> tuple[np.ndarray, Params]:
    """(dx = dout, no gradients) of `copy_forward`."""
    return dout_ND, {}


class ConstantCache(NamedTuple):
    """x_ND: the input; arrays: the expert's own; share: α [N, 2] and what softmax keeps."""

    x_ND: np.ndarray
    arrays: Params
    share: np.ndarray


def constant_forward(x_ND: np.ndarray, arrays: Params) -> tuple[np.ndarray, ConstantCache]:
    """A mix of the token with a learned vector (expert-constant): out = α₁ x + α₂ v, α = softmax(W_c x), in fp32 or better.

    Shapes: x [N, D], v [D], W_c [2, D] → (out [N, D], cache).
    Gradient: dα = (⟨dout, x⟩, ⟨dout, v⟩), dx = α₁ dout + W_cᵀ softmax'(dα), dv = Σ α₂ dout.
    Source: Jin et al. 2024 (MoE++), eq. 5.
    """
    x_ND = at_least_fp32(x_ND)
    share, _ = softmax_forward(x_ND @ arrays["constant_gate"].T)
    return share[:, :1] * x_ND + share[:, 1:] * arrays["constant"], ConstantCache(x_ND, arrays, share)


def constant_backward(dout_ND: np.ndarray, cache: ConstantCache) -> tuple[np.ndarray, Params]:
    """(dx [N, D], {"constant", "constant_gate"}) of `constant_forward`."""
    x_ND, arrays, share = cache
    dshare = np.stack([(dout_ND * x_ND).sum(1), dout_ND @ arrays["constant"]], axis=1)
    dlogits = softmax_backward(dshare, share)
    dx_ND = share[:, :1] * dout_ND + dlogits @ arrays["constant_gate"]
    return dx_ND, {"constant": (share[:, 1:] * dout_ND).sum(0), "constant_gate": dlogits.T @ x_ND}


class Kind(NamedTuple):
    """forward: (x [N, D], the expert's arrays) → (out [N, D], cache); backward → (dx, gradients); arrays: name → shape without D."""

    forward: Callable[[np.ndarray, Params], tuple[np.ndarray, Any]]
    backward: Callable[[np.ndarray, Any], tuple[np.ndarray, Params]]
    arrays: dict[str, tuple[int, ...]] = {}  # noqa: RUF012 (read only)


KINDS: dict[str, Kind] = {
    "zero": Kind(zero_forward, zero_backward),
    "copy": Kind(copy_forward, copy_backward),
    "constant": Kind(constant_forward, constant_backward, {"constant": (), "constant_gate": (2,)}),
}


def zero_computation_shapes(d_model: int, config: ExpertsConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what these experts learn, stacked by kind: experts.constant [n, D], experts.constant_gate [n, 2, D]."""
    kinds = ((KINDS[kind].arrays, number) for kind, number in config.zero_computation)
    return {f"experts.{name}": (number, *rows, d_model) for arrays, number in kinds for name, rows in arrays.items()}


def members(config: ExpertsConfig) -> list[tuple[str, int]]:
    """(kind, number inside its kind) of each of these experts, in the order of their ids, which follow those of the networks."""
    return [(kind, number) for kind, count in config.zero_computation for number in range(count)]


class ZeroComputationCache(NamedTuple):
    """bounds: whose rows are whose; params, config: as given; inner: one cache per expert."""

    bounds: np.ndarray
    params: Params
    config: ExpertsConfig
    inner: list[Any]


def zero_computation_forward(
    rows_ND: np.ndarray, bounds: np.ndarray, params: Params, config: ExpertsConfig
) -> tuple[np.ndarray, ZeroComputationCache]:
    """Each of these experts on its own rows: rows [N, D] sorted by expert, bounds [their number + 1] from 0 → (out [N, D], cache)."""
    out_ND, inner = np.empty_like(rows_ND), []
    for place, (kind, number) in enumerate(members(config)):
        own = slice(bounds[place], bounds[place + 1])
        arrays = {name: params[f"experts.{name}"][number] for name in KINDS[kind].arrays}
        out_ND[own], cache = KINDS[kind].forward(rows_ND[own], arrays)
        inner.append(cache)
    return out_ND, ZeroComputationCache(bounds, params, config, inner)


def zero_computation_backward(dout_ND: np.ndarray, cache: ZeroComputationCache) -> tuple[np.ndarray, Params]:
    """(drows [N, D], gradients by name) of `zero_computation_forward`; an expert without rows gets gradients of exactly 0."""
    bounds, params, config, inner = cache
    drows_ND, dparams = np.empty_like(dout_ND), {}
    for place, (kind, number) in enumerate(members(config)):
        own = slice(bounds[place], bounds[place + 1])
        drows_ND[own], gradients = KINDS[kind].backward(dout_ND[own], inner[place])
        for name, gradient in gradients.items():
            stack = dparams.setdefault(f"experts.{name}", np.zeros_like(params[f"experts.{name}"]))
            stack[number] = gradient
    return drows_ND, dparams


def networks_per_token(config: MoEConfig) -> float:
    """How many networks a token meets when every expert gets its share of the load (networks-per-token): K τ N / (τ N + Z).

    N networks, Z zero-computation experts, τ = experts.network_share; K where there are only networks.
    Source: Jin et al. 2024 (MoE++), Table 1; with τ = 1 it is LongCat-Flash's K_e = 8 of K = 12.
    """
    networks, share = config.experts.networks, config.experts.network_share
    return config.gating.top_k * (share * networks / (share * networks + config.experts.count - networks))


def check(config: MoEConfig) -> None:
    """ValueError where the fields about these experts contradict each other, or others that take all experts for equal networks."""
    from .choices import CHOICES

    experts, gating = config.experts, config.gating
    free, share, counts = experts.zero_computation, experts.network_share, [number for _, number in experts.zero_computation]
    require(all(is_count(number, 1) for number in counts), f"experts.zero_computation is {free}; each kind needs at least 1 expert")
    require(len(dict(free)) == len(free), f"experts.zero_computation names a kind twice: {free}")
    require(experts.networks > 0, f"experts.zero_computation is {free}, which leaves no network of experts.count = {experts.count}")
    require(is_amount(share) and share > 0, f"experts.network_share is {share!r}; it must be a finite number > 0")
    require(bool(free) or share == 1, f"experts.network_share is {share}, but experts.zero_computation is empty: nothing to share with")
    require(not free or not experts.gate_inputs, f"experts.gate_inputs is True, but experts.zero_computation is {free}")
    mixes = getattr(CHOICES[gating.choice], "mixes", False)
    require(not free or not mixes, f"gating.choice is {gating.choice!r}, whose experts see slots, but experts.zero_computation is {free}")
    plain = gating.choice == "top_k" and config.capacity.recycle == "none" and config.balance.bias_rule == "none"
    require(
        share == 1 or plain,
        f"experts.network_share is {share}, for choice 'top_k' without recycling and bias rule, but gating.choice is {gating.choice!r}, "
        f"capacity.recycle {config.capacity.recycle!r}, balance.bias_rule {config.balance.bias_rule!r}",
    )
