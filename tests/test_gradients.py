"""The hand-derived backward against central differences: every config, parameter, input and loss, with drops, pads and noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
from configs import CONFIGS, random_params, random_tokens

from reference import MoEOutput, Routing, chained_backward, moe_backward, moe_forward
from reference.config import GatingConfig
from reference.gating import gates_backward, gates_forward
from reference.layer import BUFFERS, LayerCache

STEP = 1e-5
INPUTS = {"x_TD": "x", "previous_logits": "previous"}
LOSS_CASES = [(name, loss) for name, config in CONFIGS.items() for loss, _ in config.balance.losses]


class Pass(NamedTuple):
    """A recorded training pass: its arguments by name, params among them, its results, and its decisions for `again`."""

    name: str
    arguments: dict[str, Any]
    output: MoEOutput
    cache: LayerCache

    def again(self, changed: Mapping[str, np.ndarray]) -> MoEOutput:
        """The same decisions and draws at another point of x and params."""
        inputs = {key: changed[name] for key, name in INPUTS.items() if name in changed}
        arguments = {**self.arguments, **inputs}
        params = {**self.arguments["params"], **{key: value for key, value in changed.items() if key not in INPUTS.values()}}
        replay: Routing = self.output.routing
        return moe_forward(**{**arguments, "params": params}, config=CONFIGS[self.name], training=True, replay=replay)[0]

    def point(self) -> dict[str, np.ndarray]:
        """Where the gradient is taken: x, the logits of the layer before where they are given, and every parameter that learns."""
        learned = {key: value for key, value in self.arguments["params"].items() if key not in BUFFERS}
        return {name: self.arguments[key] for key, name in INPUTS.items() if key in self.arguments} | learned

    def gradient(self, dy_TD: np.ndarray, dloss: Any = 1.0, dlogits: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The derived gradient at every entry of `point`."""
        dx_TD, dprevious_TE, dparams = chained_backward(dy_TD, self.cache, dloss, dlogits)
        return {"x": dx_TD, **({} if dprevious_TE is None else {"previous": dprevious_TE}), **dparams}


def record(name: str) -> Pass:
    """A pass over 13 tokens, 2 of them padding, in 3 groups."""
    rng = np.random.default_rng(3)
    arguments = {**random_tokens(CONFIGS[name], rng, 13, groups=3, pads=2), "params": random_params(CONFIGS[name], rng)}
    output, cache = moe_forward(**arguments, config=CONFIGS[name], training=True, rng=rng)
    return Pass(name, arguments, output, cache)


def slope(function: Callable[[Mapping[str, np.ndarray]], float], point: Mapping[str, np.ndarray], along: Mapping[str, np.ndarray]) -> float:
    """Central difference of a function at a point, along a direction."""
    ahead = {key: value + STEP * along[key] if key in along else value for key, value in point.items()}
    behind = {key: value - STEP * along[key] if key in along else value for key, value in point.items()}
    return (function(ahead) - function(behind)) / (2 * STEP)


def assert_gradient(run: Pass, objective: Callable[[MoEOutput], float], gradient: Mapping[str, np.ndarray]) -> None:
    """Compares in two random directions through each array alone, and in two through all of them."""
    rng, point = np.random.default_rng(4), run.point()
    assert gradient.keys() == point.keys()
    for keys in [*([key] for key in point), list(point)]:
        for _ in range(2):
            along = {key: rng.standard_normal(point[key].shape) for key in keys}
            measured = slope(lambda changed: objective(run.again(changed)), point, along)
            derived = sum(float((gradient[key] * along[key]).sum()) for key in keys)
            size = max(float(np.sqrt(sum((gradient[key] ** 2).sum() for key in keys))), 1e-3)
            assert abs(measured - derived) < 1e-7 * size, (keys, measured, derived)


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_gradient_is_the_slope(name: str) -> None:
    run = record(name)
    dy_TD = np.random.default_rng(5).standard_normal(run.output.y.shape)
    assert_gradient(run, lambda output: float((dy_TD * output.y).sum()) + 0.7 * output.loss, run.gradient(dy_TD, 0.7))


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_of_the_logits_is_their_slope(name: str) -> None:
    """What a layer behind this one sends back to its logits."""
    run = record(name)
    dlogits = np.random.default_rng(6).standard_normal(run.output.routing.logits.shape)
    gradient = run.gradient(np.zeros_like(run.output.y), 0.0, dlogits)
    assert_gradient(run, lambda output: float((dlogits * output.routing.logits).sum()), gradient)


@pytest.mark.parametrize("name, loss", LOSS_CASES)
def test_gradient_of_each_loss_is_its_slope(name: str, loss: str) -> None:
    run = record(name)
    gradient = run.gradient(np.zeros_like(run.output.y), {loss: 1.0})
    assert_gradient(run, lambda output: output.losses[loss], gradient)
    teaches = np.abs(gradient["router.weight"]).max() > 1e-6
    assert teaches, "a balance loss that moves no router is none"


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.balance.losses])
def test_a_number_for_dloss_means_the_weights_of_the_config(name: str) -> None:
    run = record(name)
    dy_TD = np.ones_like(run.output.y)
    as_number = moe_backward(dy_TD, run.cache, dloss=2.0)
    penalty = float(run.arguments["params"].get("router.penalty", np.ones(1))[0])
    weights = {loss: weight * penalty if loss == "gate_l1" else weight for loss, weight in CONFIGS[name].balance.losses}
    by_name = moe_backward(dy_TD, run.cache, dloss={loss: 2.0 * weight for loss, weight in weights.items()})
    np.testing.assert_array_equal(as_number[0], by_name[0])
    for key in as_number[1]:
        np.testing.assert_array_equal(as_number[1][key], by_name[1][key])


@pytest.mark.parametrize("name", CONFIGS)
def test_slope_check_rejects_wrong_gradients(name: str) -> None:
    run = record(name)
    dy_TD = np.random.default_rng(5).standard_normal(run.output.y.shape)
    gradient = run.gradient(dy_TD)

    def objective(output: MoEOutput) -> float:
        return float((dy_TD * output.y).sum()) + output.loss

    for key in gradient:
        if np.abs(gradient[key]).max() > 1e-3:
            with pytest.raises(AssertionError):
                assert_gradient(run, objective, {**gradient, key: 1.001 * gradient[key]})


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_and_idle_experts_get_exactly_zero(name: str) -> None:
    run = record(name)
    dx_TD, dparams = moe_backward(np.ones_like(run.output.y), run.cache)
    routing = run.output.routing
    assert not dx_TD[run.arguments["pad_mask"]].any()
    idle = np.bincount(routing.expert[routing.keep], minlength=CONFIGS[name].experts.count) == 0
    config = CONFIGS[name].experts
    first = config.networks + sum(number for kind, number in config.zero_computation[:-1])  # "constant", which learns, comes last
    for key in dparams:
        own = idle[first:] if key.startswith("experts.constant") else idle[: config.networks]
        assert not key.startswith("experts.") or not dparams[key][own].any()


def test_whole_cotangents_of_gates_are_not_cut_to_whole_gradients() -> None:
    _, cache = gates_forward(np.array([[0.5, 0.3, 0.2]]), np.array([[0, 1]]), GatingConfig(top_k=2, normalize="sum"))
    whole, wanted = (gates_backward(np.array([[1, 0]], kind), cache) for kind in (np.int64, np.float64))
    assert wanted.any()
    np.testing.assert_array_equal(whole, wanted)
