"""The fast layer: the reference's numbers, gradients and checkpoints on every backend, and everything PyTorch does with a module."""

from __future__ import annotations

import copy
import io
import pickle
import re
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from configs import CONFIGS, VOCABULARY
from conftest import REPOSITORY
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from tracer import traced

import optimized
from optimized import MoE, apply_experts, backends, experts, set_backend, torch_backend
from optimized.backends import BACKENDS, Backend
from optimized.operators import apply_operator, experts_operator
from reference import experts as numpy_experts
from reference.autograd import MoE as ReferenceMoE
from reference.autograd import experts as eager_experts
from reference.config import BalanceConfig, ExpertsConfig, GatingConfig, MoEConfig, ScoresConfig

CPU = torch.device("cpu")
PLAIN = MoEConfig(6, gating=GatingConfig(top_k=2), experts=ExpertsConfig(5, 4))
FULL = MoEConfig(
    6, ScoresConfig("sigmoid", bias=True), GatingConfig(top_k=2, correction_bias=True, normalize="sum"),
    experts=ExpertsConfig(5, 4, bias=True, shared=1), balance=BalanceConfig((("expert_balance", 0.1), ("router_z", 0.1))),
)  # fmt: skip
# Kernels that are interpreted have tests of their own, one instruction at a time.
HERE = [name for name in BACKENDS if name != "triton" and backends.why_not(name, CPU, torch.float32, PLAIN) is None]
EXACT = [name for name in HERE if backends.why_not(name, CPU, torch.float64, PLAIN) is None]


def pair(config: MoEConfig, backend: str = "torch", dtype: torch.dtype = torch.float64) -> tuple[MoE, ReferenceMoE]:
    """The fast layer and the reference with the same parameters, no bias 0."""
    moe, wanted = MoE(config, backend=backend, dtype=dtype), ReferenceMoE(config, dtype=dtype)
    with torch.no_grad():
        for name, tensor in moe.tensors().items():
            if name.endswith("bias"):
                tensor.normal_(0, 0.3)
    wanted.load_state_dict(moe.state_dict())
    return moe, wanted


def gradients(moe: nn.Module, x: Tensor, **arguments) -> dict[str, Tensor]:
    """y, loss and every gradient of one pass, with cotangents that are the same on every call."""
    x = x.detach().requires_grad_()
    y, aux = moe(x, **arguments)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    names, parameters = zip(*moe.named_parameters(), strict=True)
    roots = [(y, dy)] + ([(aux.loss, torch.ones_like(aux.loss))] if aux.losses else [])
    found = torch.autograd.grad(
        [root for root, _ in roots], [x, *parameters], [cotangent for _, cotangent in roots], allow_unused=True, materialize_grads=True
    )
    return dict(zip(["y", "loss", "dx", *names], [y, aux.loss, *found], strict=True))


def largest_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Over all tensors the largest error, relative to the tensor's largest element; where that is 0 nothing else is allowed."""
    assert found.keys() == wanted.keys()
    errors = [0.0]
    for name, expected in wanted.items():
        assert found[name].shape == expected.shape and found[name].dtype == expected.dtype, name
        scale = expected.double().abs().max().item() if expected.numel() else 0.0
        error = (found[name].double() - expected.double()).abs().max().item() if expected.numel() else 0.0
        assert scale or not error, name
        errors.append(error / scale if scale else 0.0)
    return max(errors)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", EXACT)
def test_the_layer_is_the_reference_in_fp64(backend: str, name: str, training: bool) -> None:
    config = CONFIGS[name]
    moe, wanted = pair(config, backend)
    moe.train(training), wanted.train(training)
    x, pad_mask = torch.randn(3, 11, config.d_model, dtype=torch.float64), torch.rand(3, 11) < 0.2
    given = {"pad_mask": pad_mask, "token_ids": torch.randint(0, VOCABULARY, (3, 11))}
    replay = wanted(x, **given)[1].routing
    found, expected = (gradients(layer, x, **given, replay=replay) for layer in (moe, wanted))
    assert largest_error(found, expected) < 1e-12
    torch.manual_seed(7)
    own = moe(x, **given)[1]
    torch.manual_seed(7)
    theirs = wanted(x, **given)[1]
    assert own.losses.keys() == theirs.losses.keys()
    for field in ("expert", "keep", "load", "gate", "importance"):
        assert torch.equal(getattr(own.routing, field), getattr(theirs.routing, field)), field


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", HERE)
def test_the_layer_is_the_reference_in_fp32(backend: str, name: str) -> None:
    reason = backends.why_not(backend, torch.device("cpu"), torch.float32, CONFIGS[name]) or ""
    if reason.startswith("it has no activation"):
        pytest.skip(reason)
    moe, wanted = pair(CONFIGS[name], backend, torch.float32)
    x = torch.randn(2, 13, CONFIGS[name].d_model)
    ids = torch.randint(0, VOCABULARY, (2, 13))
    replay = wanted(x, token_ids=ids)[1].routing
    found, expected = (gradients(layer, x, token_ids=ids, replay=replay) for layer in (moe, wanted))
    assert largest_error(found, expected) < 1e-5


