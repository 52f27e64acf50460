"""The inputs on which tracks are compared: few, small, each here for a reason, and the same numbers everywhere.

Arithmetic is compared with the routing given, so that a near-tie which flips in bfloat16 is never mistaken for a wrong product.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..balancing import count_load, mean_probability
from ..config import ExpertsConfig, GatingConfig, MoEConfig, require
from ..layer import Routing, apply_experts, init_params
from ..tokens import token_info
from .equal import rms

SMALL = 100_000
"""So many products an interpreter gets through."""


@dataclass(frozen=True)
class Case:
    """One shape of the problem, in the order T, D, F, E, K in which the field names them.

    name, reason    what it is called, and which mistake it is there to catch
    load            who is chosen: a key of LOADS
    activation, bias   of the experts
    contiguous      False: x and its cotangent lie in memory column by column
    padded          this share of the tokens is padding, spread over the sequence
    dropped         this share of the assignments found no slot
    """

    name: str
    reason: str
    T: int
    D: int
    F: int
    E: int
    K: int
    load: str = "even"
    activation: str = "swiglu"
    bias: bool = False
    contiguous: bool = True
    padded: float = 0.0
    dropped: float = 0.0

    def __post_init__(self) -> None:
        require(self.load in LOADS, f"case {self.name!r} has the load {self.load!r}; known: {', '.join(LOADS)}")
        for field in ("padded", "dropped"):
            share = getattr(self, field)
            require(0 <= share < 1, f"case {self.name!r} has {field} = {share!r}; it must lie in [0, 1)")
        self.config()

    def config(self) -> MoEConfig:
        """The plainest layer of this shape."""
        experts = ExpertsConfig(count=self.E, width=self.F, activation=self.activation, bias=self.bias)
        return MoEConfig(self.D, gating=GatingConfig(top_k=self.K), experts=experts)

    @property
    def products(self) -> int:
        """Multiplications of one matrix pass, T·K·D·F: what an interpreter's time is proportional to."""
        return self.T * self.K * self.D * self.F

    @property
    def least_mutations(self) -> int:
        """How many kinds of mutation must change the truth: without tokens there is nothing to change."""
        return 3 if self.T else 0


@dataclass(frozen=True)
class Inputs:
    """What a case draws, in float64; `rounded` gives the same in a target dtype.

    x, dy      [T, D], the tokens and the cotangent of y, random
    params     as `init_params` names them
    pad_mask   [T] bool
    routing    a given one: distinct experts per token, gates in [0.2, 1), 0 where not kept, as an identity router would give them
    """

    config: MoEConfig
    x: NDArray[np.float64]
    dy: NDArray[np.float64]
    params: dict[str, NDArray[np.float64]]
    routing: Routing
    pad_mask: NDArray[np.bool_]

    def rounded(self, round_array: Callable[[NDArray], NDArray]) -> Inputs:
        """The same inputs with `round_array` (for example `partial(equal.round_to, dtype="bfloat16")`) applied to its floats."""
        params = {name: round_array(tensor) if tensor.dtype.kind == "f" else tensor for name, tensor in self.params.items()}
        x, dy = (_laid_out(round_array(array), array.flags.c_contiguous) for array in (self.x, self.dy))
        routing = dataclasses.replace(self.routing, gate=round_array(self.routing.gate))
        return dataclasses.replace(self, x=x, dy=dy, params=params, routing=routing)


def _even(rng: np.random.Generator, case: Case) -> NDArray[np.int64]:
    """K distinct experts per token, all equally likely."""
    return np.argsort(rng.random((case.T, case.E)), axis=1)[:, : case.K]


