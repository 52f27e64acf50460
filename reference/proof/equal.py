"""What "equal" means between two tracks; `teeth` proves that the meaning bites.

A tensor of a fast track (candidate) is measured against the reference in float64 (truth) by the yardstick of plain PyTorch in
the target dtype (eager); all three start from the same values, already rounded to that dtype. With scale = RMS(truth), over a tensor
and for each of its elements:

    RMS(candidate − truth)
      ≤ 2 · RMS(eager − truth) + eps/4 · scale

    |candidate − truth|
      ≤ 2 · max|eager − truth|
        + 4 · eps · max(scale, |truth|)

The first bound sees a wrong scale, the second a single wrong row; neither alone is enough. An element far above the scale (gradients of
an expert with a handful of tokens have them) may be wrong by a few of its own roundings: at 16 times the scale, 4 · eps · scale is
less than the distance to its neighbour in the dtype. A scalar has the second bound alone. A fixed absolute tolerance is none: it
accepts zeros wherever outputs are small. Everything here takes NumPy arrays and the name of a dtype; other tracks convert first.

A dict of outputs has a key per tensor: "y", "dx", … and for the gradient of a parameter the parameter's own name, so that the
stacked weights ("experts.…") are recognised and judged expert by expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..config import require

Outputs = Mapping[str, NDArray]
"""Tensors by name."""

MANTISSA_BITS = {"float64": 52, "float32": 23, "tf32": 10, "bfloat16": 7, "float16": 10}
"""The dtypes in which a tensor can be judged."""
STACKED_PREFIX = "experts."


@dataclass(frozen=True)
class Tolerance:
    """The two bounds for one dtype. Raises ValueError for a dtype without an entry in MANTISSA_BITS."""

    dtype: str

    def __post_init__(self) -> None:
        require(self.dtype in MANTISSA_BITS, f"dtype is {self.dtype!r}; known: {', '.join(MANTISSA_BITS)}")

    @property
    def eps(self) -> float:
        """Distance from 1 to the next number: 2^(−mantissa bits), what `finfo(dtype).eps` is."""
        return 2.0 ** -MANTISSA_BITS[self.dtype]

    def rms_bound(self, eager_rms: float, scale: float) -> float:
        """2 · eager's RMS error + eps/4 · scale; one rounding of a random number has an RMS error of about eps/4."""
        return 2 * eager_rms + self.eps / 4 * scale

    def max_bound(self, eager_max: float, scale: float, magnitude: ArrayLike = 0.0) -> NDArray[np.float64]:
        """2 · eager's largest error + 4 · eps · max(scale, magnitude), for elements of these magnitudes |truth|."""
        return 2 * eager_max + 4 * self.eps * np.maximum(scale, magnitude)

    @property
    def scale_mutation(self) -> float:
        """The wrong factor that the RMS bound must see: in bfloat16 2 % lies too close to eager's own error."""
        return 1.04 if self.dtype == "bfloat16" else 1.02


@dataclass(frozen=True)
class Verdict:
    """One judged slice: a whole tensor, or one expert of a stacked weight (`where` is then "tensor[expert 3]").

    rms_error and max_error are relative to the scale (0 where both are 0); `failures` names what is broken, with index, error, bound.
    """

    where: str
    rms_error: float
    max_error: float
    scale: float
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What `compare` found out about one tensor: its verdicts, and the worst of them for a table."""

    name: str
    dtype: str
    verdicts: tuple[Verdict, ...]

    @property
    def failures(self) -> tuple[str, ...]:
        """Every broken bound, in words."""
        return tuple(failure for verdict in self.verdicts for failure in verdict.failures)

    @property
    def passed(self) -> bool:
        """Whether no bound is broken."""
        return not self.failures

    @property
    def rms_error(self) -> float:
        """Largest RMS error of a slice, relative to its scale."""
        return max((verdict.rms_error for verdict in self.verdicts), default=0.0)

    @property
    def max_error(self) -> float:
        """Largest error of an element, relative to its slice's scale."""
        return max((verdict.max_error for verdict in self.verdicts), default=0.0)


def rms(array: ArrayLike) -> float:
    """√(mean of squares); 0 for an empty array."""
    values = np.asarray(array, dtype=np.float64)
    largest = float(np.max(np.abs(values), initial=0.0))
    if largest == 0.0 or not np.isfinite(largest):
        return largest
    return largest * float(np.sqrt(np.mean(np.square(values / largest))))


