"""Where experts live: the one table that the dispatcher reads, so that another placement needs no other dispatcher."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from reference.config import require


@dataclass(frozen=True)
class Placement:
    """Which ranks hold which experts. Those without a network have no home, for every rank has them.

    owner   the home of each expert that is a network;  homes: how many there are, with experts or without
    parts   ranks of a home, each of which holds 1/parts of the width of all its experts: rank r is part r % parts of home r // parts
    Raises ValueError for a home outside them.
    """

    owner: tuple[int, ...]
    homes: int
    parts: int = 1

    def __post_init__(self) -> None:
        require(self.homes >= 1, f"ranks is {self.homes}; there must be at least 1")
        require(self.parts >= 1, f"parts is {self.parts}; there must be at least 1")
        for expert, home in enumerate(self.owner):
            require(0 <= home < self.homes, f"expert {expert} is placed on rank {home}; there are {self.homes} ranks")

    @classmethod
    def contiguous(cls, experts: int, homes: int, parts: int = 1) -> Placement:
        """Blocks of ⌈E/homes⌉ experts in order of their ids, the last ones smaller or empty: the rows of a DTensor's Shard(0)."""
        require(experts >= 1, f"experts is {experts}; there must be at least 1")
        require(homes >= 1, f"ranks is {homes}; there must be at least 1")
        block = -(-experts // homes)
        return cls(tuple(expert // block for expert in range(experts)), homes, parts)

    @property
    def ranks(self) -> int:
        """How many ranks all homes have together."""
        return self.homes * self.parts

    def local(self, rank: int) -> tuple[int, ...]:
        """The experts of a rank, in order of their ids: place l in its stack is that of local(rank)[l]."""
        return tuple(expert for expert, home in enumerate(self.owner) if home == rank // self.parts)

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """(home, place in its ranks' stacks) of each expert, [E] int64 each, on the CPU."""
        place, filled = [], [0] * self.homes
        for home in self.owner:
            place.append(filled[home])
            filled[home] += 1
        return torch.tensor(self.owner), torch.tensor(place)
