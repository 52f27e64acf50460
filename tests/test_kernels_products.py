"""Each kernel with arithmetic on its own, against its stage of the NumPy reference, by the policy of `reference.proof`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("triton")

import triton
import triton.language as tl
from kernel_checks import DEVICE

from optimized.kernels import launch
from optimized.kernels.activations import ACTIVATIONS
from optimized.kernels.blocks import Blocks, using
from optimized.yardstick import D_AXIS
from reference.dispatch import combine_backward, combine_forward, dispatch_backward, dispatch_forward
from reference.experts import ACTIVATIONS as ACTIVATIONS_OF_THE_REFERENCE
from reference.experts import experts_backward, experts_forward, ffn_keys
from reference.proof.cases import Case, Inputs, draw, get
from reference.proof.equal import assert_equal, round_to
from reference.proof.teeth import assert_teeth, tensor_mutations

NAMES = ("off-tile-widths", "drops", "empty-experts", "one-takes-all", "relu", "gelu-bias", "swiglu-bias", "prime-experts")


class Stages(NamedTuple):
    """Every intermediate array of one layer in one dtype, rows in expert order; those of dropped assignments are not there."""

    pre: NDArray
    hidden: NDArray
    out: NDArray
    y: NDArray
    dgate: NDArray
    dpre: NDArray
    weighted: NDArray
    drows: NDArray
    dx: NDArray
    dweights: dict[str, NDArray]


class Problem(NamedTuple):
    """A case in fp32 on the device, its schedule, and its stages in float64 (truth) and float32 (eager)."""

    case: Case
    tensors: dict[str, torch.Tensor]
    schedule: launch.Schedule
    truth: Stages
    eager: Stages
    kept: int


def stages(inputs: Inputs, dtype: type, saved_NM: NDArray | None = None) -> Stages:
    """saved_NM: the rows before their activation as the backward gets them, rounded; without it those of this very pass."""
    config, routing, activation = inputs.config.experts, inputs.routing, ACTIVATIONS_OF_THE_REFERENCE[inputs.config.experts.activation]
    x_TD, dy_TD = inputs.x.astype(dtype), inputs.dy.astype(dtype)
    params = {name: array.astype(dtype) for name, array in inputs.params.items()}
    rows_ND, dispatch = dispatch_forward(x_TD, routing.expert, routing.keep, config.count)
    out_ND, cache = experts_forward(rows_ND, dispatch.bounds_P, params, config)
    gate_TK = routing.gate.astype(dtype)
    y_TD, combined = combine_forward(out_ND, gate_TK, dispatch)
    dout_ND, dgate_TK = combine_backward(dy_TD, combined)
    drows_ND, dweights = experts_backward(dout_ND, cache)
    hidden_NF = np.concatenate([inner.hidden_NF for inner in cache.inner])
    gate_N1 = gate_TK[dispatch.token_N, dispatch.slot_N][:, None]
    up, down, up_bias, _ = ffn_keys("experts", config)
    owner_N = np.repeat(np.arange(config.count), np.diff(dispatch.bounds_P))
    pre_NM = np.einsum("nd,nmd->nm", rows_ND, params[up][owner_N]) + (params[up_bias][owner_N] if config.bias else 0)
    dpre_NM = activation.backward(
        np.einsum("nd,ndf->nf", dout_ND, params[down][owner_N]),
        activation.forward(pre_NM if saved_NM is None else saved_NM.astype(dtype))[1],
    )
    dx_TD = dispatch_backward(drows_ND, dispatch)
    return Stages(pre_NM, hidden_NF, out_ND, y_TD, dgate_TK, dpre_NM, gate_N1 * hidden_NF, drows_ND, dx_TD, dweights)


def eager_stages(inputs: Inputs, truth: Stages) -> Stages:
    """Of each element, the fp32 value farthest from the truth over four numberings of D, as in `optimized.yardstick`."""
    rng, width = np.random.default_rng(0), inputs.config.d_model
    names = [*Stages._fields[:-1], *truth.dweights]
    exact = {**truth._asdict(), **truth.dweights}
    worst = {name: exact[name] for name in names}
    for order_D in (np.arange(width), *(rng.permutation(width) for _ in range(3))):
        params = {name: _renumbered(array, name, order_D) for name, array in inputs.params.items()}
        found = stages(dataclasses.replace(inputs, x=inputs.x[:, order_D], dy=inputs.dy[:, order_D], params=params), np.float32, truth.pre)
        values = {**found._asdict(), **found.dweights}
        for name in names:
            back = _renumbered(values[name], name, np.argsort(order_D))
            worst[name] = np.where(np.abs(back - exact[name]) >= np.abs(worst[name] - exact[name]), back, worst[name])
    return Stages(*(worst[name] for name in Stages._fields[:-1]), {name: worst[name] for name in truth.dweights})


def _renumbered(array: NDArray, name: str, order_D: NDArray[np.int64]) -> NDArray:
    axis = D_AXIS[name.rpartition(".")[2]] if "." in name else -1 if name in ("out", "y", "drows", "dx") else None
    return array if axis is None else np.take(array, order_D, axis)


OTHERS = [name for name in ACTIVATIONS if name not in ("relu", "gelu", "swiglu")]
PROBLEMS = [*map(get, NAMES), *(dataclasses.replace(get("swiglu-bias"), name=f"{name}-bias", activation=name) for name in OTHERS)]


@pytest.fixture(scope="module", params=PROBLEMS, ids=lambda case: case.name)
def problem(request: pytest.FixtureRequest) -> Problem:
    case = request.param
    inputs = draw(case)
    up, down, up_bias, down_bias = ffn_keys("experts", inputs.config.experts)
    arrays = {"x": inputs.x, "dy": inputs.dy, "gate": inputs.routing.gate, "up": inputs.params[up], "down": inputs.params[down]}
    if case.bias:
        arrays |= {"up_bias": inputs.params[up_bias], "down_bias": inputs.params[down_bias]}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).float().to(DEVICE) for name, array in arrays.items()}
    expert, keep = (torch.from_numpy(array).to(DEVICE) for array in (inputs.routing.expert, inputs.routing.keep))
    schedule = launch.sort_by_expert(expert, keep, case.E, 32)
    rounded = inputs.rounded(lambda array: round_to(array, "float32"))
    truth = stages(rounded, np.float64)
    truth = stages(rounded, np.float64, round_to(truth.pre, "float32"))
    return Problem(case, tensors, schedule, truth, eager_stages(rounded, truth), int(keep.sum()))


def on_device(array: NDArray, rows: int) -> torch.Tensor:
    """Rows of the truth in fp32, and NaN where a dropped assignment's row would be."""
    padded = np.full((rows, *array.shape[1:]), np.nan)
    padded[: len(array)] = array
    return torch.from_numpy(padded).float().to(DEVICE)


