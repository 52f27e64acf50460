"""Teeth: the assertion that a fast track passes must reject what is wrong, on every case.

A tolerance that accepts zeros proves nothing, and published parity tests have had such. So each case is run again with outputs
that are wrong on purpose, and the very same assertion has to fail on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .equal import STACKED_PREFIX, Outputs, Tolerance, rms

NO_NETWORK = STACKED_PREFIX + "constant"  # what zero-computation experts learn
_FLOAT64_ROUNDING = 64 * 2.0**-52


def tensor_mutations(truth: Outputs, dtype: str) -> Iterator[tuple[str, dict[str, NDArray]]]:
    """Wrong outputs, as (mutation, outputs): in one floating-point tensor at a time 0, −y, 1.02·y (bfloat16: 1.04·y), two rows swapped."""
    factor = Tolerance(dtype).scale_mutation
    mutations: dict[str, Callable[[NDArray], NDArray]] = {
        "zero": np.zeros_like,
        "negated": np.negative,
        f"scaled by {factor}": lambda tensor: factor * tensor,
        "two rows swapped": _rows_swapped,
    }
    for name, tensor in truth.items():
        if np.asarray(tensor).dtype.kind == "f":
            for mutation, mutate in mutations.items():
                yield f"{mutation}: {name}", {**truth, name: mutate(np.asarray(tensor))}


def _rows_swapped(tensor: NDArray) -> NDArray:
    """The first row that is not 0 trades places with the row farthest from it (any other could be a near-duplicate)."""
    swapped = tensor.copy()
    rows = tensor.reshape(tensor.shape[0], -1) if tensor.ndim and tensor.size else np.zeros((0, 1))
    used = np.flatnonzero(np.any(rows, axis=1))
    if used.size:
        first = int(used[0])
        other = int(np.argmax(np.max(np.abs(rows - rows[first]), axis=1)))
        swapped[[first, other]] = tensor[[other, first]]
    return swapped


def layer_mutations(
    evaluate: Callable[[Mapping[str, NDArray], NDArray], Outputs],
    params: Mapping[str, NDArray],
    expert_TK: NDArray[np.integer],
    gate_TK: NDArray,
) -> Iterator[tuple[str, Outputs]]:
    """Wrong layers, as (mutation, outputs): the network with the largest sum of gates zeroed; the gates shifted by a slot.

    evaluate(params, gate_TK) gives the float64 outputs with these parameters and gates, everything else as it is.
    A dropped assignment should come with gate 0, so that the zeroed expert is one that is used.
    """
    if expert_TK.size:
        stacked = {name: tensor for name, tensor in params.items() if name.startswith(STACKED_PREFIX)}
        zeroed = {name: tensor.copy() for name, tensor in stacked.items() if not name.startswith(NO_NETWORK)}
        importance_E = np.bincount(expert_TK.ravel(), weights=np.abs(gate_TK).ravel())
        expert = int(np.argmax(importance_E[: min(map(len, zeroed.values()), default=None)]))
        for tensor in zeroed.values():
            tensor[expert] = 0
        yield f"expert zeroed: {expert}", evaluate({**params, **zeroed}, gate_TK)
    yield "gates shifted: by one slot", evaluate(params, np.roll(gate_TK, 1, axis=1))


def assert_teeth(
    assertion: Callable[[Outputs], object],
    truth: Outputs,
    mutants: Iterable[tuple[str, Outputs]],
    *,
    scales: Mapping[str, ArrayLike] | None = None,
    least: int = 3,
) -> list[str]:
    """The same assertion that a candidate passes must accept the truth and reject every mutant; the names of the rejected ones.

    A mutant that differs from the truth by no more than float64 rounding is skipped, because that is computed here. At least
    `least` kinds of mutation (the part of the name before the colon) must remain; only a case without tokens may ask for 0.
    Raises AssertionError naming the mutants that were accepted; any other error of `assertion` is passed on.
    """
    assertion(truth)
    rejected, accepted = [], []
    for name, outputs in mutants:
        if _is_unchanged(outputs, truth, scales or {}):
            continue
        try:
            assertion(outputs)
        except AssertionError:
            rejected.append(name)
        else:
            accepted.append(name)
    if accepted:
        raise AssertionError("the assertion has no teeth; it accepts: " + "; ".join(accepted))
    kinds = {name.partition(":")[0] for name in rejected}
    if len(kinds) < least:
        raise AssertionError(f"only {len(kinds)} kinds of mutation change the truth here ({', '.join(sorted(kinds))}); {least} are needed")
    return rejected


def _is_unchanged(outputs: Outputs, truth: Outputs, scales: Mapping[str, ArrayLike]) -> bool:
    """Whether each tensor is the truth's up to float64 rounding, stacked ones expert by expert."""
    for name, expected in truth.items():
        expected, changed = np.asarray(expected), np.asarray(outputs[name])
        parts = range(expected.shape[0]) if name.startswith(STACKED_PREFIX) else (...,)
        zeros = np.asarray(scales.get(name, expected))
        for part in parts:
            limit = _FLOAT64_ROUNDING * rms(zeros[part] if zeros.ndim else zeros)
            if np.any(np.abs(changed[part] - expected[part]) > limit):
                return False
    return True
