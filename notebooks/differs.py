"""How a wrong answer differs from the right one, in words: where, by how much, and whether one relation explains all of it.

Nothing here knows an exercise. A relation (a constant factor, a turned sign, rows for columns, a shift, another order, …) is named only if
it holds on every input on which the two differ, and only where there are enough places for it to be no accident.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from reference.proof.equal import rms

ENOUGH = 3
"""At how many places a factor or a distance must be the same to be worth a word."""

WIDEST = 105
"""How many characters of output an editor shows on a line."""

SHOWN = 3
"""How many rows, places or factors are listed."""

Axes = tuple[str, ...]


class Pair(NamedTuple):
    """One output on one input: what was returned, what is right, and where they differ (all of one shape); given: the arguments by name."""

    found: np.ndarray
    truth: np.ndarray
    wrong: np.ndarray
    given: Mapping[str, Any] = {}


Pairs = Sequence[Pair]


def where(axes: Axes, wrong: np.ndarray) -> str:
    """How many places differ, and which tokens, experts, … they belong to."""
    if not wrong.ndim:
        return "differs"
    others = [tuple(other for other in range(wrong.ndim) if other != axis) for axis in range(wrong.ndim)]
    named = [_along(name, wrong.any(other)) for name, other in zip(axes, others, strict=True)]
    return f"{np.count_nonzero(wrong)} of {wrong.size} differ ({'; '.join(named)})"


def _along(name: str, wrong_X: np.ndarray) -> str:
    """Along one axis, at which of its places something is wrong."""
    at = np.flatnonzero(wrong_X).tolist()
    if len(at) == len(wrong_X):
        return f"every {name}"
    if len(at) <= SHOWN:
        return f"{name}{'s' if len(at) > 1 else ''} {_listed(at)}"
    return f"{len(at)} of {len(wrong_X)} {name}s: {_listed(at)}"


def places(axes: Axes, pair: Pair) -> list[str]:
    """The first rows (of a matrix) or numbers (of a vector) that differ, yours beside the reference's."""
    wrong, digits = pair.wrong, _digits(pair)
    found, truth = (array if array.dtype.kind != "f" else np.round(array, digits) + 0.0 for array in pair[:2])  # + 0.0: no −0
    with np.printoptions(precision=digits, suppress=True, linewidth=200, threshold=12, edgeitems=4):
        if not truth.ndim:
            return [f"  yours {found:.7g}   reference {truth:.7g}"]
        at = np.flatnonzero(wrong.reshape(len(truth), -1).any(1))
        lines = [_beside(f"  {axes[0]} {place}: ", str(found[place]), str(truth[place])) for place in at[:SHOWN]]
    return lines + ([f"  … and {len(at) - SHOWN} more"] if len(at) > SHOWN else [])


def _beside(name: str, yours: str, reference: str) -> str:
    """Both on one line, or below one another where an editor would break it."""
    line = f"{name}yours {yours}   reference {reference}"
    return line if len(line) <= WIDEST else f"{name}yours     {yours}\n{' ' * len(name)}reference {reference}"


def _digits(pair: Pair) -> int:
    """How many decimals show every difference."""
    found, truth = (np.asarray(array[pair.wrong], np.float64) for array in pair[:2])
    return next((digits for digits in (4, 8, 12) if (np.round(found, digits) != np.round(truth, digits)).all()), 16)


def relation(pairs: Pairs) -> str | None:
    """The first relation that explains every number that is wrong, or None. The pairs are those of one output that differ."""
    return next(filter(None, (named(pairs) for named in RELATIONS)), None) if pairs else None


def _never_a_number(pairs: Pairs) -> str | None:
    if any(pair.found.dtype.kind != "f" or not np.isnan(pair.found[pair.wrong]).all() for pair in pairs):
        return None
    return "at the wrong places, yours is always NaN: 0 / 0, 0 · log 0, or never written"


def transposed(pairs: Pairs) -> str | None:
    """Rows for columns; the only relation between arrays of unequal shape."""
    turned = all(pair.truth.ndim == 2 and _same(pair.found, pair.truth.T) for pair in pairs)
    return "it is the reference's, transposed: rows and columns have changed places" if turned else None


