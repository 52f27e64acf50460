"""`python tests/decisions.py PATH`: everything integer that the kernels decide, in an .npz, to be compared between two engines."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import test_kernels_routing as routing_tests
import test_kernels_schedule as schedule_tests

from optimized.kernels import launch
from reference.proof.cases import CASES

HEIGHTS = (16, 32)


def tables(tensors: dict[int, torch.Tensor]) -> dict[str, NDArray]:
    """The entries of each table of tiles that are defined."""
    return {f"tiles{rows}": table[: 1 + int(table[0, 1])].numpy() for rows, table in tensors.items()}


def decisions() -> dict[str, NDArray]:
    """Choices and loads of every router, permutations, bounds and tiles of every case, and the backward's restored ones."""
    found: dict[str, NDArray] = {}
    for name in routing_tests.ROUTERS:
        logits_TE, bias, real_T, function, gating = routing_tests.drawn(name)
        given = (None if array is None else torch.from_numpy(array) for array in (logits_TE, bias, real_T))
        _, expert, _, load = launch.route(*given, function, gating)  # type: ignore[arg-type]
        found |= {f"{name}/expert": expert.numpy(), f"{name}/load": load.numpy()}
    for case in CASES:
        schedule = launch.sort_by_expert(*schedule_tests.given(case), case.E, *HEIGHTS)
        again = launch.restore_schedule(schedule.order, schedule.bounds, *HEIGHTS)
        values = {"order": schedule.order, "place": schedule.place, "bounds": schedule.bounds, "restored": again.place}
        values_of = {key: tensor.numpy() for key, tensor in values.items()} | tables(schedule.tiles)
        found |= {f"{case.name}/{key}": array for key, array in (values_of | {f"{k}'": v for k, v in tables(again.tiles).items()}).items()}
    return found


if __name__ == "__main__":
    np.savez(sys.argv[1], **decisions())
