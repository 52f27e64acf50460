"""Museum, room seven: Soft MoE, whose softmax runs over tokens, and over nothing but the tokens of one sequence."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..soft import soft_mix
from ..tokens import token_info
from .exhibit import Bug, expect

Shares = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(logits [B, S, C] of one expert's slots, pads [B, S] bool) → each token's share in each slot of its sequence, [B, S, C]."""


def padding_is_in_no_slot(shares: Shares) -> None:
    """The shares of the padding in a slot are 0, and those of the real tokens sum to 1."""
    logits = np.random.default_rng(0).standard_normal((1, 5, 3))
    pads = np.array([[False, False, False, True, True]])
    found = shares(logits, pads)
    lost = float(found[pads].sum(0).mean())
    expect(lost == 0, f"two pads hold {100 * lost:.0f} % of a slot on average")
    expect(np.allclose(found.sum(1), 1), f"the shares in a slot sum to {found.sum(1).mean():.3f}")


def sequences_keep_to_themselves(shares: Shares) -> None:
    """A sequence's shares are the same whatever else is in the batch."""
    logits = np.random.default_rng(1).standard_normal((2, 4, 3))
    pads = np.zeros((2, 4), bool)
    alone, together = shares(logits[:1], pads[:1])[0], shares(logits, pads)[0]
    moved = float(np.abs(alone - together).max())
    expect(moved < 1e-12, f"a share moves by up to {moved:.2f} when a second sequence joins the batch")


def shares_of_sequences(logits: np.ndarray, pads: np.ndarray) -> np.ndarray:
    """The reference's dispatch weights, each sequence a group."""
    sequences, length, slots = logits.shape
    tokens = token_info(sequences * length, group_ids=np.repeat(np.arange(sequences), length), pad_mask=pads.ravel())
    return soft_mix(logits.reshape(-1, 1, slots), tokens).dispatch.reshape(logits.shape)


def _softmax(logits: np.ndarray, axis: int) -> np.ndarray:
    weight = np.exp(logits - logits.max(axis, keepdims=True))
    return weight / weight.sum(axis, keepdims=True)


def mask_made_after_the_padding(logits: np.ndarray, pads: np.ndarray) -> np.ndarray:
    """Pads the sequence first and makes the mask from what it then finds, so that every pad counts as a token."""
    mask = np.ones(logits.shape[:2], bool)
    return _softmax(np.where(mask[:, :, None], logits, -np.inf), 1)


def softmax_over_the_batch(logits: np.ndarray, pads: np.ndarray) -> np.ndarray:
    """Takes the softmax over the first axis of [B, S, …], which is the batch and not the tokens."""
    return _softmax(logits, 0)


BUGS = (
    Bug("padding in the slots", "lucidrains/soft-moe-pytorch#10",
        mask_made_after_the_padding, shares_of_sequences, padding_is_in_no_slot),
    Bug("softmax over the batch", "fkodom/soft-mixture-of-experts soft_mixture_of_experts/soft_moe.py at 17eb2e5",
        softmax_over_the_batch, shares_of_sequences, sequences_keep_to_themselves),
)  # fmt: skip
