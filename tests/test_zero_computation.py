"""Experts that are no networks: numbers by hand, what routing owes them, and every backend beside which they answer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from configs import CONFIGS, random_params, random_tokens

from optimized import MoE, backends
from optimized.layer import apply_experts as fast_apply_experts
from optimized.proofs import experts_outputs
from optimized.yardstick import farthest
from reference import BalanceConfig, CapacityConfig, ExpertsConfig, GatingConfig, MoEConfig, ScoresConfig, init_params, moe_forward, presets
from reference.autograd import MoE as ReferenceMoE
from reference.autograd import apply_experts as eager_apply_experts
from reference.balancing import LossInputs, heterogeneous_balance_forward
from reference.capacity import expert_capacity
from reference.layer import update_bias
from reference.proof.cases import draw, get
from reference.proof.equal import round_to
from reference.proof.parity import assert_experts_equal, experts_truth
from reference.tokens import token_info
from reference.zero_computation import KINDS, members, networks_per_token

ALL_KINDS = (("zero", 1), ("copy", 1), ("constant", 2))
MIXED = CONFIGS["moe++"]


def layer(top_k: int = 1, **experts) -> MoEConfig:
    return MoEConfig(4, ScoresConfig("identity"), GatingConfig(top_k=top_k, normalize="softmax"), experts=ExpertsConfig(**experts))


def test_answers_by_hand() -> None:
    """Router rows that send token e_i to expert i + 1; with K = 1 and normalized gates y is the expert's answer."""
    config = layer(count=5, width=2, zero_computation=ALL_KINDS)
    params = init_params(config, np.random.default_rng(0))
    params["router.weight"] = np.concatenate([np.zeros((1, 4)), 9 * np.eye(4)])
    params["experts.constant"] = np.array([[1.0, 2.0, 3.0, 4.0], [-2.0, 0.0, 0.0, 0.0]])
    params["experts.constant_gate"] = np.zeros((2, 2, 4))
    params["experts.constant_gate"][1, 1, 3] = np.log(3.0)  # the last token is a quarter itself and three quarters the vector
    output, _ = moe_forward(np.eye(4), params, config)
    assert output.routing.expert[:, 0].tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(output.y, [[0, 0, 0, 0], [0, 1, 0, 0], [0.5, 1, 2, 2], [-1.5, 0, 0, 0.25]], atol=1e-15)