def check(problem: Problem, candidate: Mapping[str, torch.Tensor], pick: Callable[[Stages], dict[str, NDArray]]) -> None:
    """The candidate equals the truth by the policy; the same assertion rejects every wrong output."""
    truth, eager = pick(problem.truth), pick(problem.eager)

    def assertion(outputs: Mapping[str, NDArray]) -> object:
        return assert_equal(outputs, truth, eager, "float32")

    assertion({name: tensor.cpu().numpy() for name, tensor in candidate.items()})
    assert_teeth(assertion, truth, tensor_mutations(truth, "float32"))


def test_project_up(problem: Problem) -> None:
    tensors = problem.tensors
    hidden, pre = launch.project_up(
        tensors["x"], tensors["up"], tensors.get("up_bias"), problem.schedule, problem.case.activation, slots=problem.case.K, save=True
    )
    assert pre is not None
    check(problem, {"hidden": hidden[: problem.kept], "pre": pre[: problem.kept]}, lambda of: {"hidden": of.hidden, "pre": of.pre})
    assert not pre[problem.kept :].any(), "what is saved for a dropped assignment is 0"
    alone, nothing = launch.project_up(
        tensors["x"], tensors["up"], tensors.get("up_bias"), problem.schedule, problem.case.activation, slots=problem.case.K, save=False
    )
    assert nothing is None
    assert torch.equal(alone[: problem.kept], hidden[: problem.kept])


