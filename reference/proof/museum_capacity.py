"""Museum, room three: capacity, queues and drops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..capacity import choice_major, group_capacity, keep_within_capacity, per_assignment, per_token, position_in_expert
from ..config import CapacityConfig
from ..tokens import Draws, token_info
from .equal import round_to
from .exhibit import Bug, expect

Keep = Callable[..., np.ndarray]


def no_expert_exceeds_its_capacity(keep: Keep) -> None:
    """An expert keeps at most C assignments, first and second choices together."""
    expert_TK = np.argsort(np.random.default_rng(0).random((20, 4)), axis=1)[:, :2]
    fullest = int(np.bincount(expert_TK[keep(expert_TK, 5)]).max())
    expect(fullest <= 5, f"an expert of capacity 5 keeps {fullest} assignments")


def padding_takes_no_slot(keep: Keep) -> None:
    """Padding in front of a sequence leaves its tokens the slots they had."""
    expert_TK, longer = np.zeros((3, 1), np.int64), np.zeros((5, 1), np.int64)
    bare = keep(expert_TK, 2)[:, 0].tolist()
    padded = keep(longer, 2, pad_mask=np.arange(5) < 2)[2:, 0].tolist()
    expect(bare == padded, f"kept without padding: {bare}; behind two padding tokens: {padded}")


def groups_do_not_compete(keep: Keep) -> None:
    """Two equal groups keep the same assignments: a sequence does not lose slots to its neighbour in the batch."""
    keep_TK = keep(np.zeros((6, 1), np.int64), 2, group_ids=np.array([0, 0, 0, 1, 1, 1]))
    first, second = keep_TK[:3, 0].tolist(), keep_TK[3:, 0].tolist()
    expect(first == second, f"the first group keeps {first}, its copy {second}")


def rejected_second_choices_free_their_slot(keep: Keep) -> None:
    """A second choice that the draw rejects leaves its slot to the next token."""
    wanted_TK = np.array([[True, False], [True, True]])
    keep_TK = keep(np.array([[0, 2], [1, 2]]), 1, wanted_TK=wanted_TK)
    expect(keep_TK[1, 1], "the only slot of expert 2 stays empty: it was held by a second choice that had been rejected")


def positions_count_up(positions: Callable[[np.ndarray], np.ndarray]) -> None:
    """Four hundred tokens of one expert stand at the positions 0 … 399."""
    position_TK = positions(np.zeros((400, 1), np.int64))
    distinct = len(np.unique(position_TK))
    expect(np.array_equal(position_TK[:, 0], np.arange(400)), f"400 tokens of one expert stand at {distinct} distinct positions")


def capacity_without_k(factor: float, top_k: int, tokens: int, experts: int) -> int:
    """Divides the tokens among the experts and forgets that each token asks for K of them."""
    return per_token(factor, top_k, tokens, experts)


def even_load_fits_at_factor_one(capacity: Callable[[float, int, int, int], int]) -> None:
    """With capacity factor 1 an exactly even load loses nothing, whatever K is."""
    slots = 8 * capacity(1.0, 2, 64, 8)
    expect(slots >= 2 * 64, f"64 tokens with K = 2 find {slots} slots for {2 * 64} assignments at factor 1")


def zero_is_a_factor(capacity: Callable[[CapacityConfig], int]) -> None:
    """An evaluation factor of 0 leaves no slot; it does not mean "not given"."""
    slots = capacity(CapacityConfig("per_assignment", factor=1.25, eval_factor=0.0))
    expect(slots == 0, f"evaluation factor 0 leaves {slots} slots")


def keep_choice_major(
    expert_TK: np.ndarray,
    capacity: int,
    *,
    pad_mask: np.ndarray | None = None,
    group_ids: np.ndarray | None = None,
    wanted_TK: np.ndarray | None = None,
) -> np.ndarray:
    """The reference's kept assignments, all first choices before all second ones."""
    tokens = token_info(len(expert_TK), group_ids=group_ids, pad_mask=pad_mask)
    real_TK = np.repeat(tokens.real_T[:, None], expert_TK.shape[1], axis=1)
    wanted_TK = real_TK if wanted_TK is None else real_TK & wanted_TK
    order_N = choice_major(np.ones(expert_TK.shape), Draws(None))
    return keep_within_capacity(expert_TK, wanted_TK, np.full(tokens.groups, capacity), order_N, tokens)