def test_kinds_follow_the_networks_in_the_order_of_the_field() -> None:
    config = ExpertsConfig(count=9, zero_computation=(("constant", 2), ("zero", 3)))
    assert config.networks == 4
    assert members(config) == [("constant", 0), ("constant", 1), ("zero", 0), ("zero", 1), ("zero", 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_that_nobody_chooses_changes_nothing(kind: str, rng: np.random.Generator) -> None:
    plain = layer(2, count=4, width=3)
    more = replace(plain, experts=replace(plain.experts, count=5, zero_computation=((kind, 1),)))
    x_TD, params = np.abs(rng.standard_normal((11, 4))), init_params(more, rng)
    params["router.weight"][4] = -9
    assert np.array_equal(moe_forward(x_TD, params, more)[0].y, moe_forward(x_TD, params | {"router.weight": params["router.weight"][:4]}, plain)[0].y)  # fmt: skip  # noqa: E501


def test_a_zero_expert_makes_top_2_a_top_1_and_a_copy_is_a_residual(rng: np.random.Generator) -> None:
    config = MoEConfig(4, gating=GatingConfig(top_k=2), experts=ExpertsConfig(3, 5, zero_computation=(("zero", 1), ("copy", 1))))
    x_TD, params = rng.standard_normal((40, 4)), init_params(config, rng)
    output, _ = moe_forward(x_TD, params, config)
    gate_TE = np.zeros((40, 3))
    np.put_along_axis(gate_TE, output.routing.expert, output.routing.gate, axis=1)
    network = layer(count=1, width=5)
    alone = moe_forward(x_TD, {"router.weight": np.zeros((1, 4)), **{k: v for k, v in params.items() if "proj" in k}}, network)[0].y
    np.testing.assert_allclose(output.y, gate_TE[:, :1] * alone + gate_TE[:, 2:] * x_TD, rtol=1e-12, atol=1e-14)
    assert (gate_TE > 0).sum(0).min() > 5, "every expert was chosen"


# --- routing ---


def loss_at(share: float, networks: int, others: int, count_E: np.ndarray, probability_E: np.ndarray) -> float:
    """The loss of tokens that choose expert e count_E[e] times and all have the scores probability_E."""
    expert_TK = np.repeat(np.arange(networks + others), count_E)[:, None]
    probability_TE = np.tile(probability_E, (len(expert_TK), 1))
    seen = (probability_TE, probability_TE, probability_TE, expert_TK, np.ones(expert_TK.shape, bool), token_info(len(expert_TK)))
    return float(heterogeneous_balance_forward(LossInputs(*seen, networks=networks, network_share=share))[0])


@pytest.mark.parametrize("share", [0.25, 0.75, 1.0, 2.0])
def test_the_loss_is_1_at_its_own_balance_and_larger_for_a_collapsed_router(share: float) -> None:
    count_E = np.array([round(100 * share)] * 4 + [100] * 3)
    assert loss_at(share, 4, 3, count_E, count_E / count_E.sum()) == pytest.approx(1, rel=1e-12)
    for favourite in (0, 5):
        collapsed = np.where(np.arange(7) == favourite, 100, 0)
        assert loss_at(share, 4, 3, collapsed, collapsed / 100) > 2


def test_with_share_1_the_loss_is_that_of_deepseek_moe(rng: np.random.Generator) -> None:
    losses = (("heterogeneous_balance", 1.0), ("expert_balance", 1.0))
    config = replace(MIXED, experts=replace(MIXED.experts, network_share=1.0), balance=BalanceConfig(losses))
    found = moe_forward(params=random_params(config, rng), config=config, training=True, **random_tokens(config, rng, 40, pads=3))[0].losses
    assert found["heterogeneous_balance"] == pytest.approx(found["expert_balance"], rel=1e-12)


def test_capacities_by_hand() -> None:
    """MoE++ 0.6B with τ = ½ on 64 tokens: 8 networks and 4 others share 1.5 · 2 · 64 slots as 8 · ½ + 4."""
    experts = ExpertsConfig(12, zero_computation=ALL_KINDS, network_share=0.5)
    config = MoEConfig(4, gating=GatingConfig(top_k=2), capacity=CapacityConfig("per_assignment", factor=1.5), experts=experts)
    assert expert_capacity(config, token_info(64), training=True).tolist() == [[12] * 8 + [24] * 4]
    even = replace(config, experts=replace(experts, network_share=1.0))
    assert expert_capacity(even, token_info(64), training=True).tolist() == [16]
    assert expert_capacity(config, token_info(0), training=True).shape == (0, 12)


def test_drops_follow_each_experts_own_capacity(rng: np.random.Generator) -> None:
    config = replace(MIXED, experts=replace(MIXED.experts, network_share=0.25))
    params, given = random_params(config, rng), random_tokens(config, rng, 200)
    routing = moe_forward(params=params, config=config, training=True, **given)[0].routing
    kept_E = np.bincount(routing.expert[routing.keep], minlength=8)
    room_E = expert_capacity(config, token_info(200), training=True)[0]
    np.testing.assert_array_equal(kept_E, np.minimum(routing.load, room_E))
    assert (kept_E < routing.load)[:4].any(), "a network drops"


def test_the_bias_moves_for_networks_only_and_holds_their_number() -> None:
    config = replace(CONFIGS["longcat"], balance=BalanceConfig(bias_rule="proportional", bias_rate=0.5))
    bias = np.arange(7, dtype=np.float32)
    moved = update_bias(bias, np.array([10, 0, 0, 0, 10, 0, 0]), config) - bias
    np.testing.assert_allclose(moved, [0.5 * (1 / 7 - 1 / 2), 0.5 / 7, 0.5 / 7, 0.5 / 7, 0, 0, 0], atol=1e-6)
    moe = ReferenceMoE(config)
    moe.get_buffer("router.correction_bias").copy_(torch.from_numpy(bias))
    moe.update_bias(torch.tensor([10, 0, 0, 0, 10, 0, 0]))
    np.testing.assert_array_equal(moe.get_buffer("router.correction_bias").numpy(), bias + moved)
    assert networks_per_token(presets.get("longcat-flash")) == pytest.approx(8)


def test_the_bias_brings_the_number_of_networks_to_its_goal(rng: np.random.Generator) -> None:
    config = MoEConfig(
        8,
        gating=GatingConfig(top_k=3, correction_bias=True),
        experts=ExpertsConfig(9, 2, zero_computation=(("copy", 3),)),
        balance=BalanceConfig(bias_rule="proportional", bias_rate=0.2),
    )
    x_TD, params = rng.standard_normal((400, 8)) + 1, init_params(config, rng)
    mean = [0.0, 0.0]
    for end in (0, 1):
        for _ in range(200 * end):
            load_E = moe_forward(x_TD, params, config)[0].routing.load
            params["router.correction_bias"] = update_bias(params["router.correction_bias"], load_E, config)
        mean[end] = moe_forward(x_TD, params, config)[0].routing.load[:6].sum() / 400
    assert abs(mean[0] - 2) > 0.2 and abs(mean[1] - networks_per_token(config)) < 0.02


# --- backends ---


NAMES = ("few-tokens", "drops", "prime-experts", "one-takes-all", "swiglu-bias")
QUICK = [(backend, name) for backend in ("auto", "torch", "native") for name in NAMES] + [("triton", "few-tokens")]
SLOW = [pytest.param("triton", name, marks=pytest.mark.slow) for name in NAMES[1:]]  # interpreted


def test_every_backend_is_tried() -> None:
    assert {backend for backend, _ in QUICK} == {"auto", *backends.names()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend, name", [*QUICK, *SLOW])
def test_every_backend_computes_them(backend: str, name: str, dtype: str) -> None:
    if backend != "auto" and (reason := backends.why_not(backend, torch.device("cpu"), getattr(torch, dtype), get(name).config())):
        pytest.skip(reason)
    case = get(name)
    kinds = (("copy", 1), ("constant", 1), ("zero", 1))
    config = replace(case.config(), experts=replace(case.config().experts, zero_computation=kinds))
    inputs = draw(case, config).rounded(partial(round_to, dtype=dtype))
    own = partial(fast_apply_experts, backend=backend)
    eager = farthest(lambda turned, _: experts_outputs(eager_apply_experts, turned, dtype), inputs, experts_truth(inputs))
    assert_experts_equal(inputs, experts_outputs(own, inputs, dtype), eager, dtype)


def test_the_fast_layer_compiles_them_into_no_graph_break() -> None:
    moe = MoE(CONFIGS["longcat"], backend="torch").eval()
    x = torch.randn(2, 9, 6)
    compiled = torch.compile(moe.apply_experts, fullgraph=True, backend="eager", dynamic=True)
    routing = moe(x)[1].routing
    torch.testing.assert_close(compiled(x.flatten(0, 1), routing), moe.apply_experts(x.flatten(0, 1), routing))


BAD = {
    "unknown kind": (dict(zero_computation=(("empty", 1),)), "experts.zero_computation is 'empty'; known: zero, copy, constant"),
    "none of a kind": (dict(zero_computation=(("copy", 0),)), r"zero_computation is \(\('copy', 0\),\); each kind needs at least 1"),
    "a kind twice": (dict(zero_computation=(("copy", 1), ("copy", 2))), "names a kind twice"),
    "no network left": (dict(zero_computation=(("copy", 8),)), "leaves no network of experts.count = 8"),
    "gates on inputs": (dict(zero_computation=(("copy", 1),), gate_inputs=True), "gate_inputs is True, but experts.zero_computation is"),
    "no share": (dict(zero_computation=(("copy", 1),), network_share=0.0), "experts.network_share is 0.0; it must be a finite number > 0"),
    "share with nobody": (dict(network_share=0.5), "network_share is 0.5, but experts.zero_computation is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_config_is_refused(name: str) -> None:
    fields, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        MoEConfig(4, experts=ExpertsConfig(**fields))


@pytest.mark.parametrize(
    "parts",
    [
        dict(gating=GatingConfig(choice="expert_choice")),
        dict(capacity=CapacityConfig("per_token", recycle="random")),
        dict(gating=GatingConfig(correction_bias=True), balance=BalanceConfig(bias_rule="sign")),
    ],
)
def test_a_share_is_refused_where_all_experts_count_alike(parts: dict) -> None:
    with pytest.raises(ValueError, match=r"experts\.network_share is 0\.5, for choice 'top_k' without recycling and bias rule, but"):
        MoEConfig(4, experts=ExpertsConfig(zero_computation=(("copy", 2),), network_share=0.5), **parts)
