"""The PyTorch reference against the NumPy one, every number and gradient in fp64; then what only a module can get wrong."""

from __future__ import annotations

import copy
from functools import partial

import configs
import numpy as np
import pytest
import torch
from configs import random_params
from conftest import REPOSITORY
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tracer import traced

import reference
from reference import balancing, capacity, choices, experts, gating, noise, scores, shared, zero_computation
from reference.autograd import MoE, Routing, apply_experts, params_from_numpy, params_to_numpy, route, routing_from_numpy, routing_to_numpy
from reference.autograd import balancing as torch_balancing
from reference.autograd import capacity as torch_capacity
from reference.autograd import choices as torch_choices
from reference.autograd import experts as torch_experts
from reference.autograd import gating as torch_gating
from reference.autograd import noise as torch_noise
from reference.autograd import scores as torch_scores
from reference.autograd import zero_computation as torch_zero_computation
from reference.autograd.conversion import ARRAYS, array_of
from reference.autograd.tokens import Draws, token_info
from reference.config import BalanceConfig, CapacityConfig, ExpertsConfig, GatingConfig, MoEConfig, ScoresConfig
from reference.proof.cases import CASES, Case, draw
from reference.proof.equal import round_to
from reference.proof.parity import assert_experts_equal
from reference.tokens import Draws as NumpyDraws

RELATIVE = 1e-11
D = 6
TABLES = {
    "scores.function": (scores.SCORE_FUNCTIONS, torch_scores.SCORE_FUNCTIONS),
    "scores.noise": (scores.INPUT_NOISE, torch_scores.INPUT_NOISE),
    "scores.input_norm": (scores.INPUT_NORMS, torch_scores.INPUT_NORMS),
    "scores.logit_noise": (noise.LOGIT_NOISE, torch_noise.LOGIT_NOISE),
    "gating.choice": (choices.CHOICES, torch_choices.CHOICES),
    "gating.group_score": (gating.GROUP_SCORES, torch_gating.GROUP_SCORES),
    "gating.normalize": (gating.NORMALIZERS, torch_gating.NORMALIZERS),
    "gating.second_choice": (gating.SECOND_CHOICES, torch_gating.SECOND_CHOICES),
    "capacity.formula": (capacity.FORMULAS, capacity.FORMULAS),
    "capacity.order": (capacity.ORDERS, torch_capacity.ORDERS),
    "capacity.recycle": (capacity.RECYCLES, capacity.RECYCLES),
    "experts.activation": (experts.ACTIVATIONS, torch_experts.ACTIVATIONS),
    "experts.shared_gate": (shared.SHARED_GATES, torch_experts.SHARED_GATES),
    "balance.bias_rule": (balancing.BIAS_RULES, torch_balancing.BIAS_RULES),
}


