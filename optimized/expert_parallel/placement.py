"""Where experts live: the one table that the dispatcher reads, so that another placement needs no other dispatcher."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from reference.config import require


@dataclass(frozen=True)
class Placement:
    """owner: the rank of each expert;  ranks: how many there are, with experts or without. Raises ValueError for a rank outside them."""

    owner: tuple[int, ...]
    ranks: int

    def __post_init__(self) -> None:
        require(self.ranks >= 1, f"ranks is {self.ranks}; there must be at least 1")
        for expert, rank in enumerate(self.owner):
            require(0 <= rank < self.ranks, f"expert {expert} is placed on rank {rank}; there are {self.ranks} ranks")

    @classmethod
    def contiguous(cls, experts: int, ranks: int) -> Placement:
        """Blocks of ⌈E/R⌉ experts in order of their ids, the last ones smaller or empty: the rows of a DTensor's Shard(0)."""
        require(experts >= 1, f"experts is {experts}; there must be at least 1")
        require(ranks >= 1, f"ranks is {ranks}; there must be at least 1")
        block = -(-experts // ranks)
        return cls(tuple(expert // block for expert in range(experts)), ranks)

    def local(self, rank: int) -> tuple[int, ...]:
        """The experts of a rank, in order of their ids: place l in its stack is that of local(rank)[l]."""
        return tuple(expert for expert, owner in enumerate(self.owner) if owner == rank)

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """(rank, place in that rank's stack) of each expert, [E] int64 each, on the CPU."""
        place, filled = [], [0] * self.ranks
        for rank in self.owner:
            place.append(filled[rank])
            filled[rank] += 1
        return torch.tensor(self.owner), torch.tensor(place)
