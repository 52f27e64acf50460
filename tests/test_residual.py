"""Routers that read the logits of the layer before: numbers by hand, chains of layers in both tracks, and models that thread them."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from configs import CONFIGS, random_params, random_tokens
from language_models import model_config, random_bytes, random_model
from torch.autograd import grad

from optimized import MoE as FastMoE
from reference import (
    ExpertsConfig,
    GatingConfig,
    ModelConfig,
    MoEConfig,
    ScoresConfig,
    chained_backward,
    cost,
    init_params,
    moe_forward,
    presets,
    route,
)
from reference.architectures import run
from reference.autograd import MoE, params_from_numpy
from reference.autograd import route as torch_route
from reference.autograd.layer import route_forward
from reference.autograd.tokens import token_info
from reference.autograd.transformer import KVCache, LanguageModel, cross_entropy

CONFIG = CONFIGS["residual"]
PLAIN = replace(CONFIG, scores=replace(CONFIG.scores, residual=False))
X_TD, PREVIOUS_TE = (np.random.default_rng(8).standard_normal(shape) for shape in ((23, 6), (23, 5)))
MODEL = model_config("residual", layers=4)


def model(config: ModelConfig = MODEL) -> LanguageModel:
    """A model none of whose matrices starts at 0."""
    drawn = random_model(config)
    with torch.no_grad():
        for name, weight in drawn.named_parameters():
            if name.endswith("residual_weight"):
                weight.normal_(std=0.5)
    return drawn


def without(params: dict) -> dict:
    return {name: array for name, array in params.items() if name != "router.residual_weight"}


def test_two_layers_by_hand() -> None:
    """Both routers send token e_0 by their rows alone to expert 0; what the first thought of expert 1 sends it to expert 2."""
    config = MoEConfig(2, ScoresConfig("identity", residual=True), GatingConfig(top_k=1, normalize="softmax"), experts=ExpertsConfig(3, 2))
    params = init_params(config, np.random.default_rng(0)) | {"router.weight": np.array([[2.0, 0.0], [1.5, 0.0], [1.0, 0.0]])}
    params["router.residual_weight"] = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-0.25, 2.0, 0.0]])
    first = route(np.eye(2)[:1], params, config)
    second = route(np.eye(2)[:1], params, config, previous_logits=first.logits)
    third = route(np.eye(2)[:1], params, config, previous_logits=second.logits)
    assert (first.logits.tolist(), first.expert.item()) == ([[2.0, 1.5, 1.0]], 0)
    assert (second.logits.tolist(), second.expert.item()) == ([[2.0, 1.5, 3.5]], 2)
    assert third.logits.tolist() == second.logits.tolist(), "V reads experts 0 and 1 alone, whose logits did not change"


def test_a_fresh_layer_is_the_one_without_residual(rng: np.random.Generator) -> None:
    params, given = init_params(CONFIG, rng), random_tokens(CONFIG, rng, 40, groups=3, pads=4)
    assert not params["router.residual_weight"].any()
    output = moe_forward(params=params, config=CONFIG, training=True, **given)[0]
    plain = moe_forward(params=without(params), config=PLAIN, training=True, **{k: v for k, v in given.items() if k != "previous_logits"})[
        0
    ]
    assert np.array_equal(output.y, plain.y) and output.losses == plain.losses


def test_without_logits_before_the_term_is_absent(rng: np.random.Generator) -> None:
    params, given = random_params(CONFIG, rng), random_tokens(CONFIG, rng, 40)
    previous = given.pop("previous_logits")
    first, cache = moe_forward(params=params, config=CONFIG, **given)
    assert np.array_equal(first.y, moe_forward(params=without(params), config=PLAIN, **given)[0].y)
    _, dprevious, dparams = chained_backward(np.ones_like(first.y), cache)
    assert dprevious is None and not dparams["router.residual_weight"].any()
    moved = moe_forward(params=params, config=CONFIG, previous_logits=previous, **given)[0]
    assert (moved.routing.expert != first.routing.expert).mean() > 0.1


@pytest.mark.parametrize("moe_class", [MoE, FastMoE])
def test_a_chain_of_three_layers_has_the_gradients_of_autograd(moe_class: type, rng: np.random.Generator) -> None:
    """x goes through three layers with a residual stream, the logits from router to router: the hand backward goes both ways back."""
    layers = [random_params(CONFIG, rng, np.float64) for _ in range(3)]
    x_TD, dy_TD = rng.standard_normal((2, 30, CONFIG.d_model))
    hidden_TD, previous, caches = x_TD, None, []
    for params in layers:
        output, cache = moe_forward(hidden_TD, params, CONFIG, training=True, previous_logits=previous)
        hidden_TD, previous = hidden_TD + output.y, output.routing.logits
        caches.append(cache)
    dhidden_TD, dlogits, derived = dy_TD, None, []
    for cache in reversed(caches):
        dx_TD, dlogits, dparams = chained_backward(dhidden_TD, cache, 1.0, dlogits)
        dhidden_TD = dhidden_TD + dx_TD
        derived.insert(0, dparams)
    assert dlogits is None, "the first layer was given nothing"

    modules = [moe_class(CONFIG, dtype=torch.float64) for _ in layers]
    x = torch.tensor(x_TD, requires_grad=True)
    stream, logits, loss = x, None, torch.zeros(())
    for moe, params in zip(modules, layers, strict=True):
        moe.load_state_dict(params_from_numpy(params))
        y, aux = moe(stream, previous_logits=logits)
        stream, logits, loss = stream + y, aux.routing.logits, loss + aux.loss
    ((stream * torch.tensor(dy_TD)).sum() + loss).backward()
    np.testing.assert_allclose(stream.detach(), hidden_TD, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(x.grad, dhidden_TD, rtol=1e-10, atol=1e-11)
    for number, (moe, dparams) in enumerate(zip(modules, derived, strict=True)):
        for name, parameter in moe.named_parameters():
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            np.testing.assert_allclose(found, dparams[name], rtol=1e-10, atol=1e-11, err_msg=f"layer {number}, {name}")
    assert derived[1]["router.residual_weight"].any() and not derived[0]["router.residual_weight"].any()


def test_a_replay_reads_the_new_logits(rng: np.random.Generator) -> None:
    params, given = random_params(CONFIG, rng), random_tokens(CONFIG, rng, 20)
    old = moe_forward(params=params, config=CONFIG, **given)[0].routing
    given["previous_logits"] = given["previous_logits"] + 1.0 + rng.standard_normal(given["previous_logits"].shape)
    new = moe_forward(params=params, config=CONFIG, replay=old, **given)[0].routing
    assert np.array_equal(new.expert, old.expert) and np.abs(new.gate - old.gate).max() > 1e-3


def test_the_recipe_reads_the_logits_before(rng: np.random.Generator) -> None:
    config = presets.tiny("moe-plus-plus-7b")
    x_TD, params, previous = rng.standard_normal((40, 16)), random_params(config, rng), rng.standard_normal((40, 8))
    truth = moe_forward(x_TD, params, config, training=True, previous_logits=previous)[0].y
    writings = (run("moe-plus-plus-7b", x_TD, params, config, previous_logits=given)[0] for given in (previous, -previous, None))
    found, other, absent = writings
    np.testing.assert_allclose(found, truth, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(absent, moe_forward(x_TD, params, config, training=True)[0].y, rtol=1e-12, atol=1e-13)
    assert np.abs(other - truth).max() > 0.1


def test_the_router_s_kernel_reads_them_too(rng: np.random.Generator) -> None:
    triton_backend = pytest.importorskip("optimized.triton_backend")
    if not triton_backend.HAS_TRITON or not triton_backend._interprets():
        pytest.skip("Triton's interpreter is not on")
    open_ended = replace(CONFIG, capacity=replace(CONFIG.capacity, formula="none"))
    assert triton_backend.why_not_route(open_ended) is None
    tensors = params_from_numpy(random_params(open_ended, rng), dtype=torch.float32)
    results = []
    for function in (triton_backend.route, route_forward):
        leaves = [torch.tensor(a, dtype=torch.float32, requires_grad=True) for a in (X_TD, PREVIOUS_TE)]
        weight = tensors["router.residual_weight"].clone().requires_grad_()
        tokens = token_info(leaves[0].shape[:1], previous_logits=leaves[1])
        routing, _ = function(leaves[0], tensors | {"router.residual_weight": weight}, open_ended, tokens)
        gradients = grad(routing.gate.square().sum(), [*leaves, weight])
        results.append((routing.expert, routing.logits, routing.gate, *gradients))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# --- models ---


def test_only_later_layers_have_the_matrix() -> None:
    built = LanguageModel(MODEL)
    assert list(built.moe_layers()) == [1, 2, 3]
    assert [n for n in built.state_dict() if "residual" in n] == [f"layers.{layer}.mlp.router.residual_weight" for layer in (2, 3)]
    full = presets.model("moe-plus-plus-7b")
    assert cost.model_parameters(full)["router"].total == 24 * 20 * 1536 + 23 * 20 * 20


def test_the_model_is_its_layers_with_the_logits_handed_on() -> None:
    net, tokens, seen = model().train(), random_bytes(2, 9), []
    for moe in net.moe_layers().values():
        moe.register_forward_hook(lambda moe, _, given, out: seen.append((given.get("previous_logits"), out[1])), with_kwargs=True)
    logits, _ = net(tokens)
    assert [given is None for given, _ in seen] == [True, False, False]
    for (given, _), (_, before) in zip(seen[1:], seen, strict=False):
        assert given is before.routing.logits
    assert (random_model(MODEL).train()(tokens)[0] - logits).abs().max() > 1e-3, "a matrix of zeros gives another model"


def test_activation_checkpointing_changes_no_bit() -> None:
    net, tokens, results = model().train(), random_bytes(3, 8), []
    for net.activation_checkpointing in (False, True):
        net.zero_grad()
        logits, aux = net(tokens)
        (cross_entropy(logits, tokens) + aux.loss).backward()
        results.append((logits, aux.loss, *(parameter.grad.clone() for parameter in net.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_cache_continues_the_pass() -> None:
    roomy = replace(MODEL, moe=replace(CONFIG, capacity=replace(CONFIG.capacity, formula="none")))
    net, tokens, cache = model(roomy).eval(), random_bytes(2, 12), KVCache()
    parts = [net(part, cache=cache)[0] for part in tokens.split([5, 1, 1, 4, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), net(tokens)[0], rtol=1e-10, atol=1e-11)


def test_accumulated_gradients_are_those_of_the_batch() -> None:
    plain = replace(MODEL, moe=replace(CONFIG, balance=replace(CONFIG.balance, losses=())))
    net, tokens, results = model(plain).train(), random_bytes(4, 8), []
    for parts in (1, 2):
        net.zero_grad()
        for part in tokens.chunk(parts):
            (cross_entropy(net(part)[0], part) / parts).backward()
        results.append([parameter.grad.clone() for parameter in net.parameters()])
    for whole, summed in zip(*results, strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-9, atol=1e-11)


# --- refusals ---

BAD = {
    "not asked for": (PLAIN, (7, 5), "previous_logits are given, but scores.residual is False"),
    "other experts": (CONFIG, (7, 4), "previous_logits has shape (7, 4); this layer needs (7, 5)"),
    "other tokens": (CONFIG, (6, 5), "previous_logits has shape (6, 5); this layer needs (7, 5)"),
    "one token's": (CONFIG, (5,), "previous_logits has shape (5,); this layer needs (7, 5)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_logits_are_refused(case: str, rng: np.random.Generator) -> None:
    config, shape, message = BAD[case]
    params, x_TD, previous = init_params(config, rng), rng.standard_normal((7, 6)), np.zeros(shape)
    tensors, x = params_from_numpy(params), torch.tensor(x_TD)
    for call in (
        lambda: moe_forward(x_TD, params, config, previous_logits=previous),
        lambda: route(x_TD, params, config, previous_logits=previous),
        lambda: torch_route(x, tensors, config, previous_logits=torch.tensor(previous)),
        lambda: MoE(config, dtype=torch.float64)(x, previous_logits=torch.tensor(previous)),
        lambda: FastMoE(config, dtype=torch.float64)(x, previous_logits=torch.tensor(previous)),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_logits_that_are_none_are_refused(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    params, x_TD, previous = init_params(CONFIG, rng), rng.standard_normal((7, 6)), np.zeros((7, 5))
    previous[3, 1] = np.nan
    monkeypatch.setenv("MOEBIUS_CHECK", "1")
    moe = MoE(CONFIG, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"previous_logits holds NaN or infinity, in tokens \[3\]"):
        moe_forward(x_TD, params, CONFIG, previous_logits=previous)
    with pytest.raises(ValueError, match=r"previous_logits holds NaN or infinity, in tokens \[3\]"):
        moe(torch.tensor(x_TD), previous_logits=torch.tensor(previous))
    with pytest.raises(ValueError, match="previous_logits must be a float array, got int64"):
        moe_forward(x_TD, params, CONFIG, previous_logits=np.zeros((7, 5), np.int64))
    with pytest.raises(ValueError, match=r"previous_logits must be a float tensor, got torch\.int64"):
        moe(torch.tensor(x_TD), previous_logits=torch.zeros(7, 5, dtype=torch.int64))


def test_cotangents_of_another_shape_are_refused(rng: np.random.Generator) -> None:
    output, cache = moe_forward(params=init_params(CONFIG, rng), config=CONFIG, **random_tokens(CONFIG, rng, 7))
    with pytest.raises(ValueError, match=re.escape("dlogits has shape (7, 4); the logits have (7, 5)")):
        chained_backward(output.y, cache, 1.0, np.zeros((7, 4)))


def test_tokens_that_are_mixed_have_no_residual() -> None:
    with pytest.raises(ValueError, match=r"gating\.choice is 'soft', for which scores\.residual must be False; it is True"):
        MoEConfig(4, ScoresConfig(residual=True), GatingConfig(choice="soft", slots=1))