def _everywhere_one_number(pairs: Pairs) -> str | None:
    values = np.concatenate([pair.found.ravel() for pair in pairs])
    many = len(values) >= ENOUGH and pairs[0].truth.ndim > 0
    return f"yours is {values[0]} everywhere, whatever the input" if many and (values == values[0]).all() else None


def _factor(pairs: Pairs) -> str | None:
    if _is_bool(pairs) or any((pair.truth[pair.wrong] == 0).any() or not pair.found[pair.wrong].any() for pair in pairs):
        return None
    ratios = [_ratios(pair.found[pair.wrong], pair.truth[pair.wrong]) for pair in pairs]
    said = _constant(pairs, ratios, "yours is always {} times the reference's")
    if said is None and (name := _argument(pairs, ratios)):
        said = f"yours is the reference's {name}"
    return said.replace("yours is always -1 times the reference's", "the sign is turned") if said else None


def _ratios(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """found / truth; where one factor explains all of it up to roundings, which ratios of small numbers magnify, that factor."""
    ratio = found / truth
    factor = ratio[np.argmax(np.abs(truth))]
    return np.full(ratio.shape, factor) if np.isfinite(factor) and _same(found, factor * truth) else ratio


def _distance(pairs: Pairs) -> str | None:
    if _is_bool(pairs):
        return None
    distances = [pair.found[pair.wrong].astype(np.float64) - pair.truth[pair.wrong] for pair in pairs]
    return _constant(pairs, distances, "yours minus the reference's is always {}")


def _constant(pairs: Pairs, by_pair: list[np.ndarray], text: str) -> str | None:
    """`text` with the one number that is the same at every wrong place of every input."""
    values, enough = np.concatenate(by_pair), ENOUGH if pairs[0].truth.ndim else 2
    if len(values) < enough or not np.isfinite(values).all() or not _is_one(values):
        return None
    return _limit(pairs) + text.format(_number(values[0]))


def _limit(pairs: Pairs) -> str:
    """ "" where what is said of the wrong places is said of everything that is not 0."""
    whole = all((pair.wrong | (np.abs(pair.truth) < 1e-12)).all() for pair in pairs)
    return "" if whole else "at the wrong places, "


def _argument(pairs: Pairs, ratios: list[np.ndarray]) -> str | None:
    """What of the arguments has the value of the factor on every input: a number among them, or a letter of their shapes."""
    if len(pairs) < 2 or not all(np.isfinite(ratio).all() and _is_one(ratio) for ratio in ratios):
        return None
    factor_I, known = np.array([ratio[0] for ratio in ratios]), [_sizes(pair.given) for pair in pairs]
    for name in (name for name in known[0] if all(name in sizes for sizes in known)):
        value_I = np.array([sizes[name] for sizes in known])
        for how, expected_I in (("times", value_I), ("divided by", 1 / np.where(value_I == 0, np.nan, value_I))):
            if np.allclose(factor_I, expected_I, rtol=1e-5):
                return f"{how} {name} ({_listed([_number(value) for value in value_I])} on the inputs that differ)"
    return None


def _sizes(given: Mapping[str, Any]) -> dict[str, float]:
    """The arguments that are numbers, and the sizes that the letters of the others' names stand for: x_TD tells T and D."""
    sizes: dict[str, float] = {}
    for name, value in given.items():
        letters = name.rpartition("_")[2]
        if isinstance(value, np.ndarray) and len(letters) == value.ndim and letters.isupper():
            sizes |= dict(zip(letters, map(float, value.shape), strict=True))
        elif isinstance(value, (int, float)):
            sizes[name] = float(value)
    return sizes


def _argument_missing(pairs: Pairs) -> str | None:
    for name, value in pairs[0].given.items():
        if isinstance(value, np.ndarray) and value.shape == pairs[0].truth.shape and not _is_bool(pairs):
            for sign, what in ((-1, "too little"), (1, "too much")):
                if all(_same(pair.found, pair.truth + sign * pair.given[name]) for pair in pairs):
                    return f"what yours has {what} is exactly {name}"
    return None


def _factor_of_rows(pairs: Pairs) -> str | None:
    return _factor_of_lines([(pair.found, pair.truth) for pair in pairs], "row")


def _factor_of_columns(pairs: Pairs) -> str | None:
    return _factor_of_lines([(pair.found.T, pair.truth.T) for pair in pairs], "column")


def _factor_of_lines(arrays: Sequence[tuple[np.ndarray, np.ndarray]], line: str) -> str | None:
    factors: list[float] = []
    for found, truth in arrays:
        if truth.ndim != 2 or truth.dtype.kind == "b" or not np.isfinite(found).all():
            return None
        for own, right in zip(found, truth, strict=True):
            used = right != 0
            ratio = _ratios(own[used], right[used]) if used.any() else np.ones(1)
            if own[~used].any() or not _is_one(ratio):
                return None
            factors += [ratio[0]] if used.sum() > 1 else []
    listed = _listed([_number(factor) for factor in factors])
    return f"each {line} is the reference's times a constant of its own: {listed}" if len(factors) >= ENOUGH else None


def _reversed(pairs: Pairs) -> str | None:
    for axis, what in enumerate(("from the last to the first", "every row from right to left")):
        if all(pair.truth.ndim > axis and _same(pair.found, np.flip(pair.truth, axis)) for pair in pairs):
            return f"it is the reference's, {what}"
    return None


def _shifted(pairs: Pairs) -> str | None:
    for axis, directions in enumerate((("down", "up"), ("to the right", "to the left"))):
        if all(pair.truth.ndim > axis and pair.truth.shape[axis] > ENOUGH for pair in pairs):
            for direction, ahead in zip(directions, ("found", "truth"), strict=True):
                if all(_is_next(pair, axis, ahead) for pair in pairs):
                    return f"it is the reference's, moved {direction} by one place"
    return None


def _is_next(pair: Pair, axis: int, ahead: str) -> bool:
    later, earlier = (pair.found, pair.truth) if ahead == "found" else (pair.truth, pair.found)
    later, earlier = np.moveaxis(later, axis, 0), np.moveaxis(earlier, axis, 0)
    return _same(later[1:], earlier[:-1])


def _another_order(pairs: Pairs) -> str | None:
    if _is_bool(pairs) or any(not pair.truth.ndim or pair.truth.size < 2 for pair in pairs):
        return None
    if all(pair.truth.ndim == 2 and _same(np.sort(pair.found, 1), np.sort(pair.truth, 1)) for pair in pairs):
        return "each row has the right numbers, in another order"
    if all(_same(_sorted_rows(pair.found), _sorted_rows(pair.truth)) for pair in pairs):
        return f"the {'rows' if pairs[0].truth.ndim == 2 else 'numbers'} are right, in another order"
    if all(_same(np.sort(pair.found, None), np.sort(pair.truth, None)) for pair in pairs):
        return "the numbers are right, in other places: does a reshape undo what the transposition did?"
    return None


def _sorted_rows(array: np.ndarray) -> np.ndarray:
    return np.array(sorted(array.tolist()))


def _one_side(pairs: Pairs) -> str | None:
    found, truth = (np.concatenate([getattr(pair, side)[pair.wrong] for pair in pairs]) for side in ("found", "truth"))
    if len(found) < ENOUGH:
        return None
    if _is_bool(pairs):
        return f"at the wrong places, yours is always {found[0]}" if (found == found[0]).all() else None
    for name, is_so in (("0", found == 0), ("too large", found > truth), ("too small", found < truth)):
        if is_so.all():
            return f"at the wrong places, yours is always {name}"
    return None


RELATIONS: tuple[Callable[[Pairs], str | None], ...] = (
    _never_a_number, _everywhere_one_number, transposed, _factor, _distance, _argument_missing, _factor_of_rows, _factor_of_columns,
    _reversed, _shifted, _another_order, _one_side,
)  # fmt: skip


def _is_bool(pairs: Pairs) -> bool:
    return pairs[0].truth.dtype.kind == "b"


def _same(found: np.ndarray, truth: np.ndarray) -> bool:
    if found.shape != truth.shape:
        return False
    return bool(np.allclose(found, truth, rtol=1e-5, atol=1e-5 * rms(truth[np.isfinite(truth)]), equal_nan=True))


def _is_one(values: np.ndarray) -> bool:
    return bool(np.allclose(values, values[0], rtol=1e-5, atol=1e-12))


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:SHOWN])) + (", …" if len(values) > SHOWN else "")


def _number(value: object) -> str:
    return f"{float(value):.4g}"  # type: ignore[arg-type]
