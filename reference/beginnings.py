"""Where mixtures of experts began: the local experts of 1991, trained by gradients, and the hierarchy of 1994, trained by EM.

Both are dense (every expert answers every token) and small: an expert is one plane over the input, whose last column is the constant 1.
What survives in today's layers is the gate that is chased by a posterior, and that experts must compete before they specialise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .config import require
from .scores import softmax_forward


class Task(NamedTuple):
    """x [T, 3]: points of the square [−1, 1]², and a constant 1; target [T], made by a plane; region [T]: which of the four it was."""

    x_TD: np.ndarray
    target_T: np.ndarray
    region_T: np.ndarray


PLANES = np.array([[2.0, 0.0, 1.0], [0.0, -2.0, -1.0], [-2.0, 1.0, 0.0], [1.0, 2.0, 0.5]])
NOISE = 0.1


def piecewise_task(rng: np.random.Generator, tokens: int) -> Task:
    """Four quadrants, a plane over each, and normal noise of size 0.1: no single plane fits, four experts fit exactly."""
    x_TD = np.column_stack([rng.uniform(-1, 1, (tokens, 2)), np.ones(tokens)])
    region_T = 2 * (x_TD[:, 0] > 0) + (x_TD[:, 1] > 0)
    return Task(x_TD, (PLANES[region_T] * x_TD).sum(1) + NOISE * rng.standard_normal(tokens), region_T)


class LocalExperts(NamedTuple):
    """gate [E, D] and expert [E, D]: the rows of two linear maps."""

    gate: np.ndarray
    expert: np.ndarray


def local_experts(experts: int, width: int, rng: np.random.Generator) -> LocalExperts:
    """Experts that start apart (copies would receive equal gradients for ever) under a gate that starts undecided."""
    return LocalExperts(np.zeros((experts, width)), 0.5 * rng.standard_normal((experts, width)))


class Answers(NamedTuple):
    """What every expert says, and how much the gate trusts it: [T, E] each."""

    share_TE: np.ndarray
    out_TE: np.ndarray


def answers(model: LocalExperts, x_TD: np.ndarray) -> Answers:
    """(softmax of the gate, the experts' planes) at x."""
    return Answers(softmax_forward(x_TD @ model.gate.T)[0], x_TD @ model.expert.T)


class Objective(NamedTuple):
    """A loss and its cotangents of the gate's logits and of the experts' outputs."""

    loss: float
    dlogits_TE: np.ndarray
    dout_TE: np.ndarray


def cooperative(answer: Answers, target_T: np.ndarray, deviation: float) -> Objective:
    """The loss that 1991 argues against (loss-cooperative): L = mean_t (y − Σ_e g_e o_e)², in which experts correct one another.

    Gradient: do_e = 2 (m − y) g_e / T and dz_e = 2 (m − y) g_e (o_e − m) / T for the blend m: all of them see one residual.
    Source: Jacobs, Jordan, Nowlan and Hinton 1991, eq. 1.
    """
    share_TE, out_TE = answer
    blend_T = (share_TE * out_TE).sum(1)
    residual_T = blend_T - target_T
    slope_TE = 2 * residual_T[:, None] * share_TE / max(len(target_T), 1)
    return Objective(float((residual_T**2).sum()) / max(len(target_T), 1), slope_TE * (out_TE - blend_T[:, None]), slope_TE)


def expected(answer: Answers, target_T: np.ndarray, deviation: float) -> Objective:
    """Experts that are drawn, not blended (loss-expected): L = mean_t Σ_e g_e (y − o_e)², each with its own residual.

    Gradient: do_e = −2 g_e (y − o_e) / T and dz_e = g_e (ε_e − Σ_j g_j ε_j) / T, ε the squared errors.
    Source: Jacobs, Jordan, Nowlan and Hinton 1991, eq. 2.
    """
    share_TE, out_TE = answer
    error_TE, tokens = (target_T[:, None] - out_TE) ** 2, max(len(target_T), 1)
    mean_T = (share_TE * error_TE).sum(1)
    dlogits_TE = share_TE * (error_TE - mean_T[:, None]) / tokens
    return Objective(float(mean_T.sum()) / tokens, dlogits_TE, -2 * share_TE * (target_T[:, None] - out_TE) / tokens)


def competitive(answer: Answers, target_T: np.ndarray, deviation: float) -> Objective:
    """The loss that 1991 proposes (loss-competitive): L = −mean_t log Σ_e g_e exp(−(y − o_e)² / 2σ²), a mixture's likelihood.

    Gradient: with the posterior h_e ∝ g_e exp(−(y − o_e)² / 2σ²), do_e = −h_e (y − o_e) / (σ² T) and dz_e = (g_e − h_e) / T: the gate
    runs after the posterior, and an expert that explains a token best learns most from it.
    Source: Jacobs, Jordan, Nowlan and Hinton 1991, eq. 3. Deviates: there σ = 1; the constant of the normal density is left out in both.
    """
    share_TE, out_TE = answer
    tokens = max(len(target_T), 1)
    joint_TE = np.log(share_TE) - (target_T[:, None] - out_TE) ** 2 / (2 * deviation**2)
    posterior_TE, _ = softmax_forward(joint_TE)
    loss = -float(np.logaddexp.reduce(joint_TE, axis=1).sum()) / tokens
    dout_TE = -posterior_TE * (target_T[:, None] - out_TE) / (deviation**2 * tokens)
    return Objective(loss, (share_TE - posterior_TE) / tokens, dout_TE)


OBJECTIVES: dict[str, Callable[[Answers, np.ndarray, float], Objective]] = {
    "cooperative": cooperative,
    "expected": expected,
    "competitive": competitive,
}
"""The three losses by name: (answers, target [T], deviation σ) → loss and cotangents."""


def objective(model: LocalExperts, task: Task, name: str, deviation: float = 1.0) -> tuple[float, LocalExperts]:
    """(loss, gradients) of one of OBJECTIVES on a task. Raises: ValueError for another name, or a deviation that is not > 0."""
    require(name in OBJECTIVES, f"the objective is {name!r}; known: {', '.join(OBJECTIVES)}")
    require(deviation > 0, f"deviation is {deviation}; it must be > 0")
    loss, dlogits_TE, dout_TE = OBJECTIVES[name](answers(model, task.x_TD), task.target_T, deviation)
    return loss, LocalExperts(dlogits_TE.T @ task.x_TD, dout_TE.T @ task.x_TD)


def descend(
    model: LocalExperts, task: Task, name: str, *, steps: int, rate: float, deviation: float = 1.0
) -> tuple[LocalExperts, list[float]]:
    """Plain gradient descent: (the model after it, the loss before each step)."""
    losses = []
    for _ in range(steps):
        loss, gradient = objective(model, task, name, deviation)
        model = LocalExperts(*(weight - rate * slope for weight, slope in zip(model, gradient, strict=True)))
        losses.append(loss)
    return model, losses


class Hierarchy(NamedTuple):
    """A tree of two levels: top [G, D], inner [G, I, D] and expert [G, I, D] are rows of linear maps; variance of the noise."""

    top: np.ndarray
    inner: np.ndarray
    expert: np.ndarray
    variance: float


LEAST_VARIANCE = 1e-6


def hierarchy(groups: int, members: int, task: Task, rng: np.random.Generator) -> Hierarchy:
    """Undecided gates, experts that start apart, and the variance of the target."""
    width = task.x_TD.shape[1]
    inner = np.zeros((groups, members, width))
    return Hierarchy(np.zeros((groups, width)), inner, rng.standard_normal(inner.shape), float(task.target_T.var()) + LEAST_VARIANCE)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, so that both levels of the tree can use it."""
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def log_joint(model: Hierarchy, task: Task) -> np.ndarray:
    """Log probability of each leaf and the target together (hierarchy-joint): log g_g + log g_i|g + log N(y; μ_gi, σ²), [T, G, I]."""
    x_TD, target_T = task.x_TD, task.target_T
    mean_TGI = np.einsum("td,gid->tgi", x_TD, model.expert)
    density_TGI = -0.5 * np.log(2 * np.pi * model.variance) - (target_T[:, None, None] - mean_TGI) ** 2 / (2 * model.variance)
    inner_TGI = _log_softmax(np.einsum("td,gid->tgi", x_TD, model.inner))
    return _log_softmax(x_TD @ model.top.T)[:, :, None] + inner_TGI + density_TGI


def log_likelihood(model: Hierarchy, task: Task) -> float:
    """Σ_t log Σ_g Σ_i P(g, i, y_t | x_t)."""
    joint_TGI = log_joint(model, task)
    return float(np.logaddexp.reduce(joint_TGI.reshape(len(joint_TGI), -1), axis=1).sum())


def predict(model: Hierarchy, x_TD: np.ndarray) -> np.ndarray:
    """The blend of all leaves (hierarchy): μ_t = Σ_g g_g Σ_i g_i|g μ_gi, [T]. Source: Jordan and Jacobs 1994."""
    log_share_TGI = _log_softmax(x_TD @ model.top.T)[:, :, None] + _log_softmax(np.einsum("td,gid->tgi", x_TD, model.inner))
    return np.einsum("tgi,td,gid->t", np.exp(log_share_TGI), x_TD, model.expert)


def fit_gate(gate: np.ndarray, x_TD: np.ndarray, wanted_TE: np.ndarray, weight_T: np.ndarray, steps: int = 3) -> np.ndarray:
    """Newton steps on the gate's part of the M-step, max Σ_t w_t Σ_e h_te log softmax(V x_t)_e, each halved until it does not descend.

    Shapes: gate [E, D]; wanted [T, E], the posterior; weight [T] → gate [E, D]. The function is concave and flat where all logits move
    together, and without a maximum where x tells the experts apart: the curvature is damped.
    Source: Jordan and Jacobs 1994: IRLS. Deviates: there a full step, which may descend.
    """

    def height(candidate: np.ndarray) -> float:
        return float((weight_T[:, None] * wanted_TE * _log_softmax(x_TD @ candidate.T)).sum())

    experts, width = gate.shape
    for _ in range(steps):
        share_TE, _ = softmax_forward(x_TD @ gate.T)
        slope = ((wanted_TE - share_TE) * weight_T[:, None]).T @ x_TD
        spread = np.einsum("te,ef->tef", share_TE, np.eye(experts)) - share_TE[:, :, None] * share_TE[:, None]
        curvature = np.einsum("t,tef,tc,td->ecfd", weight_T, spread, x_TD, x_TD, optimize=True).reshape(2 * (experts * width,))
        step = np.linalg.solve(curvature + (1e-3 + 1e-3 * np.trace(curvature)) * np.eye(len(curvature)), slope.ravel()).reshape(gate.shape)
        before, scale = height(gate), 1.0
        while height(gate + scale * step) < before and scale > 1e-6:
            scale /= 2
        gate = gate + scale * step * (scale > 1e-6)
    return gate


def em_step(model: Hierarchy, task: Task) -> Hierarchy:
    """One round of EM (hierarchy-em): posteriors h_gi, then experts by least squares weighted with h_gi, the variance, and both gates.

    The experts and the variance are at their maximum afterwards, the gates higher than before, so the likelihood never decreases.
    Source: Jordan and Jacobs 1994. Deviates: one variance for all experts, kept above 1e-6.
    """
    x_TD, target_T = task.x_TD, task.target_T
    joint_TGI = log_joint(model, task)
    posterior_TGI = softmax_forward(joint_TGI.reshape(len(joint_TGI), -1))[0].reshape(joint_TGI.shape)
    group_TG = posterior_TGI.sum(2)
    expert = np.empty_like(model.expert)
    for leaf in np.ndindex(*expert.shape[:2]):
        root_T = np.sqrt(posterior_TGI[:, *leaf])
        expert[leaf] = np.linalg.lstsq(root_T[:, None] * x_TD, root_T * target_T, rcond=None)[0]
    residual_TGI = target_T[:, None, None] - np.einsum("td,gid->tgi", x_TD, expert)
    variance = float((posterior_TGI * residual_TGI**2).sum()) / len(x_TD)
    top = fit_gate(model.top, x_TD, group_TG, np.ones(len(x_TD)))
    inner = np.stack([
        fit_gate(gate, x_TD, posterior_TGI[:, g] / np.maximum(group_TG[:, g, None], 1e-300), group_TG[:, g])
        for g, gate in enumerate(model.inner)
    ])  # fmt: skip
    return Hierarchy(top, inner, expert, max(variance, LEAST_VARIANCE))


def fit_by_em(model: Hierarchy, task: Task, steps: int) -> tuple[Hierarchy, list[float]]:
    """(the hierarchy after `steps` rounds, the log-likelihood before each and after the last)."""
    likelihoods = [log_likelihood(model, task)]
    for _ in range(steps):
        model = em_step(model, task)
        likelihoods.append(log_likelihood(model, task))
    return model, likelihoods
