"""The proof of the first seam accepts the reference in every dtype and notices every kind of wrong router."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from optimized.contracts import Contract
from optimized.proofs import prove
from optimized.route_proof import routers
from reference.autograd.layer import route_forward
from reference.proof.cases import CASES, get, small

EQUALS = "reference.autograd.layer.route_forward"


def promise(function: Callable, *dtypes: str) -> Contract:
    return Contract("a.route", function, EQUALS, "torch", ("x", "params"), dtypes, "")


def same(x_TD, params, config, tokens, *, training=False, rng=None, replay=None):
    return route_forward(x_TD, params, config, tokens, training=training, rng=rng, replay=replay)


FEW = ("few-tokens", "top-1", "drops")
TRIED = [(case, "float32") for case in small() if case.T <= 65]
TRIED += [(get(name), dtype) for name in FEW for dtype in ("float64", "bfloat16", "float16")]


@pytest.mark.parametrize("case, dtype", TRIED, ids=lambda value: getattr(value, "name", value))
def test_the_reference_keeps_the_promise(case: Any, dtype: str) -> None:
    reports = prove(promise(same, dtype), case, dtype)
    assert len(reports) >= 10 and all(report.passed for report in reports)


def changed(**change: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    def wrong(x_TD, params, config, tokens, *, training=False, rng=None, replay=None):
        routing, losses = route_forward(x_TD, params, config, tokens, training=training, rng=rng, replay=replay)
        return routing._replace(**{name: edit(getattr(routing, name)) for name, edit in change.items()}), losses

    return wrong


def without_bias(x_TD, params, config, tokens, *, training=False, rng=None, replay=None):
    without = {name: torch.zeros_like(value) if "correction" in name else value for name, value in params.items()}
    return route_forward(x_TD, without, config, tokens, training=training, rng=rng, replay=replay)


WRONG = {
    "gates 0.1 % too large": (changed(gate=lambda gate: gate * 1.001), "^gate"),
    "slots in another order": (changed(expert=lambda expert: expert.flip(1)), "^expert must be"),
    "the next expert": (changed(expert=lambda expert: (expert + 1) % expert.max().clamp(min=1)), "^expert must be"),
    "no correction bias": (without_bias, "^expert must be"),
    "one assignment not counted": (
        changed(load=lambda load: load - torch.eye(len(load), dtype=load.dtype)[load.argmax()]),
        "^load must be",
    ),
    "one assignment not kept": (changed(keep=lambda keep: keep & (torch.arange(keep.numel()).view_as(keep) > 0)), "^keep must be"),
    "gates without a gradient": (changed(gate=lambda gate: gate.detach() + 0 * gate), "^dx"),
    "scores without a gradient": (changed(scores=lambda scores: scores.detach() + 0 * scores), "^dx"),
    "a score of its own": (changed(scores=lambda scores: scores.abs() ** 1.01), "^scores|^expert must be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_router_is_noticed(name: str) -> None:
    wrong, message = WRONG[name]
    with pytest.raises(AssertionError) as failure:
        prove(promise(wrong, "float32"), get("few-tokens"), "float32")
    assert re.search(message, str(failure.value), re.MULTILINE), str(failure.value)[:500]


def test_both_routers_have_the_shape_of_the_case() -> None:
    for case in CASES:
        plain, rich = routers(case)
        assert (plain.d_model, plain.gating.top_k, plain.experts.count) == (rich.d_model, rich.gating.top_k, rich.experts.count)
        assert rich.gating.correction_bias and rich.scores.function == "sigmoid"
    assert any(list(routers(case))[1].gating.groups == 2 for case in CASES)