@pytest.mark.parametrize("activation", numpy_experts.ACTIVATIONS)
@pytest.mark.filterwarnings("ignore:backend .* would be faster:UserWarning")
def test_auto_runs_every_activation_and_gates_on_inputs(activation: str) -> None:
    """Where the fastest backend has no such activation another one runs, never a wrong number."""
    config = MoEConfig(4, gating=GatingConfig(top_k=2), experts=ExpertsConfig(3, 2, activation, gate_inputs=True))
    moe, wanted = pair(config, "auto", torch.float32)
    assert moe(torch.randn(0, 4))[0].shape == (0, 4)
    x = 5 * torch.randn(2, 9, 4)
    replay = wanted(x)[1].routing
    assert largest_error(gradients(moe, x, replay=replay), gradients(wanted, x, replay=replay)) < 1e-5


def test_the_activations_are_those_of_the_reference() -> None:
    assert set(experts.ACTIVATIONS) == set(numpy_experts.ACTIVATIONS)


@pytest.mark.parametrize("name", experts.ACTIVATIONS)
def test_activation_backward_is_that_of_autograd(name: str) -> None:
    activation = experts.ACTIVATIONS[name]
    pre_NM = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    hidden_NF = eager_experts.ACTIVATIONS[name](pre_NM)
    dhidden_NF = torch.randn_like(hidden_NF)
    (wanted_NM,) = torch.autograd.grad(hidden_NF, pre_NM, dhidden_NF)
    kept_NM, given_NF = pre_NM.detach().clone(), dhidden_NF.clone()
    found_NF, dpre_NM = activation.backward(given_NF, kept_NM)
    for same, expected in ((activation.forward(kept_NM), hidden_NF), (found_NF, hidden_NF), (dpre_NM, wanted_NM)):
        assert torch.allclose(same, expected, rtol=1e-13, atol=1e-15)
    assert torch.equal(kept_NM, pre_NM) and torch.equal(given_NF, dhidden_NF)


@pytest.mark.parametrize("activation", experts.ACTIVATIONS)
def test_gradcheck(activation: str) -> None:
    config = MoEConfig(3, gating=GatingConfig(top_k=2), experts=ExpertsConfig(3, 2, activation, bias=True))
    moe, _ = pair(config)
    names = [name for name in moe.tensors() if name.startswith("experts.")]
    routing = moe(torch.randn(5, 3, dtype=torch.float64))[1].routing
    keep = torch.tensor([[True, True], [True, False], [False, False], [True, True], [False, True]])
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x, routing.gate.detach().requires_grad_(), *(moe.tensors()[name] for name in names)]

    def seam(x_TD: Tensor, gate_TK: Tensor, *weights: Tensor) -> Tensor:
        given = routing._replace(gate=gate_TK, keep=keep)
        return apply_experts(x_TD, given, dict(zip(names, weights, strict=True)), config, backend="torch")

    assert torch.autograd.gradcheck(seam, inputs)


@pytest.mark.parametrize("rows", [(4, 0, 9), (0, 0, 0), (1, 30, 2), (5000, 1, 1)])
def test_runs_cover_every_used_expert_once(rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "BLOCK_ELEMENTS", 64)
    ends = [0]
    for count in rows:
        ends.append(ends[-1] + count)
    runs = list(torch_backend._runs(ends, 8))
    taken = [(expert, count) for run in runs for expert, count in zip(run.experts, run.rows, strict=True)]
    assert taken == [(expert, count) for expert, count in enumerate(rows) if count]
    assert all((run.stop - run.start) * 8 <= 64 or len(run.experts) == 1 for run in runs)
    assert [run.start for run in runs] == [0, *(run.stop for run in runs)][: len(runs)]