def test_expert_product_down(problem: Problem) -> None:
    tensors, rows = problem.tensors, problem.case.T * problem.case.K
    hidden = on_device(problem.truth.hidden, rows)
    out = launch.expert_product(hidden, tensors["down"].mT, tensors.get("down_bias"), problem.schedule)
    check(problem, {"out": out[: problem.kept]}, lambda of: {"out": of.out})


def test_expert_product_of_the_rows_gradient(problem: Problem) -> None:
    dpre = on_device(problem.truth.dpre, problem.case.T * problem.case.K)
    drows = launch.expert_product(dpre, problem.tensors["up"], None, problem.schedule)
    check(problem, {"drows": drows[: problem.kept]}, lambda of: {"drows": of.drows})


def test_combine(problem: Problem) -> None:
    out = on_device(problem.truth.out, problem.case.T * problem.case.K)
    gate = problem.tensors["gate"].clone()
    gate[torch.from_numpy(~draw(problem.case).routing.keep).to(DEVICE)] = float("nan")
    y, nothing = launch.combine(out, gate, problem.schedule, torch.float32)
    assert nothing is None
    check(problem, {"y": y}, lambda of: {"y": of.y})


def test_activation_gradient_and_the_gates(problem: Problem) -> None:
    tensors, rows = problem.tensors, problem.case.T * problem.case.K
    gradient = launch.activation_gradient(
        tensors["dy"], tensors["gate"], tensors["down"], tensors.get("down_bias"), on_device(problem.truth.pre, rows),
        problem.schedule, problem.case.activation, weights=True,
    )  # fmt: skip
    assert gradient.weighted is not None
    drows = on_device(problem.truth.drows, rows)
    dx, dgate = launch.combine(drows, tensors["gate"], problem.schedule, torch.float32, parts=gradient.parts)
    assert dgate is not None
    found = {"dpre": gradient.dpre[: problem.kept], "weighted": gradient.weighted[: problem.kept], "dx": dx, "dgate": dgate}
    check(problem, found, lambda of: {"dpre": of.dpre, "weighted": of.weighted, "dx": of.dx, "dgate": of.dgate})


def test_weight_gradients(problem: Problem) -> None:
    tensors, case = problem.tensors, problem.case
    rows = case.T * case.K
    dpre, weighted = on_device(problem.truth.dpre, rows), on_device(problem.truth.weighted, rows)
    dup, dup_bias = launch.weight_gradient(
        dpre, tensors["x"], tensors["up"], tensors.get("up_bias"), problem.schedule, gather="right", slots=case.K
    )
    ddown, ddown_bias = launch.weight_gradient(
        tensors["dy"], weighted, tensors["down"], tensors.get("down_bias"), problem.schedule,
        gather="left", slots=case.K, gate=tensors["gate"],
    )  # fmt: skip
    keys = ffn_keys("experts", case.config().experts)
    found = dict(zip(keys, (dup, ddown, dup_bias, ddown_bias), strict=True))
    check(problem, {key: found[key] for key in problem.truth.dweights}, lambda of: of.dweights)
    empty = np.flatnonzero(np.bincount(draw(case).routing.expert[draw(case).routing.keep], minlength=case.E) == 0)
    assert not any(gradient[expert].any() for expert in empty for gradient in found.values() if gradient.numel())