def _one_takes_all(rng: np.random.Generator, case: Case) -> NDArray[np.int64]:
    """One expert, neither the first nor the last where there is another, is in every token's choice, at any slot."""
    preference_TE = rng.random((case.T, case.E))
    preference_TE[:, case.E // 2] = -1
    return rng.permuted(np.argsort(preference_TE, axis=1)[:, : case.K], axis=1)


def _few(rng: np.random.Generator, case: Case) -> NDArray[np.int64]:
    """Only K + 1 of the experts are ever chosen: there are empty ones before, between and after them."""
    require(case.E >= case.K + 3, f"case {case.name!r} has E = {case.E}; with K = {case.K} the load 'few' needs at least {case.K + 3}")
    used = np.linspace(1, case.E - 2, case.K + 1).astype(np.int64)
    return used[np.argsort(rng.random((case.T, case.K + 1)), axis=1)[:, : case.K]]


def _skewed(rng: np.random.Generator, case: Case) -> NDArray[np.int64]:
    """Zipf's law: expert e is preferred with weight 1 / (e + 1)."""
    preference_TE = np.log(1 / np.arange(1, case.E + 1)) + rng.gumbel(size=(case.T, case.E))
    return np.argsort(-preference_TE, axis=1)[:, : case.K]


LOADS: dict[str, Callable[[np.random.Generator, Case], NDArray[np.int64]]] = {
    "even": _even,
    "one_takes_all": _one_takes_all,
    "few": _few,
    "skewed": _skewed,
}
"""What `Case.load` can name: (rng, case) → expert [T, K]."""

CASES = (
    Case("no-tokens", "a grid of zero programs, a product with zero rows, a mean over nothing", 0, 32, 48, 4, 2),
    Case("one-token", "decoding: most experts are empty, every tile is ragged", 1, 32, 48, 4, 2),
    Case("few-tokens", "fewer tokens than any tile, an odd number of everything", 7, 24, 40, 5, 2, load="skewed"),
    Case("tile-minus-one", "the last tile lacks one row", 63, 32, 16, 4, 2),
    Case("tile", "whole tiles: a bound off by one reads past the end", 64, 32, 16, 4, 2),
    Case("tile-plus-one", "the last tile holds one row", 65, 32, 16, 4, 2),
    Case("many-tokens", "more blocks than programs run at once: sort and scan across blocks", 1000, 16, 24, 8, 2, load="skewed"),
    Case("prime-experts", "E is no power of two: padded lanes must not be chosen", 64, 16, 16, 13, 3),
    Case("top-1", "K = 1: a slot axis of length one, the swap of slots is no mutation", 33, 32, 24, 4, 1),
    Case("top-all", "K = E: every expert sees every token", 17, 24, 16, 5, 5),
    Case("one-expert", "E = K = 1: the layer is a dense network", 20, 24, 32, 1, 1),
    Case("one-takes-all", "collapse: one expert holds all rows, the others none", 65, 16, 24, 6, 1, load="one_takes_all"),
    Case("one-in-all", "one expert is in every choice, at changing slots", 48, 16, 24, 7, 2, load="one_takes_all"),
    Case(
        "empty-experts",
        "experts without rows between others: their gradients are exactly 0, not left-over memory",
        40,
        32,
        16,
        9,
        2,
        load="few",
    ),
    Case("off-tile-widths", "D and F divide by nothing: masks on every axis", 19, 37, 29, 3, 2),
    Case("wide", "several tiles along D and F", 24, 96, 80, 4, 2),
    Case("non-contiguous", "strides must be read, not assumed", 30, 40, 24, 4, 2, contiguous=False),
    Case("padding", "padding takes no slot, and its output is exactly 0", 41, 24, 16, 4, 2, padded=0.3),
    Case("drops", "dropped assignments: a gate that must not be read, tokens with no expert left", 50, 24, 16, 4, 2, dropped=0.4),
    Case("relu", "Switch and GShard: no gate matrix, exact zeros in the hidden layer", 26, 24, 32, 4, 1, activation="relu"),
    Case("gelu-bias", "both biases, the down bias under the gate", 22, 24, 32, 4, 2, activation="gelu", bias=True),
    Case("swiglu-bias", "a gated activation with biases; a row of zeros no longer stays zero", 29, 24, 16, 5, 2, bias=True, padded=0.2),
)


def small() -> tuple[Case, ...]:
    """The cases of at most SMALL products, for tests that interpret a kernel instruction by instruction."""
    return tuple(case for case in CASES if case.products <= SMALL)


def get(name: str) -> Case:
    """The case of this name. Raises ValueError with the known names."""
    found = {case.name: case for case in CASES}
    require(name in found, f"no case is called {name!r}; known: {', '.join(found)}")
    return found[name]


def draw(case: Case, config: MoEConfig | None = None) -> Inputs:
    """The inputs of a case, a function of its name alone (and of `config`, for another layer of the same shape).

    Weights are scaled so that what enters an activation has an RMS near 1 and the routed output exactly 1; biases are never all 0.
    Raises ValueError where the config's D, E or K are not the case's.
    """
    config = case.config() if config is None else config
    shape = {"D": config.d_model, "E": config.experts.count, "K": config.gating.top_k}
    for letter, value in shape.items():
        require(value == getattr(case, letter), f"case {case.name!r} has {letter} = {getattr(case, letter)}, the config {value}")
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(case.name.encode()).digest()[:8], "little"))
    x_TD, dy_TD = rng.standard_normal((2, case.T, case.D))
    pad_T = np.zeros(case.T, bool)
    pad_T[rng.permutation(case.T)[: round(case.padded * case.T)]] = True
    routing = _given_routing(rng, case, pad_T)
    params = {name: _lively(np.asarray(array, np.float64), rng) for name, array in init_params(config, rng).items()}
    size = rms(apply_experts(x_TD, routing, params, config)) or 1.0
    # The output is linear in the down-projections and their biases.
    params = {name: weight / size if ".down_proj" in name else weight for name, weight in params.items()}
    return Inputs(config, _laid_out(x_TD, case.contiguous), _laid_out(dy_TD, case.contiguous), params, routing, pad_T)


def _given_routing(rng: np.random.Generator, case: Case, pad_T: NDArray[np.bool_]) -> Routing:
    expert_TK = LOADS[case.load](rng, case)
    scores_TE = rng.uniform(0.2, 1.0, (case.T, case.E))
    picked_TK = np.repeat(~pad_T[:, None], case.K, axis=1)
    keep_TK = picked_TK & (rng.random(expert_TK.shape) >= case.dropped)
    gate_TK = np.where(keep_TK, np.take_along_axis(scores_TE, expert_TK, axis=1), 0)
    load_E = count_load(expert_TK, picked_TK, case.E)
    importance_E = mean_probability(scores_TE, token_info(case.T, pad_mask=pad_T))
    return Routing(expert_TK, gate_TK, keep_TK, load_E, importance_E, scores_TE, scores_TE, {})


def _lively(weight: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Weights with an RMS of 1/√(inputs); what starts at 0 (a bias) becomes random, for a zero proves nothing."""
    if not np.any(weight):
        return 0.25 * rng.standard_normal(weight.shape)
    return weight / np.sqrt(np.mean(weight**2) * weight.shape[-1])


def _laid_out(array: NDArray[np.float64], contiguous: bool) -> NDArray[np.float64]:
    return np.ascontiguousarray(array) if contiguous else np.asfortranarray(array)