def round_to(array: ArrayLike, dtype: str) -> NDArray[np.float64]:
    """The array's values rounded to `dtype` (nearest, ties to even), as float64; by way of float32, as PyTorch does it.

    This is how inputs are drawn in the target dtype, and how eager tf32 rounds the operands of a product.
    """
    Tolerance(dtype)
    values = np.asarray(array, dtype=np.float64)
    if dtype in ("float64", "float32", "float16"):
        return values.astype(dtype).astype(np.float64)
    dropped = MANTISSA_BITS["float32"] - MANTISSA_BITS[dtype]
    bits = values.astype(np.float32).view(np.uint32)
    nearest_even = np.uint32((1 << (dropped - 1)) - 1) + ((bits >> np.uint32(dropped)) & np.uint32(1))
    rounded = ((bits + nearest_even) >> np.uint32(dropped)) << np.uint32(dropped)
    return np.where(np.isfinite(values), rounded.view(np.float32), values).astype(np.float64)


def compare(
    name: str,
    candidate: ArrayLike,
    truth: ArrayLike,
    eager: ArrayLike | None,
    dtype: str,
    *,
    stacked: bool = False,
    scale: ArrayLike | None = None,
) -> Report:
    """Judge one tensor; a broken bound, a wrong shape or a NaN is a failure in the report, never an exception.

    candidate, truth, eager   arrays of one shape; integers and booleans are compared exactly, and `eager` is then not read
    dtype                     a key of MANTISSA_BITS: the precision in which candidate and eager were computed
    stacked                   the leading axis counts experts, each judged by its own scale
    scale                     where the truth vanishes by cancellation: the same tensor without the cancellation (for gradients under
                              K = 1 with renormalised gates, that of plain gates). Its RMS is the scale and its zeros are the exact
                              ones; a number gives the scale alone, and then no zero has to be exact
    Raises ValueError for an unknown dtype.
    """
    tolerance = Tolerance(dtype)
    truth, candidate = np.asarray(truth), np.asarray(candidate)
    if candidate.shape != truth.shape:
        return _refused(name, dtype, f"shape {candidate.shape} instead of {truth.shape}")
    if truth.dtype.kind in "biu":
        return _compare_exactly(name, candidate, truth, dtype)
    yardstick = np.asarray(np.nan if eager is None else eager)
    if yardstick.shape != truth.shape:
        return _refused(name, dtype, f"eager has shape {yardstick.shape} instead of {truth.shape}, so there is no yardstick")
    found, exact, plain = (np.asarray(array, dtype=np.float64) for array in (candidate, truth, yardstick))
    for what, array in (("candidate", found), ("truth", exact), ("eager", plain)):
        if not np.all(np.isfinite(array)):
            return _refused(name, dtype, f"{what} is {_first(array, ~np.isfinite(array))}")
    zeros = exact if scale is None else np.asarray(scale, dtype=np.float64)
    if zeros.ndim and zeros.shape != truth.shape:
        return _refused(name, dtype, f"the substitute for the scale has shape {zeros.shape} instead of {truth.shape}")
    if not stacked or truth.ndim == 0:
        return Report(name, dtype, (_judge(name, tolerance, found, exact, plain, zeros, rows_are_exact=True),))
    slices = (
        _judge(f"{name}[expert {e}]", tolerance, found[e], exact[e], plain[e], zeros[e] if zeros.ndim else zeros)
        for e in range(truth.shape[0])
    )
    return Report(name, dtype, tuple(slices))


