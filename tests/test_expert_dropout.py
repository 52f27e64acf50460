"""Dropout inside the experts: what it multiplies, when it is drawn, and that every track and backend drops the same units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from configs import CONFIGS, random_params, random_tokens

from optimized import MoE, backends
from reference import ExpertsConfig, GatingConfig, MoEConfig, init_params, moe_forward, presets
from reference.architectures import run
from reference.autograd import MoE as ReferenceMoE
from reference.autograd import params_from_numpy, routing_from_numpy
from reference.expert_dropout import NAME

DROPPING = CONFIGS["expert-dropout"]
PLAIN = replace(DROPPING, experts=replace(DROPPING.experts, dropout=0.0))


def test_hidden_units_by_hand() -> None:
    """One expert of four units, each of which writes its own place: what is drawn below p is gone, the rest is divided by 1 − p."""
    config = MoEConfig(4, experts=ExpertsConfig(1, 4, "relu", dropout=0.2))
    params = {"router.weight": np.zeros((1, 4)), "experts.up_proj": np.eye(4)[None], "experts.down_proj": np.eye(4)[None]}
    first, _ = moe_forward(np.array([[1.0, 2.0, 3.0, 4.0]]), params, config, training=True, rng=np.random.default_rng(0))
    drawn = replace(first.routing, draws={NAME: np.array([[[0.9, 0.1, 0.2, 0.19]]])})
    again, _ = moe_forward(np.array([[1.0, 2.0, 3.0, 4.0]]), params, config, training=True, replay=drawn)
    np.testing.assert_allclose(again.y, [[1.25, 0, 3.75, 0]], rtol=1e-15)


def test_only_training_drops(rng: np.random.Generator) -> None:
    params, given = random_params(DROPPING, rng), random_tokens(DROPPING, rng, 20)
    trained, _ = moe_forward(params=params, config=DROPPING, training=True, rng=rng, **given)
    evaluated = [moe_forward(params=params, config=config, **given)[0] for config in (DROPPING, PLAIN)]
    assert evaluated[0].routing.draws == {} and np.array_equal(evaluated[0].y, evaluated[1].y)
    assert not np.allclose(trained.y, evaluated[0].y)
    replayed, _ = moe_forward(params=params, config=DROPPING, replay=trained.routing, **given)
    assert np.allclose(replayed.y, evaluated[0].y), "an evaluation that replays a training pass's choices drops no unit"


def test_the_mean_over_draws_is_the_layer_without_dropout(rng: np.random.Generator) -> None:
    """An expert is linear in its hidden layer."""
    config = replace(DROPPING, gating=GatingConfig(top_k=4), capacity=replace(DROPPING.capacity, formula="none"))
    params, x_TD = random_params(config, rng), rng.standard_normal((1, 6))
    many_TD = np.repeat(x_TD, 60_000, axis=0)
    mean = moe_forward(many_TD, params, config, training=True, rng=rng)[0].y.mean(0)
    plain = moe_forward(x_TD, params, replace(config, experts=PLAIN.experts), training=True)[0].y[0]
    np.testing.assert_allclose(mean, plain, atol=0.03 * np.abs(plain).max())


def test_shared_experts_and_the_routing_are_as_without(rng: np.random.Generator) -> None:
    params, given = random_params(DROPPING, rng), random_tokens(DROPPING, rng, 20)
    params = params | {name: 0 * params[name] for name in params if name.startswith("experts.")}
    with_it, without = (moe_forward(params=params, config=config, training=True, rng=rng, **given)[0] for config in (DROPPING, PLAIN))
    assert np.array_equal(with_it.y, without.y) and np.array_equal(with_it.routing.gate, without.routing.gate)
    assert with_it.y.any()


@pytest.mark.parametrize("backend", ["auto", *backends.names()])
def test_backends_drop_what_the_reference_drops(backend: str, rng: np.random.Generator) -> None:
    dtype = torch.float32
    if backend != "auto" and (reason := backends.why_not(backend, torch.device("cpu"), dtype, DROPPING)):
        pytest.skip(reason)
    params, given = random_params(DROPPING, rng, np.float32), random_tokens(DROPPING, rng, 20)
    x_TD = given["x_TD"].astype(np.float32)
    wanted, _ = moe_forward(x_TD, params, DROPPING, training=True, rng=rng)
    moe = MoE(DROPPING, backend=backend, dtype=dtype)
    moe.load_state_dict(params_from_numpy(params, dtype=dtype))
    y, _ = moe(torch.from_numpy(x_TD), replay=routing_from_numpy(wanted.routing))
    np.testing.assert_allclose(y.detach().numpy(), wanted.y, rtol=0, atol=2e-6)
    own = moe(torch.from_numpy(x_TD))[1].routing.draws[NAME]
    assert own.shape == (20, 2, DROPPING.experts.width) and 0 <= own.min() < own.max() < 1
    assert moe.eval()(torch.from_numpy(x_TD))[1].routing.draws == {}


def test_fine_tuning_a_switch_layer_with_the_paper_s_dropout(rng: np.random.Generator) -> None:
    config = presets.tiny("switch-base-128")
    config = replace(config, experts=replace(config.experts, dropout=0.4))
    moe = ReferenceMoE(config)
    _, aux = moe(torch.randn(3, 50, 16))
    dropped = (aux.routing.draws[NAME] < 0.4).float().mean().item()
    assert dropped == pytest.approx(0.4, abs=0.05)
    params, x_TD = init_params(config, rng), rng.standard_normal((9, 16))
    y_TD, _ = run("switch-base-128", x_TD, params, config, rng=np.random.default_rng(3))
    output, _ = moe_forward(x_TD, params, config, training=True, rng=np.random.default_rng(3))
    assert not np.allclose(y_TD, output.y), "the recipe is the pre-training pass, which drops no unit"


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), None, True])
def test_bad_rates_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"experts.dropout is .*; it must lie in \[0, 1\)"):
        ExpertsConfig(dropout=value)  # type: ignore[arg-type]


def test_a_replay_without_the_draws_is_refused(rng: np.random.Generator) -> None:
    params, given = random_params(DROPPING, rng), random_tokens(DROPPING, rng, 9)
    routing = moe_forward(params=params, config=PLAIN, training=True, **given)[0].routing
    with pytest.raises(ValueError, match="replay holds no draws named 'expert_dropout'"):
        moe_forward(params=params, config=DROPPING, training=True, replay=routing, **given)
