"""How much two routings of the same tokens agree: two checkpoints of one run, or two runs whose experts have no common names."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .choices import balanced_assignment
from .config import require
from .specialization import Chance, against_chance, check_draws, deal, token_labels


class Churn(NamedTuple):
    """Plain Python numbers, ready for JSON.

    churn       1 − agreement
    agreement   beside that of routings whose tokens were dealt out anew
    corrected   agreement beyond chance: 1 where the routings are equal, about 0 where they are unrelated
    names       [E], what each expert of the second routing was called
    """

    churn: float
    agreement: Chance
    corrected: float
    names: list[int]


def best_relabelling(common_EE: np.ndarray) -> np.ndarray:
    """The one-to-one renaming of the second routing's experts that makes two routings agree most (best-relabelling): [E] int64.

    common[e, f]: how much tokens that the first routing gives to e are given to f by the second. The f-th entry is the new name of f.
    Exact, by the assignment that BASE balances tokens with. Raises ValueError for a matrix that is not square.
    Source: the problem, Kuhn 1955 ("The Hungarian method for the assignment problem").
    """
    require(common_EE.ndim == 2 and common_EE.shape[0] == common_EE.shape[1], f"common has shape {common_EE.shape}; it must be square")
    return balanced_assignment(np.asarray(common_EE, np.float64).T, 1)


def routing_churn(
    before_TK: ArrayLike, after_TK: ArrayLike, experts: int, rng: np.random.Generator, *,
    relabel: bool = False, within: ArrayLike | None = None, permutations: int = 200,
) -> Churn:  # fmt: skip
    """The share of a token's experts that another routing does not give it, beside what chance alone would leave in common.

    Equation (routing-churn): churn = 1 − a, a = mean_t |A_t ∩ B_t| / K.
    Equation (chance-corrected): κ = (a − a₀) / (1 − a₀), a₀ the mean agreement over the permutations.

    before, after [T, K] hold the experts of the same tokens, each token's different from each other. With `relabel` the experts of `after`
    are first renamed so that both agree most: needed between runs, where a number means nothing, and harmless between checkpoints.

    A permutation deals the second routing's tokens out anew, among tokens of equal `within` [T] only where it is given (byte ids: is
    there agreement beyond what the byte explains?), and looks for the best names again: with E! of them the best one agrees above 1 / E by
    chance. No gradient. Raises ValueError for different or wrong shapes, a float dtype, an expert out of range or twice in a token, no
    token, permutations < 1, and an `rng` that is no Generator.
    Source: routing fluctuation, StableMoE (Dai et al. 2022), §1; κ, Cohen 1960. Deviates: StableMoE counts the last step at which a token's
    expert is not its final one; OLMoE's router saturation is a between a checkpoint and the last one. Neither compares with chance.
    """
    check_draws(rng, permutations, "permutations")
    before_TE, after_TE = (_members(side, experts, name) for side, name in ((before_TK, "before_TK"), (after_TK, "after_TK")))
    shapes = np.shape(before_TK), np.shape(after_TK)
    require(shapes[0] == shapes[1], f"before_TK has shape {shapes[0]}, but after_TK {shapes[1]}")
    tokens, chosen = shapes[0]
    stratum = None if within is None else token_labels(within, tokens, "within")

    def agreement(other_TE: np.ndarray) -> tuple[float, np.ndarray]:
        common_EE = before_TE.T @ other_TE
        names_E = best_relabelling(common_EE) if relabel else np.arange(experts)
        return float(common_EE[names_E, np.arange(experts)].sum()) / (tokens * chosen), names_E

    value, names_E = agreement(after_TE)
    chance = against_chance(value, [agreement(after_TE[deal(rng, stratum, tokens)])[0] for _ in range(permutations)])
    room = 1 - chance.null_mean
    # Where chance alone agrees everywhere (one expert takes all), there is nothing left to agree on.
    return Churn(1 - value, chance, chance.excess / room if room > 1e-12 else 0.0, names_E.tolist())


def _members(expert_TK: ArrayLike, experts: int, name: str) -> np.ndarray:
    """1 where an expert is among a token's, [T, E] float64, of checked input."""
    expert_TK = np.asarray(expert_TK)
    require(expert_TK.ndim == 2 and expert_TK.size > 0, f"{name} has shape {expert_TK.shape}; it must be [T, K] with at least 1 token")
    require(expert_TK.dtype.kind in "iu", f"{name} has dtype {expert_TK.dtype}; it must hold integers")
    low, high = int(expert_TK.min()), int(expert_TK.max())
    require(low >= 0 and high < experts, f"{name} holds {low} to {high}, but there are {experts} experts")
    member_TE = np.zeros((len(expert_TK), experts))
    np.put_along_axis(member_TE, expert_TK.astype(np.int64), 1.0, axis=1)
    twice = np.flatnonzero(member_TE.sum(1) != expert_TK.shape[1])
    require(twice.size == 0, f"{name} gives token {twice[0] if twice.size else 0} an expert twice")
    return member_TE
