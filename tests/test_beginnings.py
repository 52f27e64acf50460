"""1991 and 1994: gradients by finite differences, EM that never descends, and what the papers said would happen."""

from __future__ import annotations

import numpy as np
import pytest

from reference.beginnings import (
    LEAST_VARIANCE,
    NOISE,
    OBJECTIVES,
    LocalExperts,
    answers,
    competitive,
    descend,
    em_step,
    fit_by_em,
    fit_gate,
    hierarchy,
    local_experts,
    log_joint,
    log_likelihood,
    objective,
    piecewise_task,
    predict,
)

every_objective = pytest.mark.parametrize("name", OBJECTIVES)


@every_objective
@pytest.mark.parametrize("deviation", [1.0, 0.3])
def test_gradients_are_slopes(name: str, deviation: float, rng: np.random.Generator) -> None:
    task, model = piecewise_task(rng, 23), LocalExperts(rng.standard_normal((4, 3)), rng.standard_normal((4, 3)))
    _, gradient = objective(model, task, name, deviation)
    for part in range(2):
        for entry in np.ndindex(4, 3):
            ends = []
            for sign in (1, -1):
                arrays = [array.copy() for array in model]
                arrays[part][entry] += sign * 1e-6
                ends.append(objective(LocalExperts(*arrays), task, name, deviation)[0])
            assert gradient[part][entry] == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-7 * max(1, abs(ends[0])))


def test_objectives_by_hand() -> None:
    """One token, two experts trusted alike, of which one is right and the other off by 2."""
    answer, target_T = answers(LocalExperts(np.zeros((2, 1)), np.array([[3.0], [1.0]])), np.ones((1, 1))), np.array([3.0])
    losses = {name: rule(answer, target_T, 1.0).loss for name, rule in OBJECTIVES.items()}
    assert losses == pytest.approx({"cooperative": 1.0, "expected": 2.0, "competitive": -np.log(0.5 * (1 + np.exp(-2)))})
    push = {name: rule(answer, target_T, 1.0).dout_TE[0] for name, rule in OBJECTIVES.items()}
    assert push["cooperative"][0] == push["cooperative"][1] == -1, "the expert that is right is moved as far as the one that is wrong"
    assert push["expected"][0] == push["competitive"][0] == 0
    assert push["expected"][1] == -2 and push["competitive"][1] == pytest.approx(-2 / (1 + np.exp(2)))


def test_the_gate_runs_after_the_posterior(rng: np.random.Generator) -> None:
    task, model = piecewise_task(rng, 9), local_experts(3, 3, rng)
    answer = answers(model, task.x_TD)
    joint = answer.share_TE * np.exp(-((task.target_T[:, None] - answer.out_TE) ** 2) / 2)
    posterior = joint / joint.sum(1, keepdims=True)
    np.testing.assert_allclose(9 * competitive(answer, task.target_T, 1.0).dlogits_TE, answer.share_TE - posterior, atol=1e-14)


def test_copies_stay_copies(rng: np.random.Generator) -> None:
    task = piecewise_task(rng, 50)
    model = LocalExperts(np.zeros((3, 3)), np.repeat(rng.standard_normal((1, 3)), 3, axis=0))
    moved, _ = descend(model, task, "competitive", steps=20, rate=0.2)
    np.testing.assert_allclose(moved.expert - moved.expert[0], 0, atol=1e-12)


def test_cooperation_blends_better_and_competition_makes_experts_that_stand_alone() -> None:
    """The argument of 1991, in the mean of four tasks: error of the blend, and of the one expert that the gate trusts most."""
    blend, alone = {}, {}
    for name in ("cooperative", "competitive"):
        errors = []
        for seed in range(4):
            task = piecewise_task(np.random.default_rng(seed), 300)
            model, losses = descend(local_experts(4, 3, np.random.default_rng(seed + 100)), task, name, steps=1000, rate=0.3)
            assert losses[-1] < 0.5 * losses[0]
            share_TE, out_TE = answers(model, task.x_TD)
            trusted_T = out_TE[np.arange(300), share_TE.argmax(1)]
            errors.append([((answer_T - task.target_T) ** 2).mean() for answer_T in ((share_TE * out_TE).sum(1), trusted_T)])
        blend[name], alone[name] = np.mean(errors, axis=0)
    assert blend["cooperative"] < blend["competitive"]
    assert alone["competitive"] < 0.7 * alone["cooperative"]


