"""Activations by themselves: slopes over their whole range, where they are clamped, numbers by hand, and both layouts of gate and up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reference.autograd import experts as torch_experts
from reference.experts import ACTIVATIONS, CLAMP, concatenate_gate_up, interleave_gate_up

every_activation = pytest.mark.parametrize("name", ACTIVATIONS)


@every_activation
def test_backward_is_the_slope_over_the_whole_range(name: str, rng: np.random.Generator) -> None:
    activation, step = ACTIVATIONS[name], 1e-6
    pre_NM = np.concatenate([rng.normal(0, 6, (200, 6)), rng.normal(0, 0.5, (50, 6))])
    for edge in (0.0, CLAMP):
        pre_NM = np.where(np.abs(np.abs(pre_NM) - edge) < 1e-3, edge + 0.5, pre_NM)
    assert (pre_NM > CLAMP).any() and (pre_NM < -CLAMP).any()
    hidden_NF, cache = activation.forward(pre_NM)
    dhidden_NF, along = rng.standard_normal(hidden_NF.shape), rng.standard_normal(pre_NM.shape)
    ahead, behind = (activation.forward(pre_NM + sign * step * along)[0] for sign in (1, -1))
    measured = (dhidden_NF * (ahead - behind)).sum(1) / (2 * step)
    derived = (activation.backward(dhidden_NF, cache) * along).sum(1)
    np.testing.assert_allclose(derived, measured, rtol=0, atol=1e-7 * (1 + np.abs(measured).max()))


@every_activation
@pytest.mark.parametrize("point", [0.0, CLAMP, -CLAMP, 3.0, -40.0, 40.0])
def test_pytorch_agrees_everywhere_also_on_the_edges(name: str, point: float, rng: np.random.Generator) -> None:
    pre_NM = point + np.where(np.arange(4) < 2, 0, rng.standard_normal((5, 4)))
    pre = torch.tensor(pre_NM, requires_grad=True)
    hidden = torch_experts.ACTIVATIONS[name](pre)
    hidden_NF, cache = ACTIVATIONS[name].forward(pre_NM)
    np.testing.assert_allclose(hidden.detach().numpy(), hidden_NF, rtol=1e-12, atol=1e-300)
    dhidden_NF = rng.standard_normal(hidden_NF.shape)
    hidden.backward(torch.tensor(dhidden_NF))
    assert pre.grad is not None
    np.testing.assert_allclose(pre.grad.numpy(), ACTIVATIONS[name].backward(dhidden_NF, cache), rtol=1e-11, atol=1e-14)


@every_activation
def test_a_row_of_zeros_gives_zero(name: str) -> None:
    """Else a bias-free expert would answer an empty row, and padded batches would differ from sorted ones."""
    assert not ACTIVATIONS[name].forward(np.zeros((2, 4)))[0].any()


def test_golden_clamped_swiglu_of_interleaved_rows() -> None:
    interleaved = np.array([[1.0, 2.0, -3.0, 0.5, 9.0, -9.0]]).T[None]
    hidden_NF, _ = ACTIVATIONS["clamped_swiglu"].forward(concatenate_gate_up(interleaved)[0].T)
    np.testing.assert_allclose(hidden_NF, [[2.537387, -0.027107, -41.999719]], atol=6e-7)


def test_activations_by_hand() -> None:
    assert ACTIVATIONS["relu2"].forward(np.array([[-2.0, 3.0]]))[0].tolist() == [[0.0, 9.0]]
    geglu = ACTIVATIONS["geglu"].forward(np.array([[1.0, 5.0]]))[0]
    np.testing.assert_allclose(geglu, [[5 * 0.8413447460685429]], rtol=1e-14)
    beyond = ACTIVATIONS["clamped_swiglu"].backward(np.ones((1, 1)), ACTIVATIONS["clamped_swiglu"].forward(np.array([[8.0, -8.0]]))[1])
    assert beyond.tolist() == [[0.0, 0.0]], "what was clamped has no gradient"
    below = ACTIVATIONS["clamped_swiglu"].forward(np.array([[-8.0, 1.0]]))[0][0, 0]
    assert below == pytest.approx(-8 / (1 + np.exp(8 * 1.702)) * 2), "the gate half is not clamped below"


@pytest.mark.parametrize("shape", [(2, 6, 3), (3, 8)])
def test_layouts_of_gate_and_up_are_inverse(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    weight = rng.standard_normal(shape)
    concatenated = concatenate_gate_up(weight)
    np.testing.assert_array_equal(concatenated[:, 0], weight[:, 0])
    np.testing.assert_array_equal(concatenated[:, 1], weight[:, 2])
    np.testing.assert_array_equal(concatenated[:, shape[1] // 2], weight[:, 1])
    np.testing.assert_array_equal(interleave_gate_up(concatenated), weight)
    twin = torch_experts.concatenate_gate_up(torch.tensor(weight))
    np.testing.assert_array_equal(twin.numpy(), concatenated)
    np.testing.assert_array_equal(torch_experts.interleave_gate_up(twin).numpy(), weight)
