"""The bug museum: mistakes of Mixture-of-Experts code, most of them shipped, each beside the check that catches it.

Seven rooms, one file each (`museum_losses`, `museum_gates`, …), hold the pieces; a piece is a `Bug`: where it was seen,
the wrong function, the right one (the reference's), and a check that accepts only the right one.
"""

from __future__ import annotations

from ..config import require
from . import museum_capacity, museum_experts, museum_gates, museum_layer, museum_losses, museum_routers, museum_soft
from .exhibit import Bug

ROOMS: dict[str, tuple[Bug, ...]] = {
    "losses": museum_losses.BUGS,
    "gates": museum_gates.BUGS,
    "capacity": museum_capacity.BUGS,
    "experts": museum_experts.BUGS,
    "layer": museum_layer.BUGS,
    "routers": museum_routers.BUGS,
    "soft": museum_soft.BUGS,
}
MUSEUM: dict[str, Bug] = {bug.name: bug for room in ROOMS.values() for bug in room}


def get(name: str) -> Bug:
    """The piece of this name. Raises ValueError with the known names."""
    require(name in MUSEUM, f"the museum has no bug {name!r}; known: {', '.join(MUSEUM)}")
    return MUSEUM[name]