@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (3, 1), (3, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_em_never_descends(shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    task = piecewise_task(rng, 120)
    _, likelihoods = fit_by_em(hierarchy(*shape, task, rng), task, 25)
    assert len(likelihoods) == 26 and likelihoods[-1] > likelihoods[0] + 30
    steps = np.diff(likelihoods)
    assert steps.min() >= -1e-8 * np.abs(likelihoods).max()


def test_em_finds_the_noise_of_the_task() -> None:
    rng = np.random.default_rng(0)
    task = piecewise_task(rng, 400)
    model, likelihoods = fit_by_em(hierarchy(2, 2, task, rng), task, 40)
    assert model.variance == pytest.approx(NOISE**2, rel=0.25)
    plane = np.linalg.lstsq(task.x_TD, task.target_T, rcond=None)[0]
    single = ((task.x_TD @ plane - task.target_T) ** 2).mean()
    assert ((predict(model, task.x_TD) - task.target_T) ** 2).mean() < 0.1 * single and likelihoods[-1] == log_likelihood(model, task)


def test_hierarchy_of_one_leaf_is_least_squares(rng: np.random.Generator) -> None:
    task = piecewise_task(rng, 40)
    model = em_step(hierarchy(1, 1, task, rng), task)
    plane, residual = np.linalg.lstsq(task.x_TD, task.target_T, rcond=None)[:2]
    np.testing.assert_allclose(model.expert[0, 0], plane, rtol=1e-10)
    assert model.variance == pytest.approx(residual[0] / 40)
    normal = -20 * np.log(2 * np.pi * model.variance) - 20
    assert log_likelihood(model, task) == pytest.approx(normal)


def test_exact_data_do_not_end_in_infinity(rng: np.random.Generator) -> None:
    task = piecewise_task(rng, 30)._replace(target_T=np.zeros(30))
    model, likelihoods = fit_by_em(hierarchy(2, 2, task, rng), task, 10)
    assert model.variance == LEAST_VARIANCE and np.isfinite(likelihoods).all()


def test_joint_is_a_distribution_over_leaves_and_targets(rng: np.random.Generator) -> None:
    task = piecewise_task(rng, 3)
    model = hierarchy(2, 2, task, rng)._replace(top=rng.standard_normal((2, 3)), inner=rng.standard_normal((2, 2, 3)))
    grid = np.linspace(-40, 40, 4001)
    total = sum(np.exp(log_joint(model, task._replace(target_T=np.full(3, y)))).sum((1, 2)) for y in grid) * (grid[1] - grid[0])
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_prediction_is_the_mean_of_the_joint(rng: np.random.Generator) -> None:
    task = piecewise_task(rng, 3)
    model = hierarchy(2, 3, task, rng)._replace(top=rng.standard_normal((2, 3)), inner=rng.standard_normal((2, 3, 3)))
    grid = np.linspace(-60, 60, 4001)
    mean = sum(y * np.exp(log_joint(model, task._replace(target_T=np.full(3, y)))).sum((1, 2)) for y in grid) * (grid[1] - grid[0])
    np.testing.assert_allclose(predict(model, task.x_TD), mean, rtol=1e-6)


def test_gate_fit_finds_the_shares_where_x_says_nothing() -> None:
    wanted = np.array([[0.7, 0.2, 0.1]] * 5)
    gate = fit_gate(np.zeros((3, 1)), np.ones((5, 1)), wanted, np.ones(5), steps=30)
    np.testing.assert_allclose(np.exp(gate[:, 0]) / np.exp(gate[:, 0]).sum(), wanted[0], rtol=1e-6)


def test_objective_refuses_what_it_does_not_know(rng: np.random.Generator) -> None:
    task, model = piecewise_task(rng, 4), local_experts(2, 3, rng)
    with pytest.raises(ValueError, match="the objective is 'greedy'; known: cooperative, expected, competitive"):
        objective(model, task, "greedy")
    with pytest.raises(ValueError, match="deviation is 0"):
        objective(model, task, "competitive", 0)