@pytest.mark.parametrize("elements", [1, 100])
def test_the_size_of_a_run_changes_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    moe, _ = pair(FULL)
    x = torch.randn(3, 20, 6, dtype=torch.float64)
    wanted = gradients(moe, x)
    monkeypatch.setattr(torch_backend, "BLOCK_ELEMENTS", elements)
    assert largest_error(gradients(moe, x), wanted) < 1e-13


@pytest.mark.parametrize("experts_count", [255, 256, 40_000])
def test_sort_is_stable_for_every_key_width(experts_count: int) -> None:
    expert_TK = torch.randint(0, experts_count, (300, 3))
    expert_TK[0], expert_TK[1] = experts_count - 1, 0
    keep_TK = torch.rand(300, 3) < 0.8
    order_N, bounds_P = torch_backend.sort_by_expert(expert_TK, keep_TK, experts_count)
    key_N = torch.where(keep_TK, expert_TK, experts_count).flatten()
    assert torch.equal(order_N.long(), torch.sort(key_N, stable=True).indices) and order_N.dtype == torch.int32
    assert torch.equal(bounds_P.diff().long(), torch.bincount(key_N, minlength=experts_count + 1)[:-1])


@pytest.mark.parametrize("backend", HERE)
def test_an_unknown_expert_is_a_dropped_assignment(backend: str) -> None:
    moe, _ = pair(PLAIN, backend, torch.float32)
    x = torch.randn(9, 6)
    routing = moe(x)[1].routing
    broken_TK, keep_TK = routing.expert.clone(), routing.keep.clone()
    broken_TK[2, 0], broken_TK[5, 1] = -3, 99
    keep_TK[2, 0] = keep_TK[5, 1] = False
    found, wanted = (moe.apply_experts(x, given) for given in (routing._replace(expert=broken_TK), routing._replace(keep=keep_TK)))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", HERE)
def test_a_nan_token_spoils_no_other(backend: str) -> None:
    moe, _ = pair(FULL, backend, torch.float32)
    x = torch.randn(12, 6)
    y, aux = moe(x)
    broken = x.clone()
    broken[3] = torch.nan
    found, others = moe(broken, replay=aux.routing)[0], torch.arange(12) != 3
    assert found[3].isnan().all() and torch.equal(found[others], y[others])


@pytest.mark.parametrize("backend", HERE)
def test_two_runs_are_bit_equal(backend: str) -> None:
    moe, _ = pair(FULL, backend, torch.float32)
    x = torch.randn(50, 6)
    first, second = gradients(moe, x), gradients(moe, x)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (0, 5, 6)])
@pytest.mark.parametrize("backend", HERE)
def test_no_tokens_at_all(backend: str, shape: tuple[int, ...]) -> None:
    moe, _ = pair(FULL, backend, torch.float32)
    found = gradients(moe.train(), torch.randn(shape))
    assert found["y"].shape == shape and not any(tensor.count_nonzero() for tensor in found.values())


@pytest.mark.parametrize("backend", HERE)
def test_what_is_saved_for_the_backward(backend: str) -> None:
    tokens, config = 64, MoEConfig(32, gating=GatingConfig(top_k=4), experts=ExpertsConfig(8, 16))
    moe, wanted = pair(config, backend, torch.float32)
    x = torch.randn(tokens, 32, requires_grad=True)
    routing = wanted(x)[1].routing
    sizes: dict[str, int] = {}
    for layer in (moe, wanted):
        weights = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, weights: set[int] = weights, saved: dict[int, int] = saved) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer.apply_experts(x, routing)
        sizes[type(layer).__module__] = sum(saved.values())
        del y
    places = tokens * 4
    gates, pre, order, bounds = places * 4, places * 32 * 4, places * 4, 9 * 4
    assert sizes["optimized.layer"] <= gates + pre + order + bounds and sizes["reference.autograd.layer"] > 2 * pre


def test_nothing_is_saved_where_no_gradient_is_wanted() -> None:
    moe, _ = pair(PLAIN)
    x = torch.randn(7, 6, dtype=torch.float64)
    routing = moe(x)[1].routing
    weights = [moe.tensors()[f"experts.{name}"] for name in ("gate_up_proj", "down_proj")]
    arguments = (x, routing.expert, routing.gate, routing.keep, *weights, None, None, "swiglu")
    with torch.no_grad():
        saving, sparing = (torch_backend.OPERATOR(*arguments, save) for save in (True, False))
    assert saving[1].shape == (14, 8) and sparing[1].shape == (0, 8) and torch.equal(saving[0], sparing[0])