def mixed_config(number: int) -> MoEConfig:
    """Every score function with every normalizer; all other fields turn at rates of their own, so that pairs of them meet."""

    def turn(values, every: int = 1):
        values = list(values)
        return values[number // every % len(values)]

    normalize, function = turn(gating.NORMALIZERS), turn(scores.SCORE_FUNCTIONS, 3)
    second = turn(gating.SECOND_CHOICES, 2)
    top_k = 2 if second == "random" else turn([3, 2] if normalize != "none" else [1, 3, 2], 5)
    groups, top_groups = turn([(1, 1), (4, 2), (2, 1), (4, 3)])
    correction = turn([True, False], 3)
    always, shared_width = turn([(0, None), (1, None), (2, 7)], 2)
    return MoEConfig(
        D,
        scores=ScoresConfig(
            function, bias=turn([False, True]), noise=turn(scores.INPUT_NOISE, 5), noise_scale=0.1, input_norm=turn(scores.INPUT_NORMS, 7),
            softcap=turn([0.0, 1.5, 0.0]), logit_noise=turn(["none", "none", "learned"], 4),
        ),
        gating=GatingConfig(
            top_k=top_k, correction_bias=correction, groups=groups, top_groups=top_groups, group_score=turn(gating.GROUP_SCORES, 4),
            normalize=normalize, eps=1e-3 if function == "relu" else turn([0.0, 1e-3]), scale=turn([1.0, 2.5], 2), second_choice=second,
            after_drop=turn([False, True], 2), expert_scale=turn([False, True, False], 2), choice=turn(["top_k", "top_k", "gumbel"], 2)
            if not correction else "top_k",
        ),
        capacity=CapacityConfig(turn(capacity.FORMULAS, 2), factor=0.8, eval_factor=turn([None, 0.5]), minimum=turn([0, 1], 3),
                                order=turn(capacity.ORDERS)),
        experts=ExpertsConfig(8, 5, turn(experts.ACTIVATIONS, 2), bias=turn([False, True], 3), shared=always, shared_width=shared_width),
        balance=BalanceConfig(
            [(name, 0.3 + 0.1 * i) for i, name in enumerate(balancing.LOSSES)], turn(balancing.BIAS_RULES) if correction else "none", 0.001
        ),
    )  # fmt: skip


CONFIGS = {**configs.CONFIGS, **{f"mixed-{number}": mixed_config(number) for number in range(36)}}


def draws_something(config: MoEConfig) -> bool:
    rules = (config.scores.noise, config.scores.logit_noise, config.gating.choice, config.gating.second_choice)
    drawn = not {"jitter", "learned", "gumbel", "random"}.isdisjoint((*rules, config.capacity.order, config.capacity.recycle))
    return drawn or config.experts.dropout > 0


def plain_config(**parts) -> MoEConfig:
    """A small layer with all losses, for tests of one thing."""
    losses = [(name, 0.5) for name in balancing.LOSSES]
    return MoEConfig(D, **{"gating": GatingConfig(top_k=2), "experts": ExpertsConfig(5, 4), "balance": BalanceConfig(losses), **parts})


def loaded(config: MoEConfig, params: dict[str, np.ndarray], dtype: torch.dtype = torch.float64) -> MoE:
    moe = MoE(config, dtype=dtype)
    moe.load_state_dict(params_from_numpy(params, dtype=dtype))
    return moe


def drawn_moe(config: MoEConfig, rng: np.random.Generator) -> MoE:
    return loaded(config, random_params(config, rng))


def drawn_x(*shape: int) -> Tensor:
    return torch.randn(*shape, D, dtype=torch.float64, requires_grad=True)


def assert_same(name: str, found: Tensor | None, wanted: np.ndarray | float) -> None:
    """Integers equal; floats to 1e-11 of the largest; what is exactly 0 in the reference exactly 0."""
    assert found is not None, name
    wanted, array = np.asarray(wanted), array_of(found)
    assert array.shape == wanted.shape and array.dtype == wanted.dtype, (name, array.dtype, wanted.dtype, array.shape, wanted.shape)
    limit = RELATIVE * np.abs(wanted).max(initial=0) if wanted.dtype.kind == "f" else 0
    error = np.abs(array.astype(np.float64) - wanted).max(initial=0)
    assert error <= limit, f"{name}: {error:.3g} > {limit:.3g}"


def assert_same_routing(found: Routing, wanted: reference.Routing) -> None:
    for name in ARRAYS:
        assert_same(name, getattr(found, name), getattr(wanted, name))
    assert (found.mix is None) == (wanted.mix is None)
    for name in () if found.mix is None else ("dispatch", "combine", "group"):
        assert_same(name, getattr(found.mix, name), getattr(wanted.mix, name))
    assert found.draws.keys() == wanted.draws.keys()


def grads(moe: MoE) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in moe.named_parameters()}


def facts(rng: np.random.Generator, tokens: int) -> dict[str, np.ndarray]:
    """Four groups, mixed and of different size, with padding in each; one is nothing else. Ids of a vocabulary of 11."""
    group = rng.choice([7, 2, 40, 9], tokens, p=[0.4, 0.2, 0.2, 0.2])
    padding = (rng.random(tokens) < 0.2) | (group == 40)
    return {"group_ids": group, "pad_mask": padding, "token_ids": rng.integers(0, configs.VOCABULARY, tokens)}


