"""scores_TE → expert_TK, picked_TK: who chooses whom. One function for each rule, all with the same arguments, in the table CHOICES.

A rule returns the experts of each token, [T, K], and which of these assignments exist. Where experts choose tokens, or a threshold
does, a token may have any number of experts: then K is E, best first, and `picked` says which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .capacity import position_in_expert
from .config import GatingConfig, MoEConfig, require
from .gating import limit_to_groups, top_k
from .soft import check_soft
from .tokens import TokenInfo

Chosen = tuple[np.ndarray, np.ndarray]
"""(expert [T, K] int64, picked [T, K] bool): the experts of each token, and which of these assignments exist."""


class ChoiceContext(NamedTuple):
    """What a rule may see beside the scores; a rule that needs what is None refuses.

    logits_TE, probability_TE   the logits that were scored, and the scores as a distribution over the experts
    slots_B                     slots per expert in each group: how many tokens an expert may choose
    hash_table                  [V, K], the experts of each token id
    draws, training             random numbers; what is drawn or balanced, is so in training only
    """

    logits_TE: Any = None
    probability_TE: Any = None
    slots_B: Any = None
    hash_table: Any = None
    draws: Any = None
    training: bool = False


def _of_all_real(expert_TK: np.ndarray, tokens: TokenInfo) -> Chosen:
    return expert_TK, np.repeat(tokens.real_T[:, None], expert_TK.shape[1], axis=1)


def choose_top_k(choice_TE: np.ndarray, config: GatingConfig, tokens: TokenInfo, context: ChoiceContext) -> Chosen:
    """Every real token takes its K best experts: [T, E] → (expert [T, K], picked [T, K] bool, False for padding)."""
    return _of_all_real(top_k(choice_TE, config.top_k), tokens)


def choose_gumbel(choice_TE: np.ndarray, config: GatingConfig, tokens: TokenInfo, context: ChoiceContext) -> Chosen:
    """K experts drawn without replacement in proportion to their probability, in training (choose-gumbel): top-k of log p + Gumbel noise.

    In evaluation the K best. The gates are those of the clean scores.
    Source: Kool et al. 2019 (Gumbel-top-k); as `RSample` and for the second expert in DeepSpeed, and as `sampling` in lingvo.
    Deviates: DeepSpeed draws in evaluation too, and adds the noise to the caller's logits in place.
    """
    if not context.training:
        return choose_top_k(choice_TE, config, tokens, context)
    tiny = np.finfo(choice_TE.dtype).tiny
    uniform_TE = np.maximum(context.draws.uniform("gumbel", choice_TE.shape), tiny)
    # A draw of exactly 1 cannot occur, one that rounds to 1 can.
    gumbel_TE = -np.log(np.maximum(-np.log(uniform_TE), tiny))
    drawn_TE = np.log(np.maximum(context.probability_TE, tiny)) + gumbel_TE
    return _of_all_real(top_k(np.where(np.isneginf(choice_TE), -np.inf, drawn_TE), config.top_k), tokens)


def choose_tokens(choice_TE: np.ndarray, config: GatingConfig, tokens: TokenInfo, context: ChoiceContext) -> Chosen:
    """Every expert takes its C best tokens of each group (expert-choice); a token gets 0 to E experts, the load is even.

    Shapes: [T, E] → (expert [T, E], best first, picked [T, E] bool); C = slots of the group, ⌈factor · K · S / E⌉ with K = 2 in the paper
    (formula "per_assignment": K is the mean number of experts per token). Ties go to the earliest token.
    Source: Zhou et al. 2022, §3.2.
    Deviates: not causal: a token is chosen or not because of later ones, so a decoder trained so sees the future.
    """
    expert_TK, real_TK = _of_all_real(top_k(choice_TE, choice_TE.shape[1]), tokens)
    wish_TK = np.take_along_axis(choice_TE, expert_TK, axis=1)
    by_wish = np.argsort(-wish_TK.ravel(), kind="stable")
    place_TK = position_in_expert(expert_TK, real_TK, tokens.group_T, by_wish)
    return expert_TK, real_TK & (place_TK < np.append(context.slots_B, 0)[tokens.group_T][:, None])


def balanced_hash(vocabulary: int, config: GatingConfig, experts: int, rng: np.random.Generator) -> np.ndarray:
    """A frozen table of K different experts for each token id (hash-table), [V, K] int64, random and even.

    Every run of E shuffled ids takes each expert once for each of its K places, so the counts of a column differ by at most 1.
    Source: Roller et al. 2021. Deviates: their balanced hash weighs ids by their frequency in the training text.
    """
    turn = np.arange(experts)[:, None]
    blocks = [
        rng.permutation(experts)[(turn + rng.permutation(experts)[: config.top_k]) % experts] for _ in range(-(-vocabulary // experts))
    ]
    return np.concatenate(blocks)[:vocabulary][rng.permutation(vocabulary)]


def choose_by_hash(choice_TE: np.ndarray, config: GatingConfig, tokens: TokenInfo, context: ChoiceContext) -> Chosen:
    """The experts that a frozen table holds for the token's id (choose-hash): e_tk = H[id_t, k]; the scores choose nothing.

    Gates may still be the scores of those experts.
    Source: Roller et al. 2021; with learned gates: DeepSeek-V4 in transformers.
    Raises: ValueError without token ids, for an id beyond the table, or a table that names no expert.
    """
    table, ids_T = context.hash_table, tokens.token_ids_T
    if ids_T is None:
        raise ValueError("gating.choice is 'hash', which looks token ids up: pass token_ids=")
    real_ids = ids_T[tokens.real_T]
    low, high = real_ids.min(initial=0), real_ids.max(initial=0)
    require(low >= 0 and high < len(table), f"token_ids has ids {low} … {high}; router.hash_table has {len(table)} rows")
    require(table.min() >= 0 and table.max() < choice_TE.shape[1], f"router.hash_table names experts {table.min()} … {table.max()}")
    return _of_all_real(table[np.where(tokens.real_T, ids_T, 0)], tokens)


def balanced_assignment(affinity_TE: np.ndarray, slots: int) -> np.ndarray:
    """One expert for each token, none with more than `slots`, so that the sum of affinities is largest (balanced-assignment): [T] int64.

    Exact up to 1e-12 of the largest affinity, by successive best paths: a token enters where it adds most, and a full expert hands the
    token over that loses least by moving on. Each step costs at most E rounds of E² sums.
    Source: the problem, Lewis et al. 2021 (BASE), §3. Deviates: fairseq solves it approximately, by an auction.
    """
    affinity_TE = affinity_TE.astype(np.float64)
    tokens, experts = affinity_TE.shape
    expert_T, count_E = np.full(tokens, -1), np.zeros(experts, np.int64)
    gain_EE, mover_EE = np.full((experts, experts), -np.inf), np.zeros((experts, experts), np.int64)
    least = 1e-12 * np.abs(affinity_TE).max(initial=0)
    for token in range(tokens):
        reach_E, before_E = affinity_TE[token].copy(), np.full(experts, -1)
        for _ in range(experts - 1):
            via_EE = reach_E[:, None] + gain_EE
            better_E = via_EE.max(0) > reach_E + least
            if not better_E.any():
                break
            reach_E, before_E = np.where(better_E, via_EE.max(0), reach_E), np.where(better_E, via_EE.argmax(0), before_E)
        end = int(np.where(count_E < slots, reach_E, -np.inf).argmax())
        count_E[end] += 1
        touched = [end]
        while before_E[end] >= 0:
            expert_T[mover_EE[before_E[end], end]] = end
            end = int(before_E[end])
            touched.append(end)
        expert_T[token] = end
        for changed in touched:
            own = np.flatnonzero(expert_T == changed)
            move = affinity_TE[own] - affinity_TE[own, changed][:, None]
            gain_EE[changed], mover_EE[changed] = move.max(0, initial=-np.inf), own[move.argmax(0)] if len(own) else 0
    return expert_T


def choose_balanced(choice_TE: np.ndarray, config: GatingConfig, tokens: TokenInfo, context: ChoiceContext) -> Chosen:
    """BASE's assignment in training (choose-balanced): of all ways to give each expert ⌈S/E⌉ tokens of a group, the one of the largest Σ z.

    K = 1. In evaluation the best expert, balanced or not. The affinities are the logits, for a sigmoid hides how far apart they are.
    Source: Lewis et al. 2021, §3. Deviates: E need not divide S (then ⌈S/E⌉ is a limit); the paper needs it and shuffles tokens
    between ranks first, here a group lies on one rank.
    """
    expert_TK, real_TK = choose_top_k(choice_TE, config, tokens, context)
    if context.training:
        for group, real in enumerate(tokens.real_per_group()):
            own = (tokens.group_T == group) & tokens.real_T
            expert_TK[own, 0] = balanced_assignment(context.logits_TE[own], -(-int(real) // choice_TE.shape[1]))
    return expert_TK, real_TK


def sinkhorn_potential(logits_TE: np.ndarray, iterations: int) -> np.ndarray:
    """What to add to the logits of each expert so that softmax rows load them evenly (sinkhorn-potential), [E].

    r_t = −log Σ_e exp(z_te + c_e), then c_e = −log Σ_t exp(z_te + r_t), from c = 0, `iterations` times.
    Source: Sinkhorn 1967; for routing: Clark et al. 2022 (S-BASE) and Megatron-LM.
    """
    potential_E = np.zeros(logits_TE.shape[1], logits_TE.dtype)
    for _ in range(iterations):
        row_T = -np.logaddexp.reduce(logits_TE + potential_E, axis=1)
        potential_E = -np.logaddexp.reduce(logits_TE + row_T[:, None], axis=0)
    return potential_E


def choose_sinkhorn(choice_TE: np.ndarray, config: GatingConfig, tokens: TokenInfo, context: ChoiceContext) -> Chosen:
    """Top-k of logits made even within the group, in training (choose-sinkhorn): the K best of z_te + c_e; in evaluation of the scores.

    In fp64, with c shrunk by a millionth: where equal tokens make all experts equally good, each takes its own best, not rounding's.
    Source: Megatron-LM's `sinkhorn` routing. Deviates: it iterates until nothing moves by 1e-4; here config.iterations times.
    """
    if not context.training:
        return choose_top_k(choice_TE, config, tokens, context)
    even_TE = context.logits_TE.astype(np.float64)
    for group in range(tokens.groups):
        own = (tokens.group_T == group) & tokens.real_T
        if own.any():
            even_TE[own] += (1 - 1e-6) * sinkhorn_potential(even_TE[own], config.iterations)
    return choose_top_k(even_TE, config, tokens, context)


def choose_positive(choice_TE: np.ndarray, config: GatingConfig, tokens: TokenInfo, context: ChoiceContext) -> Chosen:
    """Every expert with a positive score (choose-positive): [T, E] → (expert [T, E], best first, picked [T, E]). K is what is aimed at.

    Source: Wang et al. 2024 (ReMoE), §3.
    """
    expert_TK, real_TK = _of_all_real(top_k(choice_TE, choice_TE.shape[1]), tokens)
    return expert_TK, real_TK & (np.take_along_axis(choice_TE, expert_TK, axis=1) > 0)


def choose_all(choice_TE: np.ndarray, config: GatingConfig, tokens: TokenInfo, context: ChoiceContext) -> Chosen:
    """Soft MoE: every token has a share in every expert, in order of their id: [T, E] → (expert [T, E], picked [T, E], all but padding).

    What the shares are, `soft.soft_mix` says.
    """
    return _of_all_real(np.broadcast_to(np.arange(choice_TE.shape[1]), choice_TE.shape).copy(), tokens)


def no_check(config: MoEConfig) -> None:
    """Nothing but what the fields of `Choice` say."""


class Choice(NamedTuple):
    """A rule, and what it can be combined with.

    choose        the rule
    every_expert  its results have E slots per token instead of K
    in_groups     it can be limited to the best groups
    biased        a correction bias steers it
    mixes         it chooses nothing: tokens and slots are mixed, in seams of its own
    check         (config) → ValueError for what else it cannot be combined with
    """

    choose: Callable[[np.ndarray, GatingConfig, TokenInfo, ChoiceContext], Chosen]
    every_expert: bool = False
    in_groups: bool = False
    biased: bool = False
    mixes: bool = False
    check: Callable[[MoEConfig], None] = no_check


CHOICES: dict[str, Choice] = {
    "top_k": Choice(choose_top_k, in_groups=True, biased=True),
    "gumbel": Choice(choose_gumbel, in_groups=True),
    "expert_choice": Choice(choose_tokens, every_expert=True, biased=True),
    "hash": Choice(choose_by_hash),
    "balanced": Choice(choose_balanced),
    "sinkhorn": Choice(choose_sinkhorn),
    "positive": Choice(choose_positive, every_expert=True, biased=True),
    "soft": Choice(choose_all, every_expert=True, mixes=True, check=check_soft),
}
"""What `GatingConfig.choice` can name."""


def slots(config: GatingConfig, experts: int) -> int:
    """Slots per token of a routing: K, or E where a token may have any number of experts."""
    return experts if CHOICES[config.choice].every_expert else config.top_k


def choose(
    scores_TE: np.ndarray, correction_bias: np.ndarray | None, config: GatingConfig, tokens: TokenInfo,
    context: ChoiceContext | None = None,
) -> Chosen:  # fmt: skip
    """The discrete half of a router (choice): a rule on scores + correction bias inside the best groups; by default the top K.

    Shapes: scores [T, E], correction_bias [E] or None → expert [T, slots] int64, picked [T, slots] bool (the assignments that exist).
    Gradient: none; a choice is piecewise constant. The bias steers the choice and is never seen by a gate.
    Source: DeepSeek-V3, §2.1.2; Wang et al. 2024 (auxiliary-loss-free balancing).
    """
    choice_TE = scores_TE if correction_bias is None else scores_TE + correction_bias
    limited_TE = limit_to_groups(choice_TE, config)
    return CHOICES[config.choice].choose(limited_TE, config, tokens, ChoiceContext() if context is None else context)