def test_frozen_experts_cost_no_weight_gradients() -> None:
    moe, _ = pair(FULL)
    x = torch.randn(9, 6, dtype=torch.float64)
    wanted = gradients(moe, x)
    for name, parameter in moe.named_parameters():
        parameter.requires_grad_(not name.startswith("experts."))
    x.requires_grad_()
    with torch.profiler.profile(record_shapes=True) as profile:
        (moe(x)[0].sum() * 2).backward()
    assert x.grad is not None and moe.get_parameter("experts.down_proj").grad is None
    backward = [event for event in profile.events() if event.name == "moebius::torch_experts_backward"]
    assert backward and wanted["experts.down_proj"].any()
    used = len(moe(x)[1].routing.expert.unique())
    inside = [event for event in profile.events() if event.name == "aten::mm" and _within(event, backward[0])]
    assert len(inside) == 2 * used


def _within(event, parent) -> bool:
    return parent.time_range.start <= event.time_range.start and event.time_range.end <= parent.time_range.end


@pytest.mark.parametrize("bias, contiguous", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", HERE)
def test_opcheck(backend: str, dtype: torch.dtype, bias: bool, contiguous: bool) -> None:
    def drawn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        tensor = torch.randn(shape) if contiguous else torch.randn(shape[::-1]).permute(*range(len(shape))[::-1])
        return tensor.to(dtype).requires_grad_()

    gate_TK, keep_TK = drawn(7, 2, dtype=torch.float32), torch.rand(7, 2) < 0.8
    biases = (drawn(5, 12), drawn(5, 8)) if bias else (None, None)
    arguments = (drawn(7, 8), torch.randint(0, 6, (7, 2)), gate_TK, keep_TK, drawn(5, 12, 8), drawn(5, 8, 6), *biases, "swiglu", True)
    operator = getattr(torch.ops.moebius, f"{backend}_experts")
    assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", HERE)
def test_compiles_whole_with_dynamic_shapes(backend: str) -> None:
    moe, _ = pair(FULL, backend, torch.float32)
    torch._dynamo.reset()
    graphs = []

    def record(graph: torch.fx.GraphModule, _):
        graphs.append(graph)
        return graph

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        y, aux = moe(x)
        return y, aux.loss

    compiled = {"eager": torch.compile(step, fullgraph=True, backend=record, dynamic=True),
                "aot_eager": torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)}  # fmt: skip
    for tokens in (5, 12, 17):
        x = torch.randn(3, tokens, 6, requires_grad=True)
        leaves = [x, *moe.parameters()]
        results = []
        for call in (step, *compiled.values()):
            y, loss = call(x)
            results.append([y, loss, *torch.autograd.grad(y.square().sum() + loss, leaves)])
        for result in results[1:]:
            assert all(torch.allclose(found, wanted, rtol=1e-5, atol=1e-6) for found, wanted in zip(result, results[0], strict=True))
    assert len(graphs) == 1


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("backend", HERE)
def test_exports_with_dynamic_batch_and_length(backend: str, strict: bool) -> None:
    moe, _ = pair(FULL, backend, torch.float32)
    sizes = {0: torch.export.Dim("sequences"), 1: torch.export.Dim("positions", min=2, max=4096)}
    program = torch.export.export(moe.eval(), (torch.randn(2, 9, 6),), dynamic_shapes=(sizes,), strict=strict)
    for shape in ((1, 33, 6), (4, 2, 6)):
        x = torch.randn(shape)
        assert torch.equal(program.module()(x)[0], moe(x)[0])
    assert any(node.target is getattr(torch.ops.moebius, f"{backend}_experts").default for node in program.graph.nodes)


@pytest.mark.parametrize("backend", HERE)
def test_runs_on_tensors_without_numbers(backend: str) -> None:
    moe = MoE(FULL, backend=backend)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake, _ = moe(torch.randn(2, 5, 6))
    assert fake.shape == (2, 5, 6)
    meta = MoE(FULL, device="meta")
    y, aux = meta(torch.empty(2, 5, 6, device="meta"))
    (y.sum() + aux.loss).backward()
    assert all(parameter.grad is not None and parameter.grad.shape == parameter.shape for parameter in meta.parameters())