@pytest.mark.parametrize("where", TABLES)
def test_tables_have_the_same_rows_and_the_configs_use_them_all(where: str) -> None:
    numpy_table, torch_table = TABLES[where]
    part, field = where.split(".")
    assert set(numpy_table) == set(torch_table) == {getattr(getattr(config, part), field) for config in CONFIGS.values()}


def test_zero_computation_experts_are_the_same_and_all_used() -> None:
    used = {kind for config in CONFIGS.values() for kind, _ in config.experts.zero_computation}
    assert set(zero_computation.KINDS) == set(torch_zero_computation.KINDS) == used


def test_losses_are_the_same_and_all_used() -> None:
    assert (
        set(balancing.LOSSES) == set(torch_balancing.LOSSES) == {name for config in CONFIGS.values() for name, _ in config.balance.losses}
    )


def test_configs_pair_scores_with_normalizers() -> None:
    pairs = {(config.scores.function, config.gating.normalize) for config in CONFIGS.values()}
    assert len(pairs) == len(scores.SCORE_FUNCTIONS) * len(gating.NORMALIZERS)
    assert {True, False} == {
        config.gating.top_groups < config.gating.groups and config.gating.correction_bias for config in CONFIGS.values()
    }


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_gradients_are_the_reference(name: str, training: bool, rng: np.random.Generator) -> None:
    config = CONFIGS[name]
    params, x, dy = random_params(config, rng), *rng.standard_normal((2, 29, config.d_model))
    given = facts(rng, 29)
    if config.scores.residual:
        given["previous_logits"] = rng.standard_normal((29, config.experts.count))
    wanted, cache = reference.moe_forward(x, params, config, training=training, rng=rng, **given)
    dlogits = rng.standard_normal(wanted.routing.logits.shape)
    dx, dprevious, dparams = reference.chained_backward(dy, cache, 0.7, dlogits)

    moe, x_TD = loaded(config, params).train(training), torch.tensor(x, requires_grad=True)
    replay = wanted.routing if wanted.routing.draws else None
    tensors = {key: torch.tensor(array, requires_grad=array.dtype.kind == "f") for key, array in given.items()}
    y, aux = moe(x_TD, **tensors, replay=replay)
    ((y * torch.tensor(dy)).sum() + 0.7 * aux.loss + (aux.routing.logits * torch.tensor(dlogits)).sum()).backward()

    assert_same("y", y, wanted.y)
    assert_same("loss", aux.loss, wanted.loss)
    assert aux.losses.keys() == wanted.losses.keys()
    assert bool(aux.losses) == (training and bool(config.balance.losses))
    for loss, value in wanted.losses.items():
        assert_same(loss, aux.losses[loss], value)
    replayed = reference.moe_forward(x, params, config, training=training, replay=replay, **given)[0].routing if replay else wanted.routing
    assert_same_routing(aux.routing, replayed)
    assert_same("dx", x_TD.grad, dx)
    if dprevious is not None:
        assert_same("dprevious", tensors["previous_logits"].grad, dprevious)
    assert (dprevious is None) == (not config.scores.residual)
    assert grads(moe).keys() == dparams.keys()
    for key, gradient in grads(moe).items():
        if gradient is None and not training and key == "router.noise_weight":  # nothing is drawn, so nothing reads it
            gradient = torch.zeros_like(moe.get_parameter(key))
        assert_same(key, gradient, dparams[key])


class RecordedNumbers:
    """A NumPy generator's `random`, giving back what a PyTorch pass drew."""

    def __init__(self, draws: dict[str, Tensor]) -> None:
        self.left = [array_of(draw) for draw in draws.values()]

    def random(self, shape: tuple[int, ...]) -> np.ndarray:
        assert self.left[0].shape == shape
        return self.left.pop(0)


