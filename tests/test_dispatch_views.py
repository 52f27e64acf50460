"""Dispatch as a sort and dispatch as GShard's einsum are one linear map, forward and backward."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from configs import SENT, random_params, random_tokens

from reference import Routing, apply_experts, moe_forward
from reference.dispatch import (
    DispatchCache,
    combine_backward,
    combine_forward,
    dispatch_backward,
    dispatch_forward,
    one_hot_combine,
    one_hot_dispatch,
    one_hot_slots,
)
from reference.experts import experts_forward


def routed(name: str, tokens: int) -> tuple[np.ndarray, Routing, int]:
    """(x [T, D], routing with drops and padding, E) of a training pass."""
    rng, config = np.random.default_rng(11), SENT[name]
    arguments = random_tokens(config, rng, tokens, groups=2, pads=min(tokens, 2))
    output, _ = moe_forward(params=random_params(config, rng), config=config, training=True, rng=rng, **arguments)
    return arguments["x_TD"], output.routing, config.experts.count


def filled(slots_ECD: np.ndarray, cache: DispatchCache) -> np.ndarray:
    """The slots that hold a row, in the order of the sort view: [N, D]."""
    count = np.diff(cache.bounds_P)
    return np.concatenate([slots_ECD[expert, :size] for expert, size in enumerate(count)])


def spread(rows_ND: np.ndarray, cache: DispatchCache, capacity: int) -> np.ndarray:
    """Rows back in slots, [E, C, D]; empty slots hold large numbers, which nothing may read."""
    slots_ECD = np.full((len(cache.bounds_P) - 1, capacity, rows_ND.shape[1]), 1e6)
    for expert, (start, end) in enumerate(zip(cache.bounds_P[:-1], cache.bounds_P[1:], strict=True)):
        slots_ECD[expert, : end - start] = rows_ND[start:end]
    return slots_ECD


@pytest.mark.parametrize("tokens", [0, 1, 12])
@pytest.mark.parametrize("name", SENT)
def test_sort_view_equals_one_hot_view(name: str, tokens: int) -> None:
    x_TD, routing, experts = routed(name, tokens)
    slot_TKEC = one_hot_slots(routing.expert, routing.keep, experts, tokens)
    rows_ND, cache = dispatch_forward(x_TD, routing.expert, routing.keep, experts)
    np.testing.assert_array_equal(filled(one_hot_dispatch(x_TD, slot_TKEC), cache), rows_ND)
    assert slot_TKEC.sum() == routing.keep.sum() == len(rows_ND)
    assert (slot_TKEC.sum((0, 1)) <= 1).all(), "a slot holds one row"

    out_ND = np.random.default_rng(1).standard_normal(rows_ND.shape)
    y_TD, _ = combine_forward(out_ND, routing.gate, cache)
    np.testing.assert_allclose(one_hot_combine(spread(out_ND, cache, tokens), routing.gate, slot_TKEC), y_TD, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", SENT)
def test_backward_of_the_sort_is_the_transposed_einsum(name: str) -> None:
    x_TD, routing, experts = routed(name, 12)
    rng = np.random.default_rng(2)
    slot_TKEC = one_hot_slots(routing.expert, routing.keep, experts, 12)
    rows_ND, cache = dispatch_forward(x_TD, routing.expert, routing.keep, experts)
    drows_ND = rng.standard_normal(rows_ND.shape)
    transposed = np.einsum("tkec,ecd->td", slot_TKEC, spread(drows_ND, cache, 12))
    np.testing.assert_allclose(dispatch_backward(drows_ND, cache), transposed, rtol=1e-13, atol=1e-13)

    out_ND, dy_TD = rng.standard_normal(rows_ND.shape), rng.standard_normal(x_TD.shape)
    dout_ND, dgate_TK = combine_backward(dy_TD, combine_forward(out_ND, routing.gate, cache)[1])
    dout_ECD = np.einsum("tk,tkec,td->ecd", routing.gate, slot_TKEC, dy_TD)
    np.testing.assert_allclose(dout_ND, filled(dout_ECD, cache), rtol=1e-13, atol=1e-13)
    expected_TK = np.einsum("tkec,ecd,td->tk", slot_TKEC, spread(out_ND, cache, 12), dy_TD)
    np.testing.assert_allclose(dgate_TK, expected_TK, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", SENT)
def test_dispatch_and_its_backward_are_adjoint(name: str) -> None:
    x_TD, routing, experts = routed(name, 12)
    rows_ND, cache = dispatch_forward(x_TD, routing.expert, routing.keep, experts)
    drows_ND = np.random.default_rng(3).standard_normal(rows_ND.shape)
    assert (rows_ND * drows_ND).sum() == pytest.approx((x_TD * dispatch_backward(drows_ND, cache)).sum(), rel=1e-12)


@pytest.mark.parametrize("name", SENT)
def test_the_layer_is_the_sum_over_experts_of_masked_dense_passes(name: str) -> None:
    """A third view without any dispatch: every expert on every token, weighted by its gate or 0."""
    rng, config = np.random.default_rng(11), SENT[name]
    params, arguments = random_params(config, rng), random_tokens(config, rng, 12, groups=2, pads=2)
    x_TD = arguments["x_TD"]
    routing = moe_forward(params=params, config=config, training=True, rng=rng, **arguments)[0].routing
    routing = dataclasses.replace(routing, draws={})  # no expert dropout
    weight_TE = np.zeros((12, config.experts.count))
    np.add.at(weight_TE, (np.arange(12)[:, None], routing.expert), routing.gate)
    every_ND = np.concatenate([x_TD] * config.experts.count)
    if config.experts.gate_inputs:
        every_ND, weight_TE = every_ND * weight_TE.T.reshape(-1, 1), (weight_TE != 0).astype(float)
    out_ND, _ = experts_forward(every_ND, 12 * np.arange(config.experts.count + 1), params, config.experts)
    expected_TD = np.einsum("te,etd->td", weight_TE, out_ND.reshape(config.experts.count, 12, -1))
    np.testing.assert_allclose(apply_experts(x_TD, routing, params, config), expected_TD, rtol=1e-12, atol=1e-12)
