"""Who is compared where it can be imported: each gets the same inputs, and the weights in the layout that it wants."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..benchmarks.peers import RIVAL, Runnable, everybody
from ..benchmarks.shapes import Problem

OURS, TUNED = "moebius", "moebius, tuned"
OTHERS_OF_THE_CPU = (RIVAL, "transformers batched_mm", "reference.autograd")


class Peer(NamedTuple):
    """name; package that must be importable; build: problem → Runnable."""

    name: str
    package: str
    build: Callable[[Problem], Runnable]


def ours(given: Problem) -> Runnable:
    """Our kernels."""
    config, params = given.shape.config, {"experts.gate_up_proj": given.up, "experts.down_proj": given.down}
    apply_experts = backends.resolve("triton", given.x.device, given.x.dtype, config).apply_experts
    return Runnable(lambda: apply_experts(given.x, given.routing, params, config), (given.up,), (given.down,))


def _scattermoe(given: Problem) -> Runnable:
    """ScatterMoE's gated layer; its first half is what is multiplied, the second goes through the activation."""
    shape = given.shape
    with torch.device(given.x.device):
        module = importlib.import_module("scattermoe.mlp").GLUMLP(
            input_size=shape.d_model, hidden_size=shape.width, num_experts=shape.experts, top_k=shape.top_k, activation=nn.SiLU()
        )
    gate_rows, up_rows = given.up.detach().chunk(2, dim=1)
    module.experts.weight = nn.Parameter(torch.cat([up_rows, gate_rows], dim=1))
    module.output_experts.weight = nn.Parameter(given.down.detach())
    return Runnable(lambda: module(given.x, given.gate, given.expert), (module.experts.weight,), (module.output_experts.weight,))


def _megablocks(given: Problem) -> Runnable:
    """MegaBlocks' dropless experts with grouped products; three matrices of [E·F, D]."""
    shape, dtype = given.shape, given.x.dtype
    arguments = importlib.import_module("megablocks.layers.arguments").Arguments(
        hidden_size=shape.d_model, ffn_hidden_size=shape.width, moe_num_experts=shape.experts, moe_top_k=shape.top_k,
        mlp_type="glu", mlp_impl="grouped", activation_fn=F.silu, bias=False, return_bias=False, memory_optimized_mlp=True,
        fp16=dtype == torch.float16, bf16=dtype == torch.bfloat16, moe_loss_weight=0, device=given.x.device,
    )  # fmt: skip
    experts = importlib.import_module("megablocks.layers.dmoe").ParallelDroplessMLP(arguments)
    gate_rows, up_rows = (half.reshape(-1, shape.d_model) for half in given.up.detach().chunk(2, dim=1))
    down_rows = given.down.detach().mT.reshape(-1, shape.d_model)
    weights = [nn.Parameter(rows.contiguous()) for rows in (gate_rows, up_rows, down_rows)]
    experts.mlp.w1, experts.mlp.v1, experts.mlp.w2 = weights

    def call() -> Tensor:
        scores = given.gate.new_zeros(given.tokens, shape.experts)
        out = experts(given.x[:, None], scores, given.gate, given.expert)
        return (out[0] if isinstance(out, tuple) else out).reshape(given.x.shape)

    return Runnable(call, weights[:2], weights[2:])


def _sonicmoe(given: Problem) -> Runnable:
    """SonicMoE from given choices; gate and up rows alternate, and the experts are the last axis."""
    package = importlib.import_module("sonicmoe")
    source = package if hasattr(package, "moe_general_routing_inputs") else importlib.import_module("sonicmoe.functional")
    function, kinds = source.moe_general_routing_inputs, importlib.import_module("sonicmoe.enums").ActivationType
    shape = given.shape
    gate_rows, up_rows = given.up.detach().chunk(2, dim=1)
    up = nn.Parameter(torch.stack([gate_rows, up_rows], dim=2).flatten(1, 2))
    down = nn.Parameter(given.down.detach())
    token_N = torch.arange(given.tokens, device=given.x.device, dtype=torch.int32).repeat_interleave(shape.top_k)
    expert_N = given.expert.flatten().int()

    def call() -> Tensor:
        stream = torch.cuda.current_stream().cuda_stream if given.x.is_cuda else 0
        arguments = given.x, given.gate.flatten().float(), token_N, expert_N, up.permute(1, 2, 0), None, down.permute(1, 2, 0), None
        return function(*arguments, shape.experts, stream, kinds.SWIGLU, not torch.is_grad_enabled())[0]

    return Runnable(call, (up,), (down,))


GPU_PEERS = (
    Peer("ScatterMoE", "scattermoe", _scattermoe), Peer("MegaBlocks", "megablocks", _megablocks), Peer("SonicMoE", "sonicmoe", _sonicmoe)
)  # fmt: skip


def missing(peer: Peer) -> str | None:
    """Why a peer is not there, or None."""
    return None if find_spec(peer.package) else f"{peer.package} is not installed"


def builders(given: Problem, mode: str) -> dict[str, Callable[[], Runnable] | str]:
    """By name: how everybody is built for a problem, or why somebody does not take part."""
    found: dict[str, Callable[[], Runnable] | str] = {OURS: lambda: ours(given)}
    reasons = [(peer.name, peer.build, peer.refuse(given, mode)) for peer in everybody() if peer.name in OTHERS_OF_THE_CPU]
    reasons += [(peer.name, peer.build, missing(peer)) for peer in GPU_PEERS]
    for name, build, reason in reasons:
        found[name] = reason if reason is not None else functools.partial(build, given)
    return found