@pytest.mark.parametrize("name", [name for name in CONFIGS if draws_something(CONFIGS[name])])
def test_own_draws_lead_to_the_reference_s_decisions(name: str, rng: np.random.Generator) -> None:
    config, given, x = CONFIGS[name], facts(rng, 40), rng.standard_normal((40, CONFIGS[name].d_model))
    params, tensors = random_params(config, rng), {key: torch.tensor(array) for key, array in given.items()}
    routing = route(
        torch.tensor(x), params_from_numpy(params), config, training=True, rng=torch.Generator().manual_seed(1), **tensors
    )  # fmt: skip
    assert all(((draw >= 0) & (draw < 1)).all() for draw in routing.draws.values())
    numbers = RecordedNumbers(routing.draws)
    wanted = reference.route(x, params, config, training=True, rng=numbers, **given)
    assert not numbers.left
    assert_same_routing(routing, wanted)
    again = route(torch.tensor(x), params_from_numpy(params), config, training=True, rng=torch.Generator().manual_seed(1), **tensors)
    assert torch.equal(again.gate, routing.gate)


def test_random_second_choice_frees_its_slot_and_follows_the_draw() -> None:
    gate_TK = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
    wanted = torch_gating.random_second(gate_TK, GatingConfig(top_k=2), Draws(None, {"second_choice": np.array([0.3, 0.7, 0.999])}))
    assert wanted.tolist() == [[True, False], [True, True], [True, True]]


def queue_of(track, array, order: str):
    """The order of a track for gates that are the same everywhere and draws that are 1/t."""
    like = np.linspace(1, 0, array.shape[0] * array.shape[1]).reshape(array.shape) % 0.3
    drawn = {"order": 1 / np.arange(1, len(array) + 1)}
    if track is capacity:
        return capacity.queue_order(like, order, NumpyDraws(None, drawn), training=True)
    return torch_capacity.queue_order(torch.tensor(like), order, Draws(None, drawn), training=True)


@pytest.mark.parametrize("order", torch_capacity.ORDERS)
def test_position_counts_wanted_assignments_only(order: str, rng: np.random.Generator) -> None:
    expert, wanted, group = rng.integers(0, 4, (31, 3)), rng.random((31, 3)) < 0.6, rng.integers(0, 3, 31)
    expected = capacity.position_in_expert(expert, wanted, group, queue_of(capacity, expert, order))
    tensors = [torch.tensor(a) for a in (expert, wanted, group)]
    assert_same("position", torch_capacity.position_in_expert(*tensors, queue_of(torch_capacity, tensors[0], order)), expected)


def test_ties_go_to_the_lowest_id() -> None:
    value_TE = torch.tensor([[0.0, 1.0, -0.0, 1.0, 0.0, -torch.inf]]).repeat(3, 20)
    assert np.array_equal(torch_gating.top_k(value_TE, 90), gating.top_k(value_TE.numpy(), 90))


@pytest.mark.parametrize("function", scores.SCORE_FUNCTIONS)
@pytest.mark.parametrize("loss", balancing.LOSSES)
def test_gradients_of_the_losses(loss: str, function: str, rng: np.random.Generator) -> None:
    tokens = token_info(torch.Size([9]), **{name: torch.tensor(array) for name, array in facts(rng, 9).items()})
    expert_TK, normal_TE = torch.tensor(rng.integers(0, 4, (9, 2))), torch.tensor(rng.standard_normal((9, 4)))

    def value(logits_TE: Tensor) -> Tensor:
        scores_TE = torch_scores.SCORE_FUNCTIONS[function].forward(logits_TE)
        probability_TE = torch_scores.SCORE_FUNCTIONS[function].probability_forward(scores_TE)
        picked_TK = tokens.real_T[:, None].expand(9, 2)
        deviation_TE = torch.nn.functional.softplus(0.3 * logits_TE)
        noise = torch_noise.Noisy(logits_TE + normal_TE * deviation_TE, deviation_TE)
        gate_TK = scores_TE.gather(1, expert_TK)
        return torch_balancing.LOSSES[loss](
            torch_balancing.LossInputs(logits_TE, scores_TE, probability_TE, expert_TK, picked_TK, tokens, gate_TK, noise, 2)
        )

    assert torch.autograd.gradcheck(value, torch.randn(9, 4, dtype=torch.float64, requires_grad=True))


