"""What a pass knows beside the vectors: which group a token is in, whether it is padding, and the random numbers drawn."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .config import require


class TokenInfo(NamedTuple):
    """Facts about the T tokens of a pass.

    group_T      number of the token's group, 0 … groups − 1, in the order of the ids given (capacity and sequence losses act inside one)
    groups       how many groups there are
    real_T       False where the token is padding: it takes no capacity, counts in no load or loss, and its output is 0
    token_ids_T  the vocabulary ids, or None where they were not given
    previous_TE  the tokens' logits in the MoE layer before, or None where they were not given
    """

    group_T: np.ndarray
    groups: int
    real_T: np.ndarray
    token_ids_T: np.ndarray | None
    previous_TE: np.ndarray | None = None

    def real_per_group(self) -> np.ndarray:
        """Number of real tokens in each group, [B] int64."""
        return np.bincount(self.group_T[self.real_T], minlength=self.groups)


def token_info(
    tokens: int,
    token_ids: np.ndarray | None = None,
    group_ids: np.ndarray | None = None,
    pad_mask: np.ndarray | None = None,
    previous_logits: np.ndarray | None = None,
) -> TokenInfo:
    """TokenInfo of `tokens` tokens; without group_ids they are one group, without pad_mask all are real.

    Shapes: token_ids [T] int, group_ids [T] int, pad_mask [T] bool (True: padding); previous_logits [T, E], kept as it is.
    Raises: ValueError where a shape or dtype of the first three differs.
    """
    for name, array, kind in (("token_ids", token_ids, "iu"), ("group_ids", group_ids, "iu"), ("pad_mask", pad_mask, "b")):
        if array is not None:
            array = np.asarray(array)
            require(array.shape == (tokens,), f"{name} has shape {array.shape}; x has {tokens} tokens, so it must be ({tokens},)")
            wanted = "bool" if kind == "b" else "integer"
            require(array.dtype.kind in kind, f"{name} has dtype {array.dtype}; it must be {wanted}")
    if group_ids is None:
        group_T, groups = np.zeros(tokens, np.int64), min(tokens, 1)
    else:
        present, group_T = np.unique(group_ids, return_inverse=True)
        groups = len(present)
    real_T = np.ones(tokens, bool) if pad_mask is None else ~np.asarray(pad_mask)
    return TokenInfo(group_T, groups, real_T, None if token_ids is None else np.asarray(token_ids), previous_logits)


class Draws:
    """The random numbers of one pass, by name.

    Each is drawn once from `rng` and recorded in `taken`, or taken from the recorded draws of an earlier pass when that is replayed:
    so tracks with different generators can be compared under noise.
    """

    def __init__(self, rng: np.random.Generator | None, replayed: dict[str, np.ndarray] | None = None) -> None:
        self.rng = rng
        self.replayed = replayed
        self.taken: dict[str, np.ndarray] = {}

    def uniform(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Numbers from U(0, 1), fp64. Raises ValueError without an rng, or when the replayed pass drew another shape."""
        if self.replayed is None:
            require(self.rng is not None, f"this configuration draws random numbers ({name}) in training: pass rng=")
            self.taken[name] = self.rng.random(shape)
        else:
            require(name in self.replayed, f"replay holds no draws named {name!r}: it was recorded without this noise")
            found = np.asarray(self.replayed[name])
            require(found.shape == shape, f"replay holds draws {name!r} of shape {found.shape}; this pass needs {shape}")
            self.taken[name] = found
        return self.taken[name]
