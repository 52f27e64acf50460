"""Who sends what to whom: computed from a routing and a placement, agreed upon before a single token moves.

A token crosses once to a rank, however many of its experts live there. With it travel, for each of those experts, the gate and a code:
twice the expert's place on that rank, plus 1 where a new token begins. Where several ranks share the width of an expert, the token goes to
each of them, and the sum over experts that brings it home is also the sum over their parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .placement import Placement
from .transport import DisagreementError, Transport, require_agreement

CODE = torch.int32
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Outgoing(NamedTuple):
    """What this rank sends, in order of rank, token, expert.

    token_Q           the token of each crossing (a token and a rank that has experts of it)
    token_N, slot_N   token and slot of each kept assignment, once for each part of its expert;  code_N: as it travels
    crossings, assignments   how many of each go to every rank
    """

    token_Q: Tensor
    token_N: Tensor
    slot_N: Tensor
    code_N: Tensor
    crossings: list[int]
    assignments: list[int]


class Incoming(NamedTuple):
    """How many crossings and assignments come from every rank."""

    crossings: list[int]
    assignments: list[int]


def outgoing(expert_TK: Tensor, keep_TK: Tensor, placement: Placement) -> Outgoing:
    """What has to be sent for a routing: expert [T, K] ids, keep [T, K]. For an expert without a home nothing is: it has no network."""
    home_E, place_E = (table.to(expert_TK.device) for table in placement.tables)
    sent_TK = keep_TK & (expert_TK < len(home_E))
    token_N, slot_N = (of.repeat_interleave(placement.parts) for of in torch.nonzero(sent_TK, as_tuple=True))
    expert_N = expert_TK[token_N, slot_N]
    rank_N = home_E[expert_N] * placement.parts + torch.arange(len(token_N), device=token_N.device) % placement.parts
    crossing_N = rank_N * len(expert_TK) + token_N
    order_N = torch.argsort(crossing_N * len(home_E) + expert_N, stable=True)
    token_N, slot_N, expert_N, rank_N, crossing_N = (part[order_N] for part in (token_N, slot_N, expert_N, rank_N, crossing_N))
    starts_N = torch.ones_like(crossing_N, dtype=torch.bool)
    starts_N[1:] = crossing_N[1:] != crossing_N[:-1]
    counts = torch.stack([torch.bincount(of, minlength=placement.ranks) for of in (rank_N[starts_N], rank_N)])
    return Outgoing(token_N[starts_N], token_N, slot_N, (2 * place_E[expert_N] + starts_N).to(CODE), *counts.tolist())


class Pass(NamedTuple):
    """What all ranks must have alike when a pass through a layer begins. dtype: its place in DTYPES, for only integers travel."""

    layer: int
    call: int
    training: bool
    grad_enabled: bool
    x_requires_grad: bool
    router_requires_grad: bool
    experts_require_grad: bool
    replayed: bool
    dtype: int
    width: int
    fingerprint: int


WORDS = {
    "layer": "which layer runs", "call": "how often it has run", "training": "training mode", "grad_enabled": "whether gradients are on",
    "x_requires_grad": "whether x needs a gradient", "router_requires_grad": "whether the router needs a gradient",
    "experts_require_grad": "whether the experts need a gradient", "replayed": "whether a routing is replayed",
    "dtype": "the dtype of x", "width": "the width of x",
    "fingerprint": "the values of the parameters that every rank holds (fingerprint of their bits)",
}  # fmt: skip


def agree_on_pass(mine: Pass, transport: Transport) -> None:
    """Raise the same DisagreementError on all ranks where they are about to do different things: another layer, mode, dtype or parameter.

    Before anything else of a pass, for ranks in different modes would wait for each other in different collectives.
    """
    table = transport.gather([*map(int, mine)], f"beginning a pass through layer {mine.layer}")
    for place, (field, words) in enumerate(WORDS.items()):
        values = [row[place] for row in table]
        require_agreement(words, [str(DTYPES[value]) for value in values] if field == "dtype" else values, transport.members)


def agree_on_counts(going: Outgoing, local_experts: Sequence[int], top_k: int, transport: Transport, layer: int) -> Incoming:
    """Tell every rank what will be sent, check what all of them told, and return what will come.

    Everyone checks the same numbers, so that all ranks raise the same DisagreementError where counts do not add up or no routing can have
    them: a size that only the receiver of an all-to-all got wrong would end it without a word.
    """
    header = [len(going.token_Q), len(going.token_N), *going.crossings, *going.assignments]
    counts = transport.gather(header, f"agreeing on counts in layer {layer}")
    for rank, row in zip(transport.members, counts, strict=True):
        _check_counts(rank, row, local_experts, top_k, transport.members)
    mine = transport.rank
    return Incoming([row[2 + mine] for row in counts], [row[2 + transport.ranks + mine] for row in counts])


def _check_counts(rank: int, row: list[int], local_experts: Sequence[int], top_k: int, members: Sequence[int]) -> None:
    ranks = len(local_experts)
    sums, crossings, assignments = row[:2], row[2 : 2 + ranks], row[2 + ranks :]
    for what, total, parts in (("tokens", sums[0], crossings), ("assignments", sums[1], assignments)):
        if sum(parts) != total:
            raise DisagreementError(f"ranks disagree on counts: rank {rank} holds {total} {what} to send, but announces {parts}")
    for other, tokens, copies, local in zip(members, crossings, assignments, local_experts, strict=True):
        least = max(tokens, 0)
        most = least * min(local, top_k)
        if tokens < 0 or not least <= copies <= most:
            raise DisagreementError(
                f"ranks disagree on counts: rank {rank} announces {copies} assignments of {tokens} tokens to rank {other}, which "
                f"has {local} experts; between {least} and {most} are possible with top_k = {top_k}"
            )


def arrange(code_N: Tensor, gate_N: Tensor, crossings: int, local_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Received codes and gates as a routing of the received tokens: (expert, gate, keep), [Q, most experts of a token] each.

    Raises ValueError where the codes do not describe `crossings` tokens of `local_experts` experts.
    """
    place_N, starts_N = code_N.long() >> 1, (code_N & 1).bool()
    row_N = starts_N.cumsum(0) - 1
    first_Q = starts_N.nonzero().flatten()
    valid = len(first_Q) == crossings and bool(((row_N >= 0) & (place_N >= 0) & (place_N < local_experts)).all())
    if not valid:
        raise DisagreementError(
            f"{crossings} tokens were announced, but what came describes {len(first_Q)}, or experts outside 0 … {local_experts - 1}"
        )
    slot_N = torch.arange(len(code_N), device=code_N.device) - first_Q[row_N]
    shape = (crossings, int(slot_N.max()) + 1 if len(slot_N) else 1)
    expert = torch.zeros(shape, dtype=torch.int64, device=code_N.device).index_put((row_N, slot_N), place_N)
    keep = torch.zeros(shape, dtype=torch.bool, device=code_N.device).index_put((row_N, slot_N), torch.ones_like(starts_N))
    return expert, gate_N.new_zeros(shape).index_put((row_N, slot_N), gate_N), keep
