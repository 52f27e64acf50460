"""Tracks side by side on one input: are they equal (`compare_tracks`), how long do they take (`time_tracks`).

What "equal" means is `reference.proof`; here it is only applied, to every registered track.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reference import moe_forward, presets
from reference.choices import CHOICES, ChoiceContext
from reference.config import MoEConfig
from reference.layer import BUFFERS, init_params
from reference.proof.cases import Case, Inputs, draw
from reference.proof.equal import Report, assert_equal, compare_all, round_to
from reference.proof.parity import cancellation_scales, layer_truth
from reference.proof.teeth import assert_teeth, tensor_mutations
from reference.routing import decide
from reference.scores import SCORE_FUNCTIONS
from reference.tokens import Draws, token_info

from .tracks import TRACKS, TRUTH, YARDSTICK, Conditions, Outcome, Track
from .yardstick import eager_outputs

# In float64 there is no coarser arithmetic to be the yardstick: the hand-derived backward and autograd agree to this, relative to the RMS.
FLOAT64_LIMIT = 1e-11


@dataclass(frozen=True)
class Row:
    """One track in one dtype on one input.

    verdict     "equal" | "yardstick" (its error is what others are measured by) | "broken" | "cannot"
    rms_error, max_error   the worst over y, dx, the loss and every gradient, relative to the truth's RMS; None where nothing ran
    worst       the tensor with the largest RMS error
    flips       tokens whose experts are not those of the float64 truth: near-ties, decided otherwise by rounded scores
    why         each broken bound, or why the track cannot run
    """

    where: str
    track: str
    dtype: str
    verdict: str
    rms_error: float | None = None
    max_error: float | None = None
    worst: str = ""
    flips: int = 0
    why: tuple[str, ...] = ()

    @property
    def broken(self) -> bool:
        """Whether this row makes the whole comparison fail."""
        return self.verdict == "broken"


def rounded_to(inputs: Inputs, dtype: str) -> Inputs:
    """The inputs drawn in `dtype`, as float64; buffers keep the fp32 that every track stores them in."""
    rounded = inputs.rounded(partial(round_to, dtype=dtype))
    floats = [name for name in BUFFERS & inputs.params.keys() if inputs.params[name].dtype.kind == "f"]
    buffers = {name: round_to(inputs.params[name], "float32") for name in floats}
    return dataclasses.replace(rounded, params={**rounded.params, **buffers})


def preset_inputs(name: str, tokens: int = 96, groups: int = 3) -> tuple[Inputs, Conditions]:
    """(inputs, conditions) of a preset's tiny layer in training mode, with its noise and losses, on random tokens in `groups` groups."""
    config = presets.tiny(name)
    rng = np.random.default_rng(0)
    x_TD, dy_TD = rng.standard_normal((2, tokens, config.d_model))
    params = {key: value.astype(np.float64) if value.dtype.kind == "f" else value for key, value in init_params(config, rng).items()}
    if config.gating.correction_bias:
        params["router.correction_bias"] = rng.normal(0, 0.1, config.experts.count)
    group_T = np.arange(tokens) * groups // tokens
    id_T = rng.integers(0, max(config.gating.vocabulary, 1), tokens)
    return free_inputs(config, params, x_TD, dy_TD, id_T), Conditions(training=True, group_ids=group_T, token_ids=id_T)


def case_inputs(case: Case) -> tuple[Inputs, Conditions]:
    """(inputs, conditions) of a case of the proof, whose given routing is replayed: its load, padding and drops are what is tested."""
    inputs = draw(case)
    return inputs, Conditions(replay=inputs.routing)


def free_inputs(config: MoEConfig, params: dict[str, NDArray], x_TD: NDArray, dy_TD: NDArray, id_T: NDArray | None = None) -> Inputs:
    """Inputs whose routing is that of the layer's own router, without noise."""
    padding = np.zeros(len(x_TD), bool)
    return Inputs(config, x_TD, dy_TD, params, moe_forward(x_TD, params, config, token_ids=id_T)[0].routing, padding)


