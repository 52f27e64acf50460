"""Overlap of experts: copies are found however they are disguised, strangers are not, and the null knows the difference."""

from __future__ import annotations

import numpy as np
import pytest

from reference import ExpertsConfig, GatingConfig, MoEConfig, init_params
from reference.experts import ffn_forward
from reference.overlap import all_outputs, hidden_units, output_overlap, weight_overlap


def layer(activation: str = "swiglu", experts: int = 4) -> tuple[MoEConfig, dict[str, np.ndarray]]:
    config = MoEConfig(12, gating=GatingConfig(top_k=2), experts=ExpertsConfig(experts, 10, activation))
    return config, init_params(config, np.random.default_rng(0))


def upcycled(activation: str, rng: np.random.Generator) -> tuple[MoEConfig, dict[str, np.ndarray]]:
    """Experts that are one network, each with its hidden units in another order."""
    config, params = layer(activation)
    first = "gate_up_proj" if activation == "swiglu" else "up_proj"
    up, down = params[f"experts.{first}"][0], params["experts.down_proj"][0]
    orders = [rng.permutation(10) for _ in range(4)]
    halves = up.reshape(-1, 10, 12)
    params[f"experts.{first}"] = np.stack([halves[:, order].reshape(up.shape) for order in orders])
    params["experts.down_proj"] = np.stack([down[:, order] for order in orders])
    return config, params


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_units_hold_what_a_unit_reads_and_writes(activation: str) -> None:
    config, params = layer(activation)
    units = hidden_units(params, config)
    first = params["experts.gate_up_proj" if activation == "swiglu" else "experts.up_proj"]
    assert units.shape == (4, 10, 3 if activation == "swiglu" else 2, 12)
    np.testing.assert_array_equal(units[2, 3, 0], first[2, 3])
    np.testing.assert_array_equal(units[2, 3, -2], first[2, 13 if activation == "swiglu" else 3])
    np.testing.assert_array_equal(units[2, 3, -1], params["experts.down_proj"][2, :, 3])


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_copies_with_shuffled_units_overlap_wholly_and_fresh_experts_by_chance(activation: str, rng: np.random.Generator) -> None:
    config, params = upcycled(activation, rng)
    found = weight_overlap(hidden_units(params, config), rng)
    assert found.value == pytest.approx(1) and found.p_value == 1 / 21 and found.null_high < 0.7
    x_TD = rng.standard_normal((30, 12))
    outputs = output_overlap(all_outputs(x_TD, params, config), rng)
    assert outputs.value == pytest.approx(1) and outputs.p_value == 1 / 201
    config, params = layer(activation)
    fresh = weight_overlap(hidden_units(params, config), rng)
    assert fresh.null_low - 0.03 < fresh.value < fresh.null_high + 0.03 and fresh.value > 0.1
    outputs = output_overlap(all_outputs(rng.standard_normal((300, 12)), params, config), rng)
    assert abs(outputs.value) < 0.1


def test_golden_values() -> None:
    # two experts of one ReLU unit each: (1, 0 | 0, 1) and (1, 0 | 1, 0); cosine 1 / 2
    units = np.array([[[[1.0, 0.0], [0.0, 1.0]]], [[[1.0, 0.0], [1.0, 0.0]]]])
    assert weight_overlap(units, np.random.default_rng(0)).value == pytest.approx(0.5)
    # cosines of the two tokens: 0 and 1
    out = np.array([[[1.0, 0.0], [2.0, 2.0]], [[0.0, 3.0], [1.0, 1.0]]])
    assert output_overlap(out, np.random.default_rng(0)).value == pytest.approx(0.5)


def test_weight_overlap_ignores_scale_and_order_and_takes_the_best_counterpart(rng: np.random.Generator) -> None:
    units = rng.standard_normal((3, 5, 2, 7))
    written_out = []
    for e in range(3):
        for f in range(3):
            for i in range(5) if e != f else ():
                own = units[e, i].ravel()
                others = [units[f, j].ravel() for j in range(5)]
                written_out.append(max(own @ other / np.linalg.norm(own) / np.linalg.norm(other) for other in others))
    assert weight_overlap(units, rng).value == pytest.approx(np.mean(written_out))
    changed = 3 * units[[2, 0, 1]][:, rng.permutation(5)]
    assert weight_overlap(changed, rng).value == pytest.approx(np.mean(written_out))


def test_common_direction_is_in_the_null_of_outputs(rng: np.random.Generator) -> None:
    shared = rng.standard_normal((3, 200, 8)) + 4 * np.ones(8)
    found = output_overlap(shared, rng)
    assert found.value > 0.8 and abs(found.excess) < 0.01
    same_tokens = rng.standard_normal((3, 200, 8)) + 2 * rng.standard_normal((200, 8))
    assert output_overlap(same_tokens, rng).excess > 0.5


def test_all_outputs_are_each_experts_own(rng: np.random.Generator) -> None:
    config, params = layer()
    x_TD = rng.standard_normal((5, 12))
    out = all_outputs(x_TD, params, config)
    from reference.experts import FFN

    for e in range(4):
        own = FFN(params["experts.gate_up_proj"][e], params["experts.down_proj"][e], None, None)
        np.testing.assert_allclose(out[e], ffn_forward(x_TD, own, "swiglu")[0], rtol=1e-12)


def test_dead_units_and_silent_experts_count_as_unlike(rng: np.random.Generator) -> None:
    assert weight_overlap(np.zeros((2, 3, 2, 4)), rng).value == 0
    assert output_overlap(np.zeros((2, 3, 4)), rng).value == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rng: weight_overlap(np.zeros((2, 3)), rng), r"\(2, 3\)"),
        (lambda rng: weight_overlap(np.zeros((1, 3, 4)), rng), "there is 1 expert"),
        (lambda rng: weight_overlap(np.zeros((2, 3, 4)), rng, draws=0), "draws is 0"),
        (lambda rng: weight_overlap(np.zeros((2, 3, 4)), 3), "rng is 3"),
        (lambda rng: output_overlap(np.zeros((2, 0, 4)), rng), r"\(2, 0, 4\).*at least 1 token"),
        (lambda rng: output_overlap(np.zeros((1, 2, 4)), rng), "there is 1 expert"),
        (lambda rng: hidden_units({}, layer()[0]), "no 'experts.gate_up_proj'"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0))
