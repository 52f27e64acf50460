"""scores_TE → expert_TK, picked_TK in PyTorch; the rules and sources are those of `reference.choices`.

A choice has no gradient, so the rules that are loops, the balanced assignment and Sinkhorn's algorithm, are the NumPy functions
themselves, on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import choices as numpy_choices
from ..config import GatingConfig, require
from .capacity import position_in_expert
from .gating import limit_to_groups, top_k
from .tokens import TokenInfo, checks_values, on_host

Chosen = tuple[Tensor, Tensor]


class ChoiceContext(NamedTuple):
    """What a rule may see beside the scores: the fields of `reference.choices.ChoiceContext`; slots_B None: room for all."""

    logits_TE: Any = None
    probability_TE: Any = None
    slots_B: Any = None
    hash_table: Any = None
    draws: Any = None
    training: bool = False


def _of_all_real(expert_TK: Tensor, tokens: TokenInfo) -> Chosen:
    return expert_TK, tokens.real_T[:, None].expand(expert_TK.shape)


def choose_top_k(choice_TE: Tensor, config: GatingConfig, tokens: TokenInfo, context: ChoiceContext) -> Chosen:
    """Every real token takes its K best experts: [T, E] → (expert [T, K], picked [T, K] bool, False for padding)."""
    return _of_all_real(top_k(choice_TE, config.top_k), tokens)


def choose_gumbel(choice_TE: Tensor, config: GatingConfig, tokens: TokenInfo, context: ChoiceContext) -> Chosen:
    """K experts drawn without replacement in proportion to their probability, in training (choose-gumbel)."""
    if not context.training:
        return choose_top_k(choice_TE, config, tokens, context)
    tiny = torch.finfo(choice_TE.dtype).tiny
    uniform_TE = context.draws.uniform("gumbel", choice_TE.shape, choice_TE).clamp(min=tiny)
    gumbel_TE = -(-uniform_TE.log()).clamp(min=tiny).log()
    drawn_TE = context.probability_TE.clamp(min=tiny).log() + gumbel_TE
    return _of_all_real(top_k(drawn_TE.masked_fill(choice_TE.isneginf(), -torch.inf), config.top_k), tokens)


def choose_tokens(choice_TE: Tensor, config: GatingConfig, tokens: TokenInfo, context: ChoiceContext) -> Chosen:
    """Every expert takes its C best tokens of each group (expert-choice): [T, E] → (expert [T, E], best first, picked [T, E] bool)."""
    expert_TK, real_TK = _of_all_real(top_k(choice_TE, choice_TE.shape[1]), tokens)
    if context.slots_B is None:
        return expert_TK, real_TK
    by_wish_N = torch.sort(choice_TE.gather(1, expert_TK).flatten(), descending=True, stable=True).indices
    place_TK = position_in_expert(expert_TK, real_TK, tokens.group_T, by_wish_N)
    return expert_TK, real_TK & (place_TK < context.slots_B[tokens.group_T][:, None])


def choose_by_hash(choice_TE: Tensor, config: GatingConfig, tokens: TokenInfo, context: ChoiceContext) -> Chosen:
    """The experts that a frozen table holds for the token's id (choose-hash). Ids are compared with the table under MOEBIUS_CHECK=1."""
    table, ids_T = context.hash_table, tokens.token_ids_T
    require(ids_T is not None, "gating.choice is 'hash', which looks token ids up: pass token_ids=")
    ids_T = ids_T.masked_fill(~tokens.real_T, 0).long()
    if checks_values() and len(ids_T):
        low, high = int(ids_T.min()), int(ids_T.max())
        require(low >= 0 and high < len(table), f"token_ids has ids {low} … {high}; router.hash_table has {len(table)} rows")
        least, most = int(table.min()), int(table.max())
        require(least >= 0 and most < choice_TE.shape[1], f"router.hash_table names experts {least} … {most}")
    return _of_all_real(table[ids_T], tokens)


def _on_host(rule: Callable[..., numpy_choices.Chosen]) -> Callable[[Tensor, GatingConfig, TokenInfo, ChoiceContext], Chosen]:
    def choose_on_host(choice_TE: Tensor, config: GatingConfig, tokens: TokenInfo, context: ChoiceContext) -> Chosen:
        logits_TE = context.logits_TE.detach().cpu().numpy()
        known = numpy_choices.ChoiceContext(logits_TE=logits_TE, training=context.training)
        chosen = rule(choice_TE.cpu().numpy(), config, on_host(tokens), known)
        expert_TK, picked_TK = (torch.from_numpy(array).to(choice_TE.device) for array in chosen)
        return expert_TK, picked_TK

    return choose_on_host


def choose_positive(choice_TE: Tensor, config: GatingConfig, tokens: TokenInfo, context: ChoiceContext) -> Chosen:
    """Every expert with a positive score (choose-positive): [T, E] → (expert [T, E], best first, picked [T, E])."""
    expert_TK, real_TK = _of_all_real(top_k(choice_TE, choice_TE.shape[1]), tokens)
    return expert_TK, real_TK & (choice_TE.gather(1, expert_TK) > 0)


def choose_all(choice_TE: Tensor, config: GatingConfig, tokens: TokenInfo, context: ChoiceContext) -> Chosen:
    """Soft MoE: every token has a share in every expert, in order of their id: [T, E] → (expert [T, E], picked [T, E])."""
    return _of_all_real(torch.arange(choice_TE.shape[1], device=choice_TE.device).repeat(len(choice_TE), 1), tokens)


CHOICES: dict[str, Callable[[Tensor, GatingConfig, TokenInfo, Any], Chosen]] = {
    "top_k": choose_top_k,
    "gumbel": choose_gumbel,
    "expert_choice": choose_tokens,
    "hash": choose_by_hash,
    "balanced": _on_host(numpy_choices.choose_balanced),
    "sinkhorn": _on_host(numpy_choices.choose_sinkhorn),
    "positive": choose_positive,
    "soft": choose_all,
}


def choose(
    scores_TE: Tensor, correction_bias: Tensor | None, config: GatingConfig, tokens: TokenInfo, context: ChoiceContext | None = None
) -> Chosen:
    """The discrete half of a router (choice): a rule on scores + correction bias inside the best groups; by default the top K.

    Shapes: scores [T, E], correction_bias [E] or None → expert [T, slots] int64, picked [T, slots] bool. Gradient: none.
    """
    choice_TE = scores_TE if correction_bias is None else scores_TE + correction_bias
    return CHOICES[config.choice](limit_to_groups(choice_TE, config), config, tokens, ChoiceContext() if context is None else context)
