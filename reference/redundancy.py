"""Whether experts can stand in for each other: the loss while each token must do without the experts that it likes best.

Where experts know the same things, the next ones take over and little is lost. The model is not part of this file: it is a callable that
gives the loss of some text while a rule says which experts each token must do without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .config import require
from .gating import top_k
from .specialization import Chance, against_chance, check_draws

Rule = Callable[[np.ndarray], np.ndarray]
"""The scores by which a layer chooses, [T, E] → True where an expert is disabled for a token."""


def disable_top(count: int) -> Rule:
    """Each token loses its `count` most preferred experts (disabled-experts): those that `top_k` would take first, ties to the lowest id.

    Source: DeepSeekMoE (Dai et al. 2024), §4.5.
    """

    def rule(choice_TE: np.ndarray) -> np.ndarray:
        disabled_TE = np.zeros(choice_TE.shape, bool)
        np.put_along_axis(disabled_TE, top_k(choice_TE, count), True, axis=1)
        return disabled_TE

    return rule


def disable_random(count: int, rng: np.random.Generator) -> Rule:
    """Each token loses `count` experts drawn at random, whatever it prefers."""

    def rule(choice_TE: np.ndarray) -> np.ndarray:
        return disable_top(count)(rng.random(choice_TE.shape))

    return rule


def without_disabled(choice_TE: np.ndarray, rule: Rule, top_k_count: int) -> np.ndarray:
    """The experts that take over: the top_k_count best of those that the rule leaves, [T, K]. Raises ValueError where too few are left."""
    disabled_TE = rule(choice_TE)
    require(disabled_TE.shape == choice_TE.shape, f"the rule gave shape {disabled_TE.shape} for scores of shape {choice_TE.shape}")
    left = choice_TE.shape[1] - int(disabled_TE.sum(1).max(initial=0))
    require(left >= top_k_count, f"{left} experts are left for a token, but top_k is {top_k_count}")
    return top_k(np.where(disabled_TE, -np.inf, choice_TE), top_k_count)


class Masked(NamedTuple):
    """Plain Python numbers, ready for JSON.

    disabled   experts that each token lost
    loss       with the most preferred ones gone
    increase   loss − the loss with all experts, beside the increase with as many gone at random
    """

    disabled: int
    loss: float
    increase: Chance


def redundancy(
    loss: Callable[[Rule], float], counts: Sequence[int], rng: np.random.Generator, *, experts: int, top_k: int, draws: int = 20
) -> list[Masked]:
    """The loss while each token does without its m most preferred experts, for each m of `counts`.

    Equation (masked-increase): Δ_m = L(without the m best of each token) − L(with all).

    `loss(rule)` is the loss of a fixed text, in every MoE layer of which the K experts of a token are chosen by `without_disabled`; it must
    depend on nothing but the rule. A small Δ_m says that others know the same: experts are redundant. A draw of the null takes m
    experts at random from each token. Where Δ_m is no larger than that, the router's order of experts does not matter to the loss.

    `draws` random masks per count (their seeds are drawn from `rng`), so `loss` is called 1 + len(counts) · (1 + draws) times. No gradient.
    Raises ValueError for an m below 0 or above experts − top_k, draws < 1, and an `rng` that is no Generator.
    Source: DeepSeekMoE (Dai et al. 2024), §4.5. Deviates: there m is a share of the experts, and there is no null.
    """
    check_draws(rng, draws, "draws")
    for count in counts:
        require(0 <= count <= experts - top_k, f"counts holds {count}; {experts} experts with top_k {top_k} leave 0 to {experts - top_k}")
    whole, found = loss(disable_top(0)), []
    for count in counts:
        null = [loss(disable_random(count, child)) - whole for child in rng.spawn(draws)]
        masked = loss(disable_top(count))
        found.append(Masked(count, masked, against_chance(masked - whole, null)))
    return found