def test_leading_indices_are_groups() -> None:
    config = plain_config(capacity=CapacityConfig("per_assignment"))
    moe, x = MoE(config, dtype=torch.float64), drawn_x(2, 3, 7)
    pad_mask = torch.rand(2, 3, 7) < 0.5
    y, aux = moe(x, pad_mask=pad_mask)
    flat, flat_aux = moe(x.flatten(0, 2), group_ids=torch.arange(6).repeat_interleave(7), pad_mask=pad_mask.flatten())
    assert y.shape == x.shape and torch.equal(y.flatten(0, 2), flat) and torch.equal(aux.loss, flat_aux.loss)
    assert torch.equal(aux.routing.keep, flat_aux.routing.keep)
    assert not torch.equal(aux.routing.keep, moe(x.flatten(0, 2), pad_mask=pad_mask.flatten())[1].routing.keep)


def test_the_seams_compose_to_the_layer(rng: np.random.Generator) -> None:
    config = plain_config()
    moe, x = drawn_moe(config, rng).eval(), drawn_x(13)
    routing = route(x, moe.tensors(), config)
    assert torch.equal(apply_experts(x, routing, moe.tensors(), config), moe(x)[0])
    router = {name: tensor for name, tensor in moe.tensors().items() if name.startswith("router.")}
    assert torch.equal(route(x, router, config).gate, routing.gate)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_target_dtype_is_as_good_as_a_dense_layer(case: Case, dtype: str) -> None:
    inputs = draw(case).rounded(partial(round_to, dtype=dtype))
    kind = getattr(torch, dtype)

    def measured(function) -> dict[str, np.ndarray]:
        params = {name: torch.tensor(array, dtype=kind, requires_grad=True) for name, array in inputs.params.items()}
        x_TD = torch.tensor(inputs.x, dtype=kind, requires_grad=True)
        gate_TK = torch.tensor(inputs.routing.gate, dtype=torch.float32, requires_grad=True)
        y_TD = function(x_TD, routing_from_numpy(inputs.routing)._replace(gate=gate_TK), params, inputs.config)
        y_TD.backward(torch.tensor(inputs.dy, dtype=kind))
        leaves = {"y": y_TD, "dx": x_TD.grad, "dgate": gate_TK.grad}
        leaves |= {name: tensor.grad for name, tensor in params.items() if name.startswith("experts.")}
        return {name: np.asarray(array_of(leaf), np.float64) for name, leaf in leaves.items()}

    assert_experts_equal(inputs, measured(apply_experts), measured(dense_layer), dtype)


def dense_layer(x_TD: Tensor, routing: Routing, params: dict[str, Tensor], config: MoEConfig) -> Tensor:
    """Every expert on every token, weighted by a dense matrix of gates."""
    count, keys = config.experts.count, experts.ffn_keys("experts", config.experts)
    weight_TE = routing.gate.new_zeros(len(x_TD), count).scatter_add(1, routing.expert, routing.gate * routing.keep)
    networks = [torch_experts.FFN(*(params[key][e] if key in params else None for key in keys)) for e in range(count)]
    y_TD = sum(weight_TE[:, e, None] * torch_experts.ffn_forward(x_TD, networks[e], config.experts.activation) for e in range(count))
    return y_TD.to(x_TD.dtype)


@pytest.mark.parametrize("inner", [torch.float32, torch.bfloat16], ids=["x-fp32", "x-bf16"])
def test_autocast_lowers_the_experts_and_never_the_router(inner: torch.dtype) -> None:
    config = plain_config(experts=ExpertsConfig(5, 4, shared=1), scores=ScoresConfig("sigmoid", bias=True))
    moe, x = MoE(config), torch.randn(2, 9, D).to(inner)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, aux = moe(x)
    wanted, full = moe(x.float())
    assert y.dtype == inner and torch.equal(aux.routing.logits, full.routing.logits)
    assert torch.equal(aux.routing.gate, full.routing.gate) and torch.equal(aux.loss, full.loss)
    assert not torch.equal(y.float(), wanted) and (y.float() - wanted).norm() < 0.02 * wanted.norm()
    (y.float().sum() + aux.loss).backward()
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in grads(moe).values())


