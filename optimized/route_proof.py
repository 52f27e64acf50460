"""The first seam, put to the proof: choices exactly, then logits, scores, gates and all their gradients by the policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from reference.autograd.conversion import array_of
from reference.autograd.layer import Routing, route_forward
from reference.autograd.tokens import TokenInfo, token_info
from reference.balancing import count_load
from reference.config import GatingConfig, MoEConfig, ScoresConfig
from reference.gating import limit_to_groups, top_k
from reference.proof.cases import Case, Inputs, draw
from reference.proof.equal import Outputs, Report, assert_equal
from reference.proof.teeth import assert_teeth, tensor_mutations

from .comparison import rounded_to
from .yardstick import farthest


def _tokens(inputs: Inputs, device: str) -> TokenInfo:
    return token_info(torch.Size(inputs.x.shape[:1]), pad_mask=torch.from_numpy(inputs.pad_mask).to(device), device=torch.device(device))


def routed(
    route: Callable, inputs: Inputs, dtype: str, device: str = "cpu", replay: Routing | None = None
) -> tuple[Routing, dict[str, NDArray]]:
    """(routing, arrays): what a `route_forward` computes of inputs in `dtype`, forward and backward.

    The arrays: "logits", "scores", "gate", then "dx" and every router parameter's gradient for fixed random cotangents of scores and gates.
    """
    kind = getattr(torch, dtype)
    params = {
        name: torch.tensor(array, dtype=kind if array.dtype.kind == "f" else None, device=device)
        for name, array in inputs.params.items()
        if name.startswith("router.")
    }
    trained = {
        name: tensor.requires_grad_() for name, tensor in params.items() if name.endswith(("weight", "bias")) and "correction" not in name
    }
    x_TD = torch.from_numpy(inputs.x).to(device, kind).requires_grad_()
    routing, _ = route(x_TD, params, inputs.config, _tokens(inputs, device), replay=replay)
    rng = np.random.default_rng(7)
    cotangents = [torch.from_numpy(rng.standard_normal(t.shape)).to(device, t.dtype) for t in (routing.scores, routing.gate)]
    leaves = {"dx": x_TD, **trained}
    gradients = torch.autograd.grad((routing.scores, routing.gate), list(leaves.values()), cotangents)
    outputs = {"logits": routing.logits, "scores": routing.scores, "gate": routing.gate, **dict(zip(leaves, gradients, strict=True))}
    return routing, {name: np.asarray(array_of(tensor), np.float64) for name, tensor in outputs.items()}


def _check_choices(inputs: Inputs, routing: Routing) -> None:
    """The discrete half has no tolerance: given the scores, there is one right choice, and with it one load."""
    gating, scores_TE = inputs.config.gating, np.asarray(array_of(routing.scores))
    bias = inputs.params["router.correction_bias"].astype(scores_TE.dtype) if gating.correction_bias else 0
    wanted_TK = top_k(limit_to_groups(scores_TE + bias, gating), gating.top_k)
    expert_TK, keep_TK = routing.expert.cpu().numpy(), routing.keep.cpu().numpy()
    real_TK = np.repeat(~inputs.pad_mask[:, None], gating.top_k, axis=1)
    load_E = count_load(wanted_TK, real_TK, inputs.config.experts.count)
    for name, found, wanted in (("expert", expert_TK, wanted_TK), ("keep", keep_TK, real_TK), ("load", routing.load.cpu().numpy(), load_E)):
        if not np.array_equal(found, wanted):
            raise AssertionError(f"{name} must be {wanted.tolist()}, not {found.tolist()}")


def routers(case: Case) -> Iterator[MoEConfig]:
    """The case's layer with its own plain router, and with one that has everything else that a choice can depend on."""
    plain = case.config()
    yield plain
    grouped = {"groups": 2, "top_groups": 1, "group_score": "top2_sum"} if case.E % 2 == 0 and case.K <= case.E // 2 else {}
    gating = GatingConfig(top_k=case.K, correction_bias=True, normalize="sum", eps=1e-20, scale=2.5, **grouped)
    yield dataclasses.replace(plain, scores=ScoresConfig(function="sigmoid"), gating=gating)


def prove_route(function: Callable, case: Case, dtype: str, device: str = "cpu") -> list[Report]:
    """The reports on a `route_forward` with two routers on the tokens of a case; neither drops nor draws. Raises AssertionError."""
    return [report for config in routers(case) for report in _prove(function, rounded_to(draw(case, config), dtype), dtype, device)]


def _prove(function: Callable, inputs: Inputs, dtype: str, device: str) -> list[Report]:
    routing, candidate = routed(function, inputs, dtype, device)
    _check_choices(inputs, routing)
    replay = routing._replace(**{name: getattr(routing, name).cpu() for name in ("expert", "gate", "keep", "load", "importance")})
    truth = routed(route_forward, inputs, "float64", replay=replay)[1]
    eager = farthest(lambda turned, _: routed(route_forward, turned, dtype, replay=replay)[1], inputs, truth)
    scales = _scales(inputs, replay)

    def assertion(outputs: Outputs) -> list[Report]:
        return assert_equal(outputs, truth, eager, dtype, scales=scales)

    assert_teeth(assertion, truth, tensor_mutations(truth, dtype), scales=scales, least=3 if len(inputs.x) else 0)
    return assertion(candidate)


def _scales(inputs: Inputs, replay: Routing) -> dict[str, NDArray]:
    """Substitute scales where gates of one expert are divided by their own sum and have no gradient: those of plain gates."""
    gating = inputs.config.gating
    if gating.top_k > 1 or gating.normalize == "none":
        return {}
    plain = dataclasses.replace(inputs.config, gating=dataclasses.replace(gating, normalize="none"))
    truth = routed(route_forward, dataclasses.replace(inputs, config=plain), "float64", replay=replay)[1]
    return {name: array for name, array in truth.items() if name == "dx" or name.startswith("router.")}
