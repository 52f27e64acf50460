"""Notebook 09: a grouped product in Triton, launched by the notebook on one tile of one expert's rows after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import Case, Exercise, Mistake

ROWS, COLUMNS, DEPTH = 16, 16, 16
"""The block sizes that the notebook launches with; the mistakes below are what kernels of these blocks compute."""


PAST_THE_END = (
    "A tile writes past the end of its expert, over the next expert's rows. Mask the store: a row is inside only below BOUNDS[expert + 1]."
)


def tile_table(bounds_P: np.ndarray) -> np.ndarray:
    """(expert, first row) of each tile of at most ROWS rows, [tiles, 2] int32, the last tile first: a GPU promises no order either."""
    spans = [(e, row) for e in range(len(bounds_P) - 1) for row in range(bounds_P[e], bounds_P[e + 1], ROWS)]
    return np.array(spans[::-1], np.int32).reshape(-1, 2)


def launched(kernel: Any) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """(rows [N, D], weight [E, D, F], bounds [E + 1]) → out [N, F], by one launch of a learner's kernel.

    OUT starts as NaN, and there is room behind every array, so that a store or a load that goes too far is seen and not suffered.
    """
    import torch
    import triton

    def behind(array: np.ndarray, more: int) -> torch.Tensor:
        return torch.cat([torch.from_numpy(array).flatten(), torch.zeros(more, dtype=torch.float32)])

    def product(rows_ND: np.ndarray, weight_EDF: np.ndarray, bounds_P: np.ndarray) -> np.ndarray:
        (rows, depth), width = rows_ND.shape, weight_EDF.shape[2]
        tiles = tile_table(bounds_P)
        out = torch.full((rows + ROWS, width), float("nan"))
        bounds = torch.from_numpy(bounds_P.astype(np.int32))
        kernel[len(tiles), triton.cdiv(width, COLUMNS)](
            behind(rows_ND, ROWS * depth), behind(weight_EDF, DEPTH * width), out, bounds, torch.from_numpy(tiles), depth, width,
            BLOCK_ROWS=ROWS, BLOCK_COLUMNS=COLUMNS, BLOCK_DEPTH=DEPTH,
        )  # fmt: skip
        return out[:rows].numpy()

    return product


def _product(rows_ND: np.ndarray, weight_EDF: np.ndarray, bounds_P: np.ndarray) -> np.ndarray:
    return np.concatenate([rows_ND[bounds_P[e] : bounds_P[e + 1]] @ weight_EDF[e] for e in range(len(weight_EDF))])


def _truth(rows_ND: np.ndarray, weight_EDF: np.ndarray, bounds_P: np.ndarray) -> np.ndarray:
    return _product(rows_ND.astype(np.float64), weight_EDF.astype(np.float64), bounds_P)


def _first_matrix(rows_ND: np.ndarray, weight_EDF: np.ndarray, bounds_P: np.ndarray) -> np.ndarray:
    return rows_ND @ weight_EDF[0]


def _depth_unmasked(rows_ND: np.ndarray, weight_EDF: np.ndarray, bounds_P: np.ndarray) -> np.ndarray:
    """What stands behind a row is the next one, and behind a matrix the next one; behind all of them is what `launched` puts there."""
    experts, depth, width = weight_EDF.shape
    steps = -(-depth // DEPTH) * DEPTH
    rows_flat = np.concatenate([rows_ND.ravel(), np.zeros(ROWS * depth, rows_ND.dtype)])
    weight_flat = np.concatenate([weight_EDF.ravel(), np.zeros(DEPTH * width, rows_ND.dtype)])
    longer_ND = rows_flat[np.arange(len(rows_ND))[:, None] * depth + np.arange(steps)]
    longer_EDF = np.stack([weight_flat[e * depth * width :][: steps * width].reshape(steps, width) for e in range(experts)])
    return _product(longer_ND, longer_EDF, bounds_P)


def _rows_unmasked(rows_ND: np.ndarray, weight_EDF: np.ndarray, bounds_P: np.ndarray) -> np.ndarray:
    out_NF = np.zeros((len(rows_ND), weight_EDF.shape[2]), rows_ND.dtype)
    for expert, first in tile_table(bounds_P):
        out_NF[first : first + ROWS] = rows_ND[first : first + ROWS] @ weight_EDF[expert]
    return out_NF


def _store_unmasked(rows_ND: np.ndarray, weight_EDF: np.ndarray, bounds_P: np.ndarray) -> np.ndarray:
    out_NF = _product(rows_ND, weight_EDF, bounds_P)
    for end in bounds_P[1:-1][np.diff(bounds_P)[:-1] > 0]:
        begin = bounds_P[bounds_P < end].max()
        out_NF[end : end + -(end - begin) % ROWS] = 0
    return out_NF


def _columns_unmasked(rows_ND: np.ndarray, weight_EDF: np.ndarray, bounds_P: np.ndarray) -> np.ndarray:
    """What runs past the last row of an expert meets the next one's first row, which an earlier program has stored."""
    out_NF = _product(rows_ND, weight_EDF, bounds_P)
    out_NF[bounds_P[1:-1][bounds_P[1:-1] < len(out_NF)], : -out_NF.shape[1] % COLUMNS] = 0
    return out_NF


def _last_step_only(rows_ND: np.ndarray, weight_EDF: np.ndarray, bounds_P: np.ndarray) -> np.ndarray:
    last = (rows_ND.shape[1] - 1) // DEPTH * DEPTH
    return _product(rows_ND[:, last:], weight_EDF[:, last:], bounds_P)


def _first_step_only(rows_ND: np.ndarray, weight_EDF: np.ndarray, bounds_P: np.ndarray) -> np.ndarray:
    return _product(rows_ND[:, :DEPTH], weight_EDF[:, :DEPTH], bounds_P)


def _cases() -> tuple[Case, ...]:
    rng = np.random.default_rng(9)

    def case(why: str, depth: int, width: int, counts: list[int]) -> Case:
        rows_ND = rng.standard_normal((sum(counts), depth)).astype(np.float32)
        weight_EDF = rng.standard_normal((len(counts), depth, width)).astype(np.float32)
        return Case(why, (rows_ND, weight_EDF, np.cumsum([0, *counts])))

    return (
        case("one full tile of one expert", 16, 16, [16]),
        case("a depth of three steps", 48, 16, [16, 16]),
        case("experts of 5, 0, 19 and 3 rows, none of them a whole number of tiles", 32, 16, [5, 0, 19, 3]),
        case("a depth and a width that no block divides", 21, 10, [7, 12]),
    )


EXERCISE = Exercise(
    {"out": ("row", "column")}, _truth, _cases(),
    (
        Mistake(_rows_unmasked, PAST_THE_END),
        Mistake(_store_unmasked, PAST_THE_END),
        Mistake(_columns_unmasked, "A tile writes past the last column, into the next row of OUT. Mask the store by the columns as well."),
        Mistake(_last_step_only, "Only the last step along the depth is left. Hand the accumulator to tl.dot, or add to it."),
        Mistake(_first_step_only, "Only the first step along the depth was taken: the pointers, or the depth that they are made of, must "
                "move on by DEPTH in every step."),
        Mistake(_first_matrix, "Every tile takes the matrix of expert 0: move by expert · D · F to its own."),
        Mistake(_depth_unmasked, "The last step reads past the end of the rows and of the matrix, where the next ones begin. Mask both "
                "loads by depth < D, with other=0."),
    ),
    chapter="docs/chapters/ladder.md#4-a-grouped-product",
    eager=_product,
)  # fmt: skip