def test_a_half_precision_router_computes_in_fp32() -> None:
    moe, x = MoE(plain_config(), dtype=torch.bfloat16), torch.randn(2, 9, D, dtype=torch.bfloat16)
    y, aux = moe(x)
    assert y.dtype == torch.bfloat16
    logits_TE = x.flatten(0, 1).double() @ moe.tensors()["router.weight"].double().T
    assert aux.routing.logits.dtype == aux.routing.gate.dtype == aux.loss.dtype == torch.float32
    assert (aux.routing.logits - logits_TE).abs().max() < 1e-6


def test_jitter_survives_half_precision() -> None:
    config = plain_config(scores=ScoresConfig(noise="jitter", noise_scale=0.001))
    aux = MoE(config, dtype=torch.bfloat16)(torch.ones(50, D, dtype=torch.bfloat16))[1]
    assert len(aux.routing.logits.unique(dim=0)) == 50


def biased_config() -> MoEConfig:
    gate = GatingConfig(top_k=2, correction_bias=True)
    return plain_config(gating=gate, balance=BalanceConfig([("sequence_balance", 1.0)], "sign", 0.001))


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_the_correction_bias_stays_fp32(cast: str, rng: np.random.Generator) -> None:
    moe = drawn_moe(biased_config(), rng)
    before = moe.router.correction_bias.clone()
    getattr(nn.Sequential(nn.Linear(2, 2), moe), cast)()
    assert moe.router.weight.dtype == getattr(torch, cast)
    assert moe.router.correction_bias.dtype == torch.float32 and torch.equal(moe.router.correction_bias, before)
    assert moe.state_dict()["router.correction_bias"].dtype == torch.float32


def test_a_layer_made_without_storage_can_be_given_one() -> None:
    moe = MoE(biased_config(), device="meta").to(torch.bfloat16).to_empty(device="cpu")
    moe.reset_parameters(torch.Generator().manual_seed(3))
    assert moe.router.correction_bias.dtype == torch.float32 and not moe.router.correction_bias.any()
    assert moe(torch.randn(4, D, dtype=torch.bfloat16))[0].isfinite().all()


def test_the_bias_moves_like_the_reference_s_and_has_no_gradient(rng: np.random.Generator) -> None:
    config = biased_config()
    moe, bias = MoE(config), np.zeros(5, np.float32)
    for _ in range(50):
        load = rng.multinomial(100, [0.4, 0.3, 0.15, 0.1, 0.05])
        moe.update_bias(torch.tensor(load))
        bias = reference.update_bias(bias, load, config)
    moe.update_bias(torch.full((5,), 20))
    assert bias.any() and np.array_equal(moe.router.correction_bias.numpy(), bias)
    assert not moe.router.correction_bias.requires_grad and "router.correction_bias" not in dict(moe.named_parameters())