@pytest.mark.parametrize("blocks", [Blocks(16, 16, 16, group=2), Blocks(64, 32, 16), Blocks(16, 64, 32, group=1)], ids=str)
def test_any_block_sizes_give_the_same_layer(blocks: Blocks) -> None:
    """Several tiles along every axis, and heights that differ between the kernels of one pass."""
    case = get("off-tile-widths")
    inputs = draw(case)
    up, down, *_ = ffn_keys("experts", inputs.config.experts)
    as_tensor = lambda array: torch.from_numpy(np.ascontiguousarray(array)).float().to(DEVICE)  # noqa: E731
    x, dy, gate, up, down = map(as_tensor, (inputs.x, inputs.dy, inputs.routing.gate, inputs.params[up], inputs.params[down]))
    expert, keep = (torch.from_numpy(array).to(DEVICE) for array in (inputs.routing.expert, inputs.routing.keep))

    def both() -> list[torch.Tensor]:
        y, pre, order, bounds = launch.experts_forward(x, expert, gate, keep, up, down, None, None, "swiglu", True)
        return [y, pre, *launch.experts_backward(dy, x, gate, up, down, None, None, pre, order, bounds, "swiglu", True)]

    usual = both()
    other = Blocks(32, 16, 16, group=2)
    with using(up=blocks, product=other, activation=Blocks(16, 32, 64, group=3), weight=blocks, combine=Blocks(16, 16)):
        for one, other in zip(usual, both(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@triton.jit
def activate(GATE_PROJ, UP, DHIDDEN, OUT, FORWARD: tl.constexpr, BACKWARD: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    gate_proj, up, dhidden = tl.load(GATE_PROJ + at), tl.load(UP + at), tl.load(DHIDDEN + at)
    dgate_proj, dup = BACKWARD(gate_proj, up, dhidden)
    tl.store(OUT + at, FORWARD(gate_proj, up))
    tl.store(OUT + N + at, dgate_proj)
    tl.store(OUT + 2 * N + at, dup)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_far_from_0(name: str) -> None:
    """Where exponentials overflow, clamps act and a ReLU has its corner; the layer's own values are seldom there."""
    row, theirs, count = ACTIVATIONS[name], ACTIVATIONS_OF_THE_REFERENCE[name], 256
    rng = np.random.default_rng(0)
    edges = np.array([-100, -9, -7, -1e-3, 0, 1e-3, 7, 9, 30], np.float32)
    grid = np.stack(np.meshgrid(edges, edges)).reshape(2, -1)
    values = np.concatenate([grid, rng.normal(0, 5, (2, count - grid.shape[1])).astype(np.float32)], axis=1)
    dhidden = rng.normal(size=count).astype(np.float32)
    out = torch.zeros(3, count, device=DEVICE)
    arrays = (torch.from_numpy(array).to(DEVICE) for array in (*values, dhidden))
    activate[(1,)](*arrays, out, FORWARD=row.forward, BACKWARD=row.backward, N=count)
    assert row.gated == theirs.gated

    def exact(dtype: type) -> list[NDArray]:
        pre_NM = (values.T if row.gated else values[1:].T).astype(dtype)
        hidden_NF, cache = theirs.forward(pre_NM)
        return [hidden_NF[:, 0], *theirs.backward(dhidden.astype(dtype)[:, None], cache).T]

    found = [out[0], *(out[1:] if row.gated else out[2:])]
    # 1 + erf leaves an absolute error where Φ is tiny, and so does 1 − σ.
    size = (1 + np.abs(values[0])) * (1 + np.abs(values[1])) * (1 + np.abs(dhidden))
    for candidate, truth, plain in zip(found, exact(np.float64), exact(np.float32), strict=True):
        bound = 4 * np.abs(plain - truth) + 4e-6 * np.abs(truth) + 3e-7 * size
        assert (np.abs(candidate.cpu().numpy() - truth) <= bound).all()


def test_every_activation_of_the_reference_is_in_the_table() -> None:
    assert set(ACTIVATIONS) >= set(ACTIVATIONS_OF_THE_REFERENCE)