@pytest.mark.parametrize("inner", [torch.float32, torch.bfloat16], ids=["x-fp32", "x-bf16"])
@pytest.mark.parametrize("backend", HERE)
def test_autocast_lowers_the_experts_and_never_the_router(backend: str, inner: torch.dtype) -> None:
    moe, wanted = pair(FULL, backend, torch.float32)
    x = torch.randn(2, 19, 6).to(inner)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, lowered = gradients(moe, x), gradients(wanted, x)
        aux = moe(x)[1]
    full = gradients(wanted, x.float())
    assert aux.routing.gate.dtype == torch.float32 and found["loss"].dtype == torch.float32
    for name, tensor in found.items():
        assert tensor.dtype == lowered[name].dtype and tensor.isfinite().all(), name
        error, eager = ((t[name].float() - full[name].float()).norm() / full[name].float().norm() for t in (found, lowered))
        assert error <= 2 * eager + 0.002, (name, error, eager)
    assert not torch.equal(found["y"].float(), full["y"])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", HERE)
def test_activation_checkpointing_changes_nothing(backend: str, reentrant: bool) -> None:
    config = CONFIGS["gshard"]
    moe, _ = pair(config, backend, torch.float32)
    x, results = torch.randn(2, 9, 6, requires_grad=True), []

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        y, aux = moe(x)
        return y, aux.loss

    for call in (run, partial(checkpoint, run, use_reentrant=reentrant)):
        torch.manual_seed(5)
        moe.zero_grad()
        x.grad = None
        y, loss = call(x)
        torch.rand(3)  # the generator has moved on by the time the backward pass recomputes
        (y.square().sum() + loss).backward()
        results.append([y, loss, x.grad, *(parameter.grad for parameter in moe.parameters())])
    assert all(torch.equal(plain, saved) for plain, saved in zip(*results, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dicts_load_strictly_both_ways(name: str) -> None:
    moe, wanted = MoE(CONFIGS[name]), ReferenceMoE(CONFIGS[name])
    assert list(moe.state_dict()) == list(wanted.state_dict())
    moe.load_state_dict(wanted.state_dict(), strict=True)
    assert all(torch.equal(tensor, wanted.state_dict()[key]) for key, tensor in moe.state_dict().items())
    wanted.load_state_dict(MoE(CONFIGS[name]).state_dict(), strict=True)


def test_copies_and_pickles_compute_the_same() -> None:
    moe, _ = pair(FULL)
    file = io.BytesIO()
    torch.save(moe, file)
    file.seek(0)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe)), torch.load(file, weights_only=False)):
        assert other.requested_backend == "torch" and torch.equal(other(x)[0], moe(x)[0])
        with torch.no_grad():
            other.get_parameter("experts.down_proj").zero_()
    assert moe.get_parameter("experts.down_proj").any()


def test_the_bias_moves_as_in_the_reference() -> None:
    config = CONFIGS["deepseek-v3"]
    moe, wanted = pair(config)
    load = torch.randint(0, 9, (config.experts.count,))
    moe.update_bias(load), wanted.update_bias(load)
    assert torch.equal(moe.get_buffer("router.correction_bias"), wanted.get_buffer("router.correction_bias"))


def test_bfloat16_parameters() -> None:
    moe = MoE(FULL).to(torch.bfloat16)
    y, aux = moe(torch.randn(2, 7, 6, dtype=torch.bfloat16))
    (y.float().sum() + aux.loss).backward()
    assert y.dtype == torch.bfloat16 and aux.routing.gate.dtype == torch.float32
    assert all(parameter.grad.dtype == torch.bfloat16 and parameter.grad.isfinite().all() for parameter in moe.parameters())


def test_second_derivatives_are_refused() -> None:
    moe, _ = pair(PLAIN)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(moe(x)[0].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"torch_experts has no second derivative; .*reference\.autograd\.MoE"):
        first.sum().backward()