def compare_tracks(where: str, inputs: Inputs, conditions: Conditions, *, tracks: Sequence[Track], dtypes: Sequence[str]) -> list[Row]:
    """A row for every track and dtype that it claims.

    All tracks replay one routing, so that arithmetic is compared with arithmetic; then each routes by itself, and its choice must be
    exactly the reference's choice on the scores that the track itself computed.
    """
    rows: list[Row] = []
    for dtype in dtypes:
        chosen = [track for track in tracks if dtype in track.dtypes and track.name != TRUTH]
        if chosen:
            rows += _compare_in_dtype(where, rounded_to(inputs, dtype), conditions, chosen, dtype)
    return rows


def _compare_in_dtype(where: str, inputs: Inputs, conditions: Conditions, chosen: Sequence[Track], dtype: str) -> list[Row]:
    if conditions.replay is None:
        rng = np.random.default_rng(0)
        recorded = moe_forward(
            inputs.x,
            inputs.params,
            inputs.config,
            pad_mask=inputs.pad_mask,
            training=conditions.training,
            group_ids=conditions.group_ids,
            token_ids=conditions.token_ids,
            rng=rng,
        )[0]
        conditions = conditions._replace(replay=recorded.routing)
    arguments = conditions._asdict()
    truth = layer_truth(inputs, **arguments)
    scales = cancellation_scales(inputs, **arguments)
    yardstick = {} if dtype == "float64" else eager_outputs(inputs, truth, dtype, conditions)
    alone = Conditions(group_ids=conditions.group_ids, token_ids=conditions.token_ids)
    choice = TRACKS[TRUTH].run(inputs, "float64", alone).routing
    rows = []
    for track in chosen:
        reason = track.reason_against(inputs.config, dtype)
        if reason:
            rows.append(Row(where, track.name, dtype, "cannot", why=(reason,)))
            continue
        try:
            outputs = track.run(inputs, dtype, conditions).outputs
            free = track.run(inputs, dtype, alone)
        except Exception as error:  # whatever a track raises is its failure, and the others still run
            rows.append(Row(where, track.name, dtype, "broken", why=(f"{type(error).__name__}: {error}",)))
            continue
        eager = outputs if dtype == "float64" else yardstick
        reports = compare_all(outputs, truth, eager, dtype, scales=scales)
        failures = [failure for report in reports for failure in report.failures]
        failures += _float64_failures(reports) if dtype == "float64" else []
        failures += _choice_failures(inputs, free, conditions)
        flips = int(np.count_nonzero(np.any(np.sort(free.routing.expert) != np.sort(choice.expert), axis=1)))
        rows.append(_row(where, track, dtype, reports, failures, flips))
    return rows


def _row(where: str, track: Track, dtype: str, reports: Sequence[Report], failures: Sequence[str], flips: int) -> Row:
    """The row of what was found out."""
    worst = max(reports, key=lambda report: report.rms_error)
    is_yardstick = track.name == YARDSTICK and dtype != "float64"
    verdict = "broken" if failures else "yardstick" if is_yardstick else "equal"
    largest = max(report.max_error for report in reports)
    return Row(where, track.name, dtype, verdict, worst.rms_error, largest, worst.name, flips, tuple(failures))


def _float64_failures(reports: Sequence[Report]) -> list[str]:
    return [f"{r.name}: error {r.max_error:.3g} > {FLOAT64_LIMIT:g} (float64)" for r in reports if r.max_error > FLOAT64_LIMIT]


def _choice_failures(inputs: Inputs, free: Outcome, conditions: Conditions) -> list[str]:
    """The discrete half has no tolerance: given the scores, there is one right choice."""
    routing = free.routing
    if CHOICES[inputs.config.gating.choice].mixes:  # nothing was chosen
        return []
    tokens = token_info(len(inputs.x), conditions.token_ids, group_ids=conditions.group_ids, pad_mask=inputs.pad_mask)
    bias = inputs.params.get("router.correction_bias")
    bias = None if bias is None else bias.astype(routing.scores.dtype)
    probability_TE, _ = SCORE_FUNCTIONS[inputs.config.scores.function].probability_forward(routing.scores)
    context = ChoiceContext(routing.logits, probability_TE, None, inputs.params.get("router.hash_table"), Draws(None))
    expert_TK = decide(routing.scores, bias, inputs.config, tokens, context).expert_TK
    wrong = np.flatnonzero(np.any(expert_TK != routing.expert, axis=1))
    if not len(wrong):
        return []
    t = int(wrong[0])
    return [f"choice: token {t} goes to {routing.expert[t].tolist()} instead of {expert_TK[t].tolist()} ({len(wrong)} tokens differ)"]


