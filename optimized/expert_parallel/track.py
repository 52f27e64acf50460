"""The row "expert parallel × 2" of every table of tracks: the layer's tokens and experts on two processes."""

from __future__ import annotations

from collections.abc import Callable

from reference.config import MoEConfig
from reference.proof.cases import Inputs

from ..tracks import Conditions, Outcome, Step, Track, register
from .limits import check_supported
from .pair import RANKS, pair, why_not

NAME = f"expert parallel × {RANKS}"


def _prepare(inputs: Inputs, dtype: str, conditions: Conditions) -> Step:
    from .layer import parallelize
    from .pair_worker import one_pass

    def step() -> Callable[[], Outcome]:
        outcome = pair().run(one_pass, parallelize, inputs, dtype, conditions)
        return lambda: outcome

    return step


def _unavailable(config: MoEConfig, dtype: str) -> str | None:
    try:
        check_supported(config, "layer")
    except ValueError as error:
        return str(error)
    return why_not()


TRACK = register(Track(NAME, _prepare, _unavailable, ("float64", "float32", "bfloat16"), timed=False))