def forward_mode(moe: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(moe(forward_ad.make_dual(x, torch.ones_like(x)))[0]).tangent


TRANSFORMS = {
    "jvp": lambda moe, x: torch.func.jvp(lambda rows: moe(rows)[0], (x,), (torch.ones_like(x),))[1],
    "grad": lambda moe, x: torch.func.grad(lambda rows: moe(rows)[0].sum())(x),
    "grad of grad": lambda moe, x: torch.func.grad(lambda at: torch.func.grad(lambda rows: moe(rows)[0].square().sum())(at).sum())(x),
    "forward mode": forward_mode,
}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", HERE)
def test_transforms_of_functions(backend: str, transform: str, trained: bool) -> None:
    """An operator of ours drops a tangent without a word: then jvp is 0."""
    moe, wanted = pair(PLAIN, dtype=torch.float32, backend=backend)
    moe.requires_grad_(trained), wanted.requires_grad_(trained)
    x = torch.randn(4, 6)
    found, truth = (TRANSFORMS[transform](each, x) for each in (moe, wanted))
    assert truth.abs().max() > 1e-3
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("backend", HERE)
def test_vmap_takes_the_operator(backend: str) -> None:
    """The reference cannot be mapped: it looks for the rows of each expert."""
    moe, _ = pair(PLAIN, backend=backend, dtype=torch.float32)
    x = torch.randn(3, 4, 6)
    torch.testing.assert_close(torch.func.vmap(lambda rows: moe(rows)[0])(x), moe(x)[0])


@pytest.mark.parametrize("name", ["swiglu-biases", "biases", "switch"])
def test_suffixes_are_the_shapes(name: str) -> None:
    moe, _ = pair(CONFIGS[name])
    with traced(REPOSITORY / "optimized") as trace:
        gradients(moe, torch.randn(2, 9, CONFIGS[name].d_model, dtype=torch.float64))
    assert len(trace.seen) > 30 and not trace.errors, trace.errors


# Which backend runs


def backend(name: str, rank: int, reason: str | None = None, **settings) -> Backend:
    given = {"devices": ("cpu",), "dtypes": (torch.float32,), "apply_experts": torch_backend.apply_experts, **settings}
    return Backend(name, rank, unavailable=lambda device, dtype, config: reason, **given)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Backend]:
    """A backend table of its own, with the row "torch"."""
    own = {"torch": BACKENDS["torch"]}
    monkeypatch.setattr(backends, "BACKENDS", own)
    monkeypatch.setattr(backends, "_warned", set())
    return own