def test_update_bias_of_a_layer_without_bias_does_nothing() -> None:
    moe = MoE(plain_config())
    before = copy.deepcopy(moe.state_dict())
    moe.update_bias(torch.arange(5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in moe.state_dict().items())


@pytest.mark.parametrize("name", list(CONFIGS)[::4])
def test_state_dict_is_the_reference_s_and_loads_strictly(name: str, rng: np.random.Generator) -> None:
    config = CONFIGS[name]
    params = random_params(config, rng)
    moe = loaded(config, params)
    assert {key: tuple(tensor.shape) for key, tensor in moe.state_dict().items()} == reference.parameter_shapes(config)
    back = params_to_numpy(moe.state_dict())
    assert all(np.array_equal(back[key], array) and back[key].dtype == array.dtype for key, array in params.items())
    other = MoE(config, dtype=torch.float64)
    other.load_state_dict(moe.state_dict(), strict=True)
    x = torch.randn(2, 5, config.d_model, dtype=torch.float64)
    assert torch.equal(other.eval()(x)[0], moe.eval()(x)[0])
    with pytest.raises(RuntimeError, match=r"router\.extra"):
        moe.load_state_dict({**moe.state_dict(), "router.extra": torch.zeros(1)})


def test_deepcopy_is_independent(rng: np.random.Generator) -> None:
    moe, x = drawn_moe(biased_config(), rng).eval(), drawn_x(2, 5)
    twin = copy.deepcopy(moe)
    y = moe(x)[0]
    assert torch.equal(twin(x)[0], y)
    twin.update_bias(torch.tensor([9, 0, 0, 0, 0]))
    with torch.no_grad():
        twin.experts.down_proj.add_(1)
    assert torch.equal(moe(x)[0], y) and not torch.equal(twin(x)[0], y)
    assert not torch.equal(twin.router.correction_bias, moe.router.correction_bias)


def test_fresh_parameters_follow_the_reference_s_rule() -> None:
    moe = MoE(plain_config(experts=ExpertsConfig(64, 48, bias=True, shared=2), scores=ScoresConfig(bias=True)))
    for name, tensor in moe.tensors().items():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif name == "router.penalty":
            assert tensor.item() == np.float32(1e-8)
        else:
            assert tensor.std().item() * tensor.shape[-1] ** 0.5 == pytest.approx(1, rel=0.15), name
    assert len(moe.experts.gate_up_proj.flatten(1).unique(dim=0)) == 64


def test_experts_without_tokens_have_gradients_of_exactly_zero(rng: np.random.Generator) -> None:
    config = plain_config(
        gating=GatingConfig(top_k=2, correction_bias=True), experts=ExpertsConfig(5, 4, bias=True), balance=BalanceConfig()
    )  # fmt: skip
    moe = drawn_moe(config, rng)
    moe.router.correction_bias.copy_(torch.tensor([-9.0, 5.0, -9.0, 5.0, -9.0]))
    y, aux = moe(drawn_x(2, 8))
    y.square().sum().backward()
    assert aux.routing.load.tolist() == [0, 16, 0, 16, 0]
    for name, gradient in grads(moe).items():
        if name.startswith("experts."):
            assert not gradient[[0, 2, 4]].any() and gradient[[1, 3]].flatten(1).any(1).all(), name


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 5), (0, 2, 3)])
@pytest.mark.parametrize("name", list(CONFIGS)[::4])
def test_no_tokens_at_all(name: str, shape: tuple[int, ...]) -> None:
    moe, x = MoE(CONFIGS[name], dtype=torch.float64), torch.zeros(*shape, CONFIGS[name].d_model, dtype=torch.float64)
    y, aux = moe(x, pad_mask=torch.zeros(shape, dtype=torch.bool))
    (y.sum() + aux.loss).backward()
    assert y.shape == x.shape and aux.loss == 0 and not aux.routing.load.any()
    assert all(gradient is not None and not gradient.any() for gradient in grads(moe).values())


def test_padding_has_no_output_and_no_influence_whatever_it_holds(rng: np.random.Generator) -> None:
    config = plain_config(capacity=CapacityConfig("per_token", factor=0.8), experts=ExpertsConfig(5, 4, bias=True, shared=1))
    moe, x = drawn_moe(config, rng), drawn_x(2, 9).detach()
    pad_mask = torch.zeros(2, 9, dtype=torch.bool)
    pad_mask[0, :4] = pad_mask[1, 6] = True
    y, aux = moe(x, pad_mask=pad_mask)
    other_y, other_aux = moe(x.masked_fill(pad_mask[:, :, None], torch.nan), pad_mask=pad_mask)
    assert not y[pad_mask].any() and torch.equal(y, other_y) and torch.equal(aux.loss, other_aux.loss)
    assert torch.equal(aux.routing.importance, other_aux.routing.importance) and aux.routing.load.sum() == 2 * 13


