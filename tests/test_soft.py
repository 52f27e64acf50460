"""Soft MoE: numbers worked out by hand, what it promises and what it cannot, in every track."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from configs import CONFIGS, random_params, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from optimized import MoE, apply_experts
from reference import (
    CapacityConfig,
    ExpertsConfig,
    GatingConfig,
    MoEConfig,
    ScoresConfig,
    init_params,
    moe_backward,
    moe_forward,
    presets,
    route,
)
from reference.autograd import MoE as ReferenceMoE
from reference.autograd import params_from_numpy, routing_from_numpy, routing_to_numpy
from reference.layer import apply_experts as numpy_apply_experts
from reference.soft import soft_mix, unit_forward
from reference.tokens import token_info

bounded = settings(derandomize=True, deadline=None, max_examples=25, database=None)
seeds = st.integers(0, 2**32 - 1)
CONFIG = CONFIGS["soft"]


def by_hand() -> tuple[MoEConfig, dict[str, np.ndarray], np.ndarray]:
    """Two tokens along the axes, two experts with a slot each along the axes: cosines are 1 and 0. Scale log 3: weights 3 to 1."""
    config = MoEConfig(2, gating=GatingConfig(choice="soft", slots=1), experts=ExpertsConfig(2, 2, "relu"))
    params = {
        "router.weight": np.array([[[5.0, 0.0]], [[0.0, 0.1]]]) * 1e3,
        "router.scale": np.log([3.0]),
        "experts.up_proj": np.stack([np.eye(2), 2 * np.eye(2)]),
        "experts.down_proj": np.stack([np.eye(2), np.eye(2)]),
    }
    return config, params, np.array([[4000.0, 0.0], [0.0, 8000.0]])


def test_golden_output_by_hand() -> None:
    config, params, x_TD = by_hand()
    output, _ = moe_forward(x_TD, params, config)
    np.testing.assert_allclose(output.routing.mix.dispatch[:, :, 0], [[0.75, 0.25], [0.25, 0.75]], atol=1e-9)
    np.testing.assert_allclose(output.routing.mix.combine[:, :, 0], [[0.75, 0.25], [0.25, 0.75]], atol=1e-9)
    # Slots (3000, 2000) and (1000, 6000); outputs the first as it is and the second doubled, (2000, 12000).
    np.testing.assert_allclose(output.y, [[2750, 4500], [2250, 9500]], rtol=1e-8)
    np.testing.assert_allclose(output.routing.importance, [0.5, 0.5])
    assert output.routing.load.tolist() == [2, 2] and output.routing.expert.tolist() == [[0, 1], [0, 1]]


def test_vectors_have_length_1_and_a_zero_stays_one() -> None:
    unit, _ = unit_forward(np.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(unit, [[0.6, 0.8], [0, 0]], atol=1e-7)


@bounded
@given(seeds, st.integers(0, 14), st.integers(1, 4))
def test_shares_sum_to_1(seed: int, tokens: int, groups: int) -> None:
    rng = np.random.default_rng(seed)
    arguments = random_tokens(CONFIG, rng, tokens, groups=groups, pads=tokens // 4)
    mix = moe_forward(params=random_params(CONFIG, rng), config=CONFIG, **arguments)[0].routing.mix
    real_T = ~arguments["pad_mask"]
    np.testing.assert_allclose(mix.combine.sum((1, 2)), real_T, atol=1e-12)
    for group in range(mix.groups):
        own = mix.group == group
        np.testing.assert_allclose(mix.dispatch[own].sum(0), float(real_T[own].any()), atol=1e-12)
    assert not mix.dispatch[~real_T].any()


@bounded
@given(seeds, st.integers(1, 12))
def test_permuted_tokens_have_permuted_outputs(seed: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    params, x_TD, order_T = random_params(CONFIG, rng), rng.standard_normal((tokens, CONFIG.d_model)), rng.permutation(tokens)
    first, second = (moe_forward(x, params, CONFIG)[0].y for x in (x_TD, x_TD[order_T]))
    np.testing.assert_allclose(second, first[order_T], rtol=1e-10, atol=1e-12)


@bounded
@given(seeds)
def test_groups_and_padding_do_not_touch_each_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    params, x_TD = random_params(CONFIG, rng), rng.standard_normal((9, CONFIG.d_model))
    pad_T = np.arange(9) == 4
    together = moe_forward(x_TD, params, CONFIG, group_ids=np.arange(9) // 5, pad_mask=pad_T)[0].y
    np.testing.assert_allclose(together[:4], moe_forward(x_TD[:4], params, CONFIG)[0].y, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(together[5:], moe_forward(x_TD[5:], params, CONFIG)[0].y, rtol=1e-12, atol=1e-13)
    assert not together[4].any()


def test_it_is_not_causal(rng: np.random.Generator) -> None:
    params, x_TD = random_params(CONFIG, rng), rng.standard_normal((6, CONFIG.d_model))
    changed_TD = x_TD.copy()
    changed_TD[-1] += 1
    before, after = (moe_forward(x, params, CONFIG)[0].y for x in (x_TD, changed_TD))
    assert np.abs(after[0] - before[0]).max() > 1e-3, "the first token does not see the last one"
    dy_TD = np.zeros_like(x_TD)
    dy_TD[0] = 1
    dx_TD, _ = moe_backward(dy_TD, moe_forward(x_TD, params, CONFIG)[1])
    assert (np.abs(dx_TD) > 1e-9).all(), "a gradient of the first output misses a later token"


def test_a_uniform_router_gives_every_token_the_mean(rng: np.random.Generator) -> None:
    params = random_params(CONFIG, rng) | {"router.scale": np.zeros(1)}
    output, _ = moe_forward(rng.standard_normal((7, CONFIG.d_model)), params, CONFIG)
    np.testing.assert_allclose(output.y, np.broadcast_to(output.y[:1], output.y.shape), rtol=1e-12)
    np.testing.assert_allclose(soft_mix(np.zeros((7, 5, 2)), token_info(7)).dispatch, 1 / 7)


def test_the_second_seam_alone_and_replays(rng: np.random.Generator) -> None:
    params, arguments = random_params(CONFIG, rng), random_tokens(CONFIG, rng, 11, groups=2, pads=2)
    x_TD = arguments.pop("x_TD")
    output, _ = moe_forward(x_TD, params, CONFIG, training=True, **arguments)
    routing = route(x_TD, params, CONFIG, training=True, **arguments)
    np.testing.assert_array_equal(numpy_apply_experts(x_TD, routing, params, CONFIG), output.y)
    again = moe_forward(x_TD, params, CONFIG, training=True, replay=routing, **arguments)[0]
    np.testing.assert_array_equal(again.y, output.y)
    tensors = params_from_numpy(params)
    for found in (routing_from_numpy(routing), routing_from_numpy(routing_to_numpy(routing_from_numpy(routing)))):
        y_TD = apply_experts(torch.from_numpy(x_TD), found, tensors, CONFIG, backend="torch")
        np.testing.assert_allclose(y_TD.numpy(), output.y, rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match=r"is 'soft', but routing\.mix is None"):
        numpy_apply_experts(x_TD, replace(routing, mix=None), params, CONFIG)
    with pytest.raises(ValueError, match=r"is 'soft', but routing\.mix is None"):
        apply_experts(torch.from_numpy(x_TD), routing_from_numpy(routing)._replace(mix=None), tensors, CONFIG)
    with pytest.raises(ValueError, match=r"replay\.expert has shape"):
        moe_forward(x_TD[:5], params, CONFIG, replay=routing)


@pytest.mark.parametrize("backend", ["auto", "torch", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_track_computes_slots_like_tokens(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = replace(presets.tiny("soft-moe-s16-128"), gating=GatingConfig(choice="soft", slots=2))
    wanted = ReferenceMoE(config, dtype=dtype)
    moe = MoE(config, backend=backend, dtype=dtype)
    moe.load_state_dict(wanted.state_dict())
    truth = copy.deepcopy(wanted).double()
    x, pad = torch.randn(3, 9, config.d_model, dtype=dtype), torch.rand(3, 9) < 0.3
    results = []
    for layer in (moe, wanted, truth):
        given_x = x.to(next(layer.parameters()).dtype).requires_grad_()
        y, aux = layer(given_x, pad_mask=pad)
        gradients = torch.autograd.grad((y * torch.linspace(1, 2, y.numel()).view_as(y)).sum() + aux.loss, [given_x, *layer.parameters()])
        results.append([y, *gradients])
    for found, eager, true in zip(*results, strict=True):
        scale = true.square().mean().sqrt()
        limit = 2 * (eager - true).abs().max() + 4 * torch.finfo(dtype).eps * scale
        assert (found - true).abs().max() <= limit


def test_a_model_of_them_says_that_it_is_not_causal_by_its_numbers() -> None:
    from reference.autograd.transformer import LanguageModel

    torch.manual_seed(0)
    model = LanguageModel(presets.model("soft-moe-s16-128", tiny=True)).eval()
    tokens = torch.randint(0, 256, (1, 8))
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 256
    with torch.no_grad():
        assert (model(tokens)[0] - model(changed)[0])[0, 0].abs().max() > 0


BAD = {
    "gating.slots is 0": lambda: GatingConfig(choice="soft"),
    "only 'soft' has slots": lambda: GatingConfig(slots=2),
    "scores.function must be 'softmax'; it is 'sigmoid'": lambda: replace(CONFIG, scores=ScoresConfig("sigmoid")),
    "gating.top_k must be 1; it is 2": lambda: replace(CONFIG, gating=replace(CONFIG.gating, top_k=2)),
    "gating.normalize must be 'none'; it is 'sum'": lambda: replace(CONFIG, gating=replace(CONFIG.gating, normalize="sum")),
    "capacity.formula must be 'none'": lambda: replace(CONFIG, capacity=CapacityConfig("per_token")),
    "experts.shared must be 0; it is 1": lambda: replace(CONFIG, experts=replace(CONFIG.experts, shared=1)),
    "experts.gate_inputs must be False; it is True": lambda: replace(CONFIG, experts=replace(CONFIG.experts, gate_inputs=True)),
}


@pytest.mark.parametrize("message", BAD)
def test_what_it_has_not_is_refused(message: str) -> None:
    with pytest.raises(ValueError) as caught:
        BAD[message]()
    assert message in str(caught.value)


def test_parameters_start_like_the_paper_says(rng: np.random.Generator) -> None:
    params = init_params(CONFIG, rng)
    assert params["router.weight"].shape == (5, 2, 6) and params["router.scale"].tolist() == [1.0]