def test_auto_takes_the_highest_rank_that_runs(table: dict[str, Backend]) -> None:
    moe = MoE(PLAIN)
    assert moe.backend == "torch" and backends.names() == ("torch",)
    backends.register(backend("quick", 5))
    backends.register(backend("quicker", 9, devices=("cuda",)))
    assert moe.backend == "quick" and backends.names() == ("quicker", "quick", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # another device or dtype than a backend is made for is no surprise
        assert moe.double().backend == "torch"


def test_auto_warns_once_of_what_should_have_run(table: dict[str, Backend]) -> None:
    backends.register(backend("quick", 5, "there is no compiler"))
    moe, x = MoE(PLAIN), torch.randn(3, 6)
    with pytest.warns(UserWarning, match="'quick' would be faster but cannot run: there is no compiler; 'torch' runs instead"):
        moe(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moe(x)
        MoE(PLAIN)(x)


def test_a_backend_may_bring_its_own_router(table: dict[str, Backend]) -> None:
    seen = []

    def route(x_TD, params, config, tokens, *, training, replay):
        seen.append(training)
        return super(MoE, moe).route_tokens(x_TD, tokens, replay)

    backends.register(backend("quick", 5, route=route))
    moe = MoE(PLAIN, backend="quick")
    wanted = MoE(PLAIN, backend="torch")
    wanted.load_state_dict(moe.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(moe(x)[0], wanted(x)[0]) and seen == [True]


def test_a_backend_s_operator_needs_a_forward_and_a_backward_only(table: dict[str, Backend]) -> None:
    calls = []

    def forward(*arguments):
        calls.append("forward")
        return torch_backend.experts_forward(*arguments)

    def backward(*arguments):
        calls.append("backward")
        return torch_backend.experts_backward(*arguments)

    operator = experts_operator("test", forward, backward)
    backends.register(backend("test", 5, apply_experts=partial(apply_operator, operator)))
    moe, wanted = pair(FULL, "test", torch.float32)
    x = torch.randn(3, 9, 6)
    assert largest_error(gradients(moe, x), gradients(wanted, x)) < 1e-5 and calls == ["forward", "backward"]


@pytest.mark.parametrize(
    "row, message",
    [
        (backend("auto", 5), "'auto' is no backend's name"),
        (backend("torch", 5), "'torch' is registered already"),
        (backend("quick", BACKENDS["torch"].rank), "has rank 0, which 'torch' has"),
    ],
)
def test_rows_that_do_not_fit_the_table(table: dict[str, Backend], row: Backend, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backends.register(row)


def test_unknown_backends() -> None:
    for call in (lambda: MoE(PLAIN, backend="cudnn"), lambda: set_backend(MoE(PLAIN), "cudnn")):
        with pytest.raises(ValueError, match=r"backend is 'cudnn'; known: auto, .*torch"):
            call()
    with pytest.raises(ValueError, match="backend is 'cudnn'"):
        moe = MoE(PLAIN)
        apply_experts(torch.randn(3, 6), moe(torch.randn(3, 6))[1].routing, moe.tensors(), PLAIN, backend="cudnn")
    with pytest.raises(ValueError, match="backend is 'auto'; known: "):
        backends.why_not("auto", CPU, torch.float32, PLAIN)


def test_a_requested_backend_that_cannot_run_says_why(table: dict[str, Backend]) -> None:
    backends.register(backend("quick", 5, "there is no compiler"))
    backends.register(backend("gpu", 9, devices=("cuda",), note="it is a GPU's"))
    x = torch.randn(3, 6)
    with pytest.raises(ValueError, match="backend 'quick' cannot run this layer: there is no compiler; use backend='auto'"):
        MoE(PLAIN, backend="quick")(x)
    waiting = MoE(PLAIN, backend="gpu")
    with pytest.raises(ValueError, match=re.escape("it runs on cuda, not on cpu (it is a GPU's)")):
        _ = waiting.backend
    with pytest.raises(ValueError, match=r"it computes in torch\.float32, not in torch\.float64"):
        MoE(PLAIN, backend="quick", dtype=torch.float64)(x.double())
    del table["torch"]
    with pytest.raises(ValueError, match=r"no backend can run this layer: gpu: .*; quick: there is no compiler"):
        MoE(PLAIN)(x)


def test_an_activation_that_a_backend_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(experts.ACTIVATIONS, "swiglu")
    with pytest.raises(ValueError, match="it has no activation 'swiglu', only relu"):
        MoE(PLAIN, backend="torch")(torch.randn(3, 6))


def test_set_backend_reaches_every_layer() -> None:
    model = nn.Sequential(MoE(PLAIN), nn.ModuleDict({"inner": MoE(PLAIN)}), nn.Linear(3, 3))
    assert set_backend(model, "torch") is model
    assert {layer.requested_backend for layer in model.modules() if isinstance(layer, MoE)} == {"torch"}
    assert "backend='torch'" in repr(model)
    for module in (nn.Linear(2, 2), ReferenceMoE(PLAIN)):
        with pytest.raises(ValueError, match=r"holds no optimized\.MoE"):
            set_backend(module, "torch")


def test_the_seam_checks_its_input() -> None:
    moe = MoE(PLAIN)
    routing = moe(torch.randn(3, 6))[1].routing
    with pytest.raises(ValueError, match=r"x has shape \(3, 5\)"):
        apply_experts(torch.randn(3, 5), routing, moe.tensors(), PLAIN)
    with pytest.raises(ValueError, match=r"params has no 'experts\.gate_up_proj'"):
        apply_experts(torch.randn(3, 6), routing, {}, PLAIN)
    with pytest.raises(ValueError, match=r"has dtype torch\.float32 but x has torch\.float64"):
        apply_experts(torch.randn(3, 6, dtype=torch.float64), routing, moe.tensors(), PLAIN)


# The package


def python(code: str, *path: Path) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": ":".join(map(str, path)), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/", check=False)


def test_the_package_is_light_until_it_is_used() -> None:
    code = "import sys, optimized; print('torch' in sys.modules, [n for n in optimized.__all__ if not hasattr(optimized, n)])"
    assert python(code, REPOSITORY).stdout == "False []\n"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = optimized.nothing


def test_a_foreign_reference_is_named(tmp_path: Path) -> None:
    (tmp_path / "reference.py").write_text("")
    result = python("import optimized", tmp_path, REPOSITORY)
    assert f"`import reference` finds {tmp_path / 'reference.py'}, which shadows {REPOSITORY}" in result.stderr
    with pytest.raises(ImportError, match="finds no package"):
        optimized._check_reference(None)
