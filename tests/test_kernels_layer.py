"""The Triton backend as users meet it: the experts' contract in every dtype, batch invariance, the operators, the module."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from kernel_checks import DEVICE, INTERPRETED

from optimized import MoE, backends, triton_backend
from optimized.contracts import CONTRACTS
from optimized.kernels import launch
from optimized.kernels.interpreter import tf32_of
from optimized.proofs import experts_outputs, prove
from optimized.yardstick import farthest
from reference import presets
from reference.autograd import MoE as ReferenceMoE
from reference.autograd import apply_experts as eager_apply_experts
from reference.autograd.layer import route_forward
from reference.autograd.tokens import token_info
from reference.config import GatingConfig, MoEConfig, ScoresConfig
from reference.proof.cases import Case, draw, get, small
from reference.proof.equal import Outputs, round_to
from reference.proof.parity import assert_experts_equal, experts_truth

PROMISE = CONTRACTS["optimized.triton_backend.apply_experts"]
IN_HALF = ("one-token", "few-tokens", "off-tile-widths", "drops", "empty-experts", "gelu-bias", "swiglu-bias", "relu")
LARGE = [case for case in (get("many-tokens"), get("wide"))]


def on_backend(x_TD: torch.Tensor, routing: Any, params: Any, config: MoEConfig) -> torch.Tensor:
    return triton_backend.apply_experts(x_TD, routing, params, config)


@pytest.mark.parametrize("case", small(), ids=lambda case: case.name)
def test_float32(case: Case) -> None:
    prove(PROMISE, case, "float32", DEVICE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", IN_HALF)
def test_half_precision(name: str, dtype: str) -> None:
    prove(PROMISE, get(name), dtype, DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", [case for case in small() if case.name not in IN_HALF], ids=lambda case: case.name)
def test_half_precision_of_the_other_cases(case: Case, dtype: str) -> None:
    prove(PROMISE, case, dtype, DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [dtype for dtype in PROMISE.dtypes if dtype != "tf32"])  # a switch, not a dtype: test_tf32
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_large_cases(case: Case, dtype: str) -> None:
    prove(PROMISE, case, dtype, DEVICE)


IN_TF32 = ("off-tile-widths", "drops", "gelu-bias")


@pytest.mark.parametrize("name", [pytest.param(case.name, marks=[] if case.name in IN_TF32 else [pytest.mark.slow]) for case in small()])
def test_tf32(name: str) -> None:
    """Allowed by torch's switch; the yardstick is the reference on operands cut to tf32, as a tensor core cuts them."""
    inputs = draw(get(name)).rounded(partial(round_to, dtype="float32"))

    def eager(turned: Any, _: Any) -> Outputs:
        return experts_outputs(eager_apply_experts, turned.rounded(lambda array: tf32_of(array).astype(np.float64)), "float32")

    plain = launch.precision_of(torch.float32)
    torch.set_float32_matmul_precision("high")
    try:
        rounded = experts_outputs(on_backend, inputs, "float32", DEVICE)
        assert (plain, launch.precision_of(torch.float32), launch.precision_of(torch.bfloat16)) == ("ieee", "tf32", "ieee")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_experts_equal(inputs, rounded, farthest(eager, inputs, experts_truth(inputs)), "tf32")
    exact = experts_outputs(on_backend, inputs, "float32", DEVICE)
    changed = not np.array_equal(rounded["y"], exact["y"])
    assert changed or not exact["y"].any(), "tf32 that changes nothing was not used"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_gets_the_same_bits_alone_and_in_any_batch(dtype: torch.dtype) -> None:
    """Batch invariance of y and dx, for fixed block sizes: the order of every sum is that of D, F and the slots alone."""
    inputs = draw(get("off-tile-widths"))
    config = inputs.config
    params = {name: torch.from_numpy(array).to(DEVICE, dtype) for name, array in inputs.params.items()}
    x_TD, dy_TD = (torch.from_numpy(array).to(DEVICE, dtype) for array in (inputs.x, inputs.dy))
    expert_TK, gate_TK = torch.from_numpy(inputs.routing.expert).to(DEVICE), torch.from_numpy(inputs.routing.gate).float().to(DEVICE)

    def run(tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        x = x_TD[tokens].clone().requires_grad_()
        gate = gate_TK[tokens]
        routing = _routing(expert_TK[tokens], gate)
        y = triton_backend.apply_experts(x, routing, params, config)
        return y.detach(), torch.autograd.grad(y, x, dy_TD[tokens])[0]

    everyone = list(range(len(x_TD)))
    y_TD, dx_TD = run(everyone)
    for tokens in ([0], [7], [18], [3, 11, 4], everyone[::-1], everyone * 4):
        y, dx = run(tokens)
        assert torch.equal(y, y_TD[tokens])
        assert torch.equal(dx, dx_TD[tokens])


def _routing(expert_TK: torch.Tensor, gate_TK: torch.Tensor, keep_TK: torch.Tensor | None = None) -> Any:
    keep_TK = torch.ones_like(expert_TK, dtype=torch.bool) if keep_TK is None else keep_TK
    nothing = torch.zeros(0)
    return triton_backend.Routing(expert_TK, gate_TK, keep_TK, nothing, nothing, nothing, nothing, {})


def test_a_nan_token_spoils_no_other_token() -> None:
    inputs = draw(get("few-tokens"))
    params = {name: torch.from_numpy(array).float().to(DEVICE) for name, array in inputs.params.items()}
    x_TD, routing = torch.from_numpy(inputs.x).float().to(DEVICE), inputs.routing
    given = _routing(torch.from_numpy(routing.expert).to(DEVICE), torch.from_numpy(routing.gate).float().to(DEVICE))
    clean = triton_backend.apply_experts(x_TD, given, params, inputs.config)
    x_TD[2] = float("nan")
    spoilt = triton_backend.apply_experts(x_TD, given, params, inputs.config)
    others = [0, 1, 3, 4, 5, 6]
    assert spoilt[2].isnan().all()
    assert torch.equal(spoilt[others], clean[others])


def test_the_gate_of_a_dropped_assignment_is_not_read() -> None:
    inputs = draw(get("drops"))
    clean = experts_outputs(on_backend, inputs, "float32", DEVICE)
    keep = inputs.routing.keep
    poisoned = dataclasses.replace(inputs.routing, gate=np.where(keep, inputs.routing.gate, np.nan))
    found = experts_outputs(on_backend, dataclasses.replace(inputs, routing=poisoned), "float32", DEVICE)
    for name, array in clean.items():
        np.testing.assert_array_equal(found[name], array)
    assert not found["dgate"][~keep].any()


OPERATIONS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("bias", [False, True])
def test_the_experts_operator_passes_opcheck(bias: bool) -> None:
    torch.manual_seed(1)
    experts, width, hidden = 3, 8, 6
    x, gate = torch.randn(5, width, device=DEVICE, requires_grad=True), torch.rand(5, 2, device=DEVICE, requires_grad=True)
    up, down = (torch.randn(experts, *shape, device=DEVICE, requires_grad=True) for shape in ((2 * hidden, width), (width, hidden)))
    biases = [torch.randn(experts, size, device=DEVICE, requires_grad=True) if bias else None for size in (2 * hidden, width)]
    expert = torch.tensor([[0, 1], [1, 2], [0, 2], [1, 0], [2, 1]], device=DEVICE)
    keep = torch.ones_like(expert, dtype=torch.bool)
    keep[3, 1] = False
    arguments = (x, expert, gate, keep, up, down, *biases, "swiglu", True)
    results = torch.library.opcheck(triton_backend.OPERATOR, arguments, test_utils=OPERATIONS)
    assert set(results.values()) == {"SUCCESS"}


def test_the_router_operator_passes_opcheck() -> None:
    logits = torch.randn(6, 4, device=DEVICE, requires_grad=True)
    real = torch.ones(6, dtype=torch.bool, device=DEVICE)
    arguments = (logits, None, real, "softmax", 2, 1, 1, "max", "sum", 0.0, 1.0)
    results = torch.library.opcheck(triton_backend.ROUTE, arguments, test_utils=OPERATIONS)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", presets.names())
def test_the_router_of_every_preset(name: str) -> None:
    """Through the kernel, or through the documented way around it: decisions exactly, floats to fp32 rounding, losses and gradients too."""
    config = presets.tiny(name)
    torch.manual_seed(0)
    layer = ReferenceMoE(config, device=DEVICE)
    if config.gating.correction_bias:
        layer.get_buffer("router.correction_bias").normal_(0, 0.05)
    x_TD, pad_T = torch.randn(40, config.d_model, device=DEVICE), torch.arange(40, device=DEVICE) % 7 == 0
    ids_T, group_T = torch.arange(40, device=DEVICE) * 5, torch.arange(40, device=DEVICE) // 20
    tokens = token_info(x_TD.shape[:1], ids_T, group_T, pad_T, device=x_TD.device)
    draws = route_forward(x_TD, layer.tensors(), config, tokens, training=True)[0]
    for replay in (None, draws):
        found, expected = [], []
        for into, function in ((found, triton_backend.route), (expected, route_forward)):
            torch.manual_seed(1)
            x = x_TD.clone().requires_grad_()
            routing, losses = function(x, layer.tensors(), config, tokens, training=True, replay=replay)
            total = (routing.gate * torch.linspace(1, 2, routing.gate.numel(), device=DEVICE).view_as(routing.gate)).sum() + sum(
                losses.values()
            )
            into += [routing, losses, torch.autograd.grad(total, [x, layer.get_parameter("router.weight")])]
        for field in ("expert", "keep", "load"):
            assert torch.equal(getattr(found[0], field), getattr(expected[0], field)), field
        for field in ("gate", "scores", "logits", "importance"):
            torch.testing.assert_close(getattr(found[0], field), getattr(expected[0], field), rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(found[1], expected[1], rtol=2e-5, atol=1e-6)
        for one, other in zip(found[2], expected[2], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_what_the_kernel_was_not_told_of_is_not_guessed() -> None:
    """A field that `route` does not read must have its default, whatever fields a config will have."""
    dropping = GatingConfig(top_k=2, normalize="sum", after_drop=True)
    assert "does not know gating.after_drop = True" in str(triton_backend.why_not_route(MoEConfig(8, gating=dropping)))
    known = GatingConfig(top_k=2, normalize="sum", second_choice="random")
    assert triton_backend.why_not_route(MoEConfig(8, ScoresConfig(noise="jitter", noise_scale=0.1), known)) is None


def test_a_router_that_the_kernel_has_not_takes_the_references_way() -> None:
    wide = MoEConfig(8, gating=GatingConfig(top_k=17), experts=dataclasses.replace(MoEConfig(8).experts, count=20))
    assert "at most 16 experts, not 17" in str(triton_backend.why_not_route(wide))
    assert triton_backend.why_not_route(MoEConfig(8)) is None
    x_TD = torch.randn(9, 8, device=DEVICE)
    tokens = token_info(x_TD.shape[:1], device=x_TD.device)
    params = ReferenceMoE(wide, device=DEVICE).tensors()
    own, theirs = (function(x_TD, params, wide, tokens)[0] for function in (triton_backend.route, route_forward))
    assert torch.equal(own.expert, theirs.expert) and torch.equal(own.gate, theirs.gate)


def layers(config: MoEConfig, dtype: torch.dtype = torch.float32) -> tuple[MoE, ReferenceMoE]:
    torch.manual_seed(0)
    fast, plain = MoE(config, backend="triton", device=DEVICE, dtype=dtype), ReferenceMoE(config, device=DEVICE, dtype=dtype)
    fast.load_state_dict(plain.state_dict(), strict=True)
    return fast, plain


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 9)], ids=str)
def test_the_module(shape: tuple[int, ...]) -> None:
    """Router, experts, shared experts and losses together, in training."""
    config = presets.tiny("deepseek-v3")
    gradients = []
    x = torch.randn(*shape, config.d_model, device=DEVICE)
    for layer in layers(config):
        leaf = x.clone().requires_grad_()
        y, aux = layer(leaf)
        (y.square().sum() + aux.loss).backward()
        gradients.append([y, leaf.grad, *(parameter.grad for parameter in layer.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_in_one_graph_with_any_number_of_tokens() -> None:
    """`torch.compile` sees opaque operators; the same bits come out, for a second shape too."""
    config = presets.tiny("deepseek-v3")
    layer, _ = layers(config)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 9), (3, 5)):
        x = torch.randn(*shape, config.d_model, device=DEVICE)
        results = []
        for function in (layer, compiled):
            layer.zero_grad()
            y, aux = function(x)
            (y.sum() + aux.loss).backward()
            results.append([y, *(parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None)])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


def test_autocast_computes_in_its_dtype_and_returns_that_of_x() -> None:
    config = presets.tiny("mixtral-8x7b")
    fast, plain = layers(config)
    x = torch.randn(12, config.d_model, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, _ = fast(x)
    assert y.dtype == torch.float32
    error = float(((y - plain(x)[0]).norm() / y.norm()).detach())
    assert 1e-4 < error < 2e-2


def test_what_cannot_run_says_so() -> None:
    config = MoEConfig(8)
    with pytest.raises(ValueError, match=r"not in torch\.float64"):
        MoE(config, backend="triton", device=DEVICE, dtype=torch.float64)(torch.randn(2, 8, dtype=torch.float64, device=DEVICE))
    reason = backends.BACKENDS["triton"].unavailable(
        torch.device(DEVICE), torch.float32, dataclasses.replace(config, experts=dataclasses.replace(config.experts, count=2049))
    )
    assert reason == "it sorts into at most 2048 experts, not 2049"
    if INTERPRETED:
        assert MoE(config).backend != "triton", "auto must not choose an interpreter"
        assert MoE(config, backend="triton").backend == "triton"