def test_a_nan_token_spoils_no_other(rng: np.random.Generator) -> None:
    config = plain_config(experts=ExpertsConfig(5, 4, shared=1), gating=GatingConfig(top_k=2, groups=5, top_groups=3))
    moe, x = drawn_moe(config, rng), drawn_x(1, 12).detach()
    y, aux = moe(x)
    broken = x.clone()
    broken[0, 3] = torch.nan
    replayed = moe(broken, replay=aux.routing)[0]
    free, free_aux = moe(broken)
    others = torch.arange(12) != 3
    assert replayed[0, 3].isnan().all() and free[0, 3].isnan().all()
    # The same rows go to the same experts in a replay, so nothing may differ by a bit; otherwise products have other heights.
    assert torch.equal(replayed[0, others], y[0, others])
    assert torch.equal(free_aux.routing.expert[others], aux.routing.expert[others]) and torch.allclose(
        free[0, others], y[0, others], rtol=1e-12
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_nothing_twice(reentrant: bool, rng: np.random.Generator) -> None:
    config = plain_config(
        scores=ScoresConfig(noise="jitter", noise_scale=0.3), capacity=CapacityConfig("per_assignment"),
        gating=GatingConfig(top_k=2, second_choice="random"),
    )  # fmt: skip
    moe, x, passes = drawn_moe(config, rng), drawn_x(2, 9), []
    moe.register_forward_pre_hook(lambda *_: passes.append(torch.get_rng_state()))

    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, aux = moe(x)
        return y, aux.loss, aux.routing.load

    results = []
    for call in (run, partial(checkpoint, run, use_reentrant=reentrant, preserve_rng_state=True)):
        torch.manual_seed(5)
        moe.zero_grad()
        x.grad = None
        y, loss, load = call(x)
        torch.rand(3)  # the generator has moved on by the time the backward pass recomputes
        (y.square().sum() + loss).backward()
        results.append([y, loss, load, x.grad, *grads(moe).values()])
    assert len(passes) == 3 and torch.equal(passes[2], passes[1])
    assert all(torch.equal(plain, saved) for plain, saved in zip(*results, strict=True))


def test_replay_repeats_decisions_and_draws_with_live_gates(rng: np.random.Generator) -> None:
    config = plain_config(scores=ScoresConfig(noise="jitter", noise_scale=0.3), gating=GatingConfig(top_k=2, second_choice="random"))
    moe, x = drawn_moe(config, rng), drawn_x(2, 20)
    y, aux = moe(x)
    assert not torch.equal(moe(x)[0], y)
    assert not aux.routing.keep.all()
    for replay in (aux.routing, routing_to_numpy(aux.routing), routing_from_numpy(routing_to_numpy(aux.routing))):
        again, again_aux = moe(x, replay=replay)
        assert torch.equal(again, y) and torch.equal(again_aux.loss, aux.loss)
        assert again_aux.routing.gate.requires_grad
    moved = moe(x + 0.5, replay=aux.routing)[1].routing
    assert torch.equal(moved.expert, aux.routing.expert) and not torch.equal(moved.gate, aux.routing.gate)


def test_numpy_replays_a_torch_routing(rng: np.random.Generator) -> None:
    config = CONFIGS["mixed-7"]
    params, x = random_params(config, rng), rng.standard_normal((15, D))
    y, aux = loaded(config, params)(torch.tensor(x))
    wanted, _ = reference.moe_forward(x, params, config, training=True, replay=routing_to_numpy(aux.routing))
    assert_same("y", y, wanted.y)
    assert_same("loss", aux.loss, wanted.loss)


def test_evaluation_has_no_noise_no_losses_and_its_own_capacity(rng: np.random.Generator) -> None:
    config = plain_config(
        scores=ScoresConfig(noise="jitter", noise_scale=0.3), capacity=CapacityConfig("per_assignment", factor=9.0, eval_factor=0.4)
    )  # fmt: skip
    moe, x = drawn_moe(config, rng).eval(), drawn_x(1, 20)
    y, aux = moe(x)
    assert torch.equal(moe(x)[0], y) and aux.loss == 0 and aux.losses == {} and aux.routing.draws == {}
    kept = torch.bincount(aux.routing.expert[aux.routing.keep], minlength=5)
    assert kept.max() == 4 and moe.train()(x)[1].routing.keep.all()


@pytest.mark.parametrize("name", list(CONFIGS)[::5])
def test_suffixes_are_the_shapes(name: str, rng: np.random.Generator) -> None:
    moe = drawn_moe(CONFIGS[name], rng)
    with traced(REPOSITORY / "reference" / "autograd") as trace:
        _, aux = moe(torch.randn(2, 9, CONFIGS[name].d_model, dtype=torch.float64), pad_mask=torch.rand(2, 9) < 0.2)
        moe.update_bias(aux.routing.load)
    assert len(trace.seen) > 40 and not trace.errors, trace.errors