def second_choices_from_zero(expert_TK: np.ndarray, capacity: int) -> np.ndarray:
    """Numbers the second choices from 0 instead of from the count of first choices, so two tokens share a slot."""
    return np.concatenate([keep_choice_major(column[:, None], capacity) for column in expert_TK.T], axis=1)


def padding_eats_capacity(expert_TK: np.ndarray, capacity: int, *, pad_mask: np.ndarray | None = None) -> np.ndarray:
    """Queues padding like any token and masks it afterwards."""
    keep_TK = keep_choice_major(expert_TK, capacity)
    return keep_TK if pad_mask is None else keep_TK & ~pad_mask[:, None]


def capacity_of_the_batch(expert_TK: np.ndarray, capacity: int, *, group_ids: np.ndarray) -> np.ndarray:
    """Queues the whole batch at each expert, though its capacity is that of one group."""
    return keep_choice_major(expert_TK, capacity)


def rejected_choices_hold_slots(expert_TK: np.ndarray, capacity: int, *, wanted_TK: np.ndarray) -> np.ndarray:
    """Advances the queue for rejected second choices too, as the algorithm in GShard's paper is written."""
    return keep_choice_major(expert_TK, capacity) & wanted_TK


def cumsum_over_the_slot_axis(expert_TK: np.ndarray, capacity: int) -> np.ndarray:
    """Sums the one-hot mask along the axis of length one that `keepdim` left, so every position is the first and nothing is dropped."""
    mask_TKE = np.eye(expert_TK.max() + 1, dtype=np.int64)[expert_TK[:, :1]]
    return np.repeat((np.cumsum(mask_TKE, axis=1) * mask_TKE).max(2) <= capacity, expert_TK.shape[1], axis=1)


def reference_positions(expert_TK: np.ndarray) -> np.ndarray:
    """The reference's positions, in integers."""
    return position_in_expert(expert_TK, np.ones(expert_TK.shape, bool), np.zeros(len(expert_TK), np.int64), np.arange(expert_TK.size))


def bfloat16_positions(expert_TK: np.ndarray) -> np.ndarray:
    """Counts positions by a cumulative sum in bfloat16, which cannot count past 256."""
    position = np.zeros(len(expert_TK) + 1)
    for token in range(len(expert_TK)):
        position[token + 1] = round_to(position[token] + 1, "bfloat16")
    return position[:-1, None]


def evaluation_capacity(config: CapacityConfig) -> int:
    """The reference's capacity in evaluation, for 32 tokens, K = 2 and 8 experts."""
    return int(group_capacity(config, 2, 8, token_info(32), training=False)[0])


def zero_is_not_given(config: CapacityConfig) -> int:
    """Falls back with `or`, which takes the factor 0 for a missing one."""
    return per_assignment(config.eval_factor or config.factor, 2, 32, 8)


BUGS = (
    Bug("second choices from zero", "near: GShard (Lepikhin et al. 2020), algorithm 1",
        second_choices_from_zero, keep_choice_major, no_expert_exceeds_its_capacity),
    Bug("cumulative sum over the wrong axis", "huggingface/transformers#48293, #48421",
        cumsum_over_the_slot_axis, keep_choice_major, no_expert_exceeds_its_capacity),
    Bug("padding eats capacity", "NVIDIA/Megatron-LM#5542", padding_eats_capacity, keep_choice_major, padding_takes_no_slot),
    Bug("capacity of the batch", "near: GShard (Lepikhin et al. 2020), §2.2",
        capacity_of_the_batch, keep_choice_major, groups_do_not_compete),
    Bug("rejected choices hold slots", "GShard (Lepikhin et al. 2020), algorithm 1; lingvo and mesh-tensorflow free them",
        rejected_choices_hold_slots, keep_choice_major, rejected_second_choices_free_their_slot),
    Bug("positions in bfloat16", "near: GShard's einsum with a one-hot cumulative sum",
        bfloat16_positions, reference_positions, positions_count_up),
    Bug("capacity without K", "lucidrains/st-moe-pytorch; google/flaxformer (a factor of 1 means half of GShard's)",
        capacity_without_k, per_assignment, even_load_fits_at_factor_one),
    Bug("factor 0 swallowed by or", "microsoft/Tutel#303", zero_is_not_given, evaluation_capacity, zero_is_a_factor),
)  # fmt: skip