@dataclass(frozen=True)
class Teeth:
    """How many outputs that are wrong on purpose the verdict was tried on, and the names of those it would have accepted."""

    tried: int
    accepted: tuple[str, ...]


def teeth(inputs: Inputs, conditions: Conditions, dtype: str) -> Teeth:
    """The verdict itself, tried on mutations of the truth: zeros, flipped signs, a few percent too much, two rows swapped."""
    inputs = rounded_to(inputs, dtype)
    arguments = conditions._asdict()
    truth = layer_truth(inputs, **arguments)
    scales = cancellation_scales(inputs, **arguments)
    eager = eager_outputs(inputs, truth, dtype, conditions)

    def assertion(outputs: Any) -> list[Report]:
        return assert_equal(outputs, truth, eager, dtype, scales=scales)

    tried, accepted = 0, []
    for name, mutant in tensor_mutations(truth, dtype):
        try:
            tried += len(assert_teeth(assertion, truth, [(name, mutant)], scales=scales, least=0))
        except AssertionError:
            tried, accepted = tried + 1, [*accepted, name]
    return Teeth(tried, tuple(accepted))


@dataclass(frozen=True)
class Timing:
    """ms per 1000 tokens, forward and backward, and the time as a multiple of the yardstick's; None and a reason where it cannot run."""

    track: str
    dtype: str
    milliseconds: float | None
    ratio: float | None
    why: str = ""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch with one thread inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def time_tracks(
    inputs: Inputs, conditions: Conditions, *, tracks: Sequence[Track], dtype: str = "float32", seconds: float = 5.0
) -> list[Timing]:
    """One forward and backward pass of each track in `dtype` (the truth in its own float64) on one thread, in processor time.

    One warm-up each, then rounds in which every track runs once, for about `seconds`; medians, and the ratio is the median of the rounds'
    ratios to `reference.autograd`, which a change of the machine's speed between rounds leaves alone. Tracks that are not `timed` are
    left out.
    """
    rounded = rounded_to(inputs, dtype)
    steps, refused = {}, []
    for track in (track for track in tracks if track.timed):
        own = dtype if dtype in track.dtypes else track.dtypes[0]
        reason = track.reason_against(inputs.config, own)
        if reason:
            refused.append(Timing(track.name, own, None, None, reason))
        else:
            steps[track.name, own] = track.prepare(rounded, own, conditions)
    if not steps:
        return refused
    with one_thread():
        for step in steps.values():
            step()
        rounds = _rounds(steps, seconds)
    base = rounds.get((YARDSTICK, dtype))
    timings = []
    for key, values in rounds.items():
        ratio = None if base is None else statistics.median(value / other for value, other in zip(values, base, strict=True))
        timings.append(Timing(*key, statistics.median(values) * 1e6 / len(inputs.x), ratio))
    return timings + refused


def _rounds(steps: dict[tuple[str, str], Any], seconds: float) -> dict[tuple[str, str], list[float]]:
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    end = time.perf_counter() + seconds
    while len(next(iter(taken.values()))) < 3 or time.perf_counter() < end:
        for key, step in steps.items():
            began = time.process_time()
            step()
            taken[key].append(time.process_time() - began)
    return taken


def plain(value: Any) -> Any:
    """The value as JSON can hold it: dataclasses, tuples and arrays as dicts and lists, what is not finite as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    fields = getattr(value, "_fields", None)
    if fields is not None:
        return {name: plain(getattr(value, name)) for name in fields}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