def _judge(
    where: str, tolerance: Tolerance, candidate: NDArray, truth: NDArray, eager: NDArray, zeros: NDArray, *, rows_are_exact: bool = False
) -> Verdict:
    """Both bounds and the exact zeros of one slice; `zeros` has the slice's shape, or is the scale itself."""
    scale = rms(zeros)
    error, eager_error = np.abs(candidate - truth), np.abs(eager - truth)
    failures = _zero_failures(where, candidate, zeros, rows_are_exact) if zeros.shape == truth.shape else []
    rms_error, rms_bound = rms(error), tolerance.rms_bound(rms(eager_error), scale)
    bound = np.broadcast_to(tolerance.max_bound(float(np.max(eager_error, initial=0.0)), scale, np.abs(truth)), error.shape)
    many = error.size > 1  # one element has no mean: its correctly rounded value may lie eps/2 away, twice what the first bound allows
    broken = [("RMS", error, rms_error, rms_bound)] if many and rms_error > rms_bound else []
    if np.any(error > bound):
        excess = np.where(error > bound, error - bound, -1.0)
        worst = np.unravel_index(int(np.argmax(excess)), error.shape)
        broken.append(("max", excess, error[worst], bound[worst]))
    for measure, by, value, limit in broken:
        worst = np.unravel_index(int(np.argmax(by)), error.shape)
        failures.append(
            f"{where}: {measure} error {value:.3g} > {limit:.3g} ({tolerance.dtype}, scale {scale:.3g}); "
            f"{f'worst at {_index(worst)}: ' if worst else ''}{candidate[worst]:.6g} instead of {truth[worst]:.6g}"
        )
    return Verdict(where, _relative(rms_error, scale), _relative(float(np.max(error, initial=0.0)), scale), scale, tuple(failures))


def _zero_failures(where: str, candidate: NDArray, zeros: NDArray, rows_are_exact: bool) -> list[str]:
    """A slice that is exactly 0, and (outside stacked weights) each leading row that is, must be exactly 0 in the candidate."""
    if zeros.size == 0:
        return []
    if not np.any(zeros):
        wrong = candidate != 0
    elif rows_are_exact and zeros.ndim:
        row_is_zero = ~np.any(zeros.reshape(zeros.shape[0], -1), axis=1)
        wrong = (candidate != 0) & row_is_zero.reshape(-1, *[1] * (candidate.ndim - 1))
    else:
        return []
    return [f"{where} must be exactly 0 but is {_first(candidate, wrong)}"] if np.any(wrong) else []


def _compare_exactly(name: str, candidate: NDArray, truth: NDArray, dtype: str) -> Report:
    if candidate.dtype.kind not in "biu" or (candidate.dtype.kind == "b") != (truth.dtype.kind == "b"):
        return _refused(name, dtype, f"{candidate.dtype} instead of {truth.dtype}")
    wrong = candidate != truth
    if not np.any(wrong):
        return Report(name, dtype, (Verdict(name, 0.0, 0.0, 0.0, ()),))
    worst = tuple(np.argwhere(wrong)[0])
    return _refused(name, dtype, f"{_first(candidate, wrong)} instead of {truth[worst]} ({np.count_nonzero(wrong)} of {wrong.size} differ)")


def _refused(name: str, dtype: str, why: str) -> Report:
    return Report(name, dtype, (Verdict(name, np.inf, np.inf, 0.0, (f"{name}: {why}",)),))


def _first(array: NDArray, where: NDArray) -> str:
    index = tuple(np.argwhere(where)[0])
    return f"{array[index]} at {_index(index)}" if index else f"{array[index]}"


def _index(index: tuple) -> str:
    return str([int(i) for i in index])


def _relative(error: float, scale: float) -> float:
    return error / scale if scale else (np.inf if error else 0.0)


def compare_all(
    candidate: Outputs, truth: Outputs, eager: Outputs, dtype: str, *, scales: Mapping[str, ArrayLike] | None = None
) -> list[Report]:
    """`compare` for every tensor of a dict, in the order of `truth`; a tensor that is missing or unknown is a failure.

    scales: substitute scales by name, for the tensors that vanish by cancellation. Raises ValueError for an unknown dtype.
    """
    scales = scales or {}
    reports = []
    for name, expected in truth.items():
        if name not in candidate:
            reports.append(_refused(name, dtype, "missing"))
            continue
        stacked = name.startswith(STACKED_PREFIX)
        reports.append(compare(name, candidate[name], expected, eager.get(name), dtype, stacked=stacked, scale=scales.get(name)))
    unknown = [name for name in (*candidate, *scales) if name not in truth]
    return reports + [_refused(name, dtype, "the truth has no such tensor") for name in unknown]


def assert_equal(
    candidate: Outputs, truth: Outputs, eager: Outputs, dtype: str, *, scales: Mapping[str, ArrayLike] | None = None
) -> list[Report]:
    """The reports of `compare_all`. Raises AssertionError with every failure, and where there was nothing to compare."""
    reports = compare_all(candidate, truth, eager, dtype, scales=scales)
    failures = [failure for report in reports for failure in report.failures]
    if failures or not reports:
        raise AssertionError("\n".join(failures) or "nothing was compared")
    return reports
