"""x_TD → logits_TE → scores_TE in PyTorch; the equations and sources are those of `reference.scores`.

A function of the same name is the same function. A `…_forward` returns its output alone, for autograd keeps what the gradient needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .tokens import Draws, at_least_fp32


def logits_forward(x_TD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The linear router (router-logits), in fp32 or better whatever the dtype of its operands: [T, D] → [T, E]."""
    return nn.functional.linear(at_least_fp32(x_TD), at_least_fp32(weight), None if bias is None else at_least_fp32(bias))


def residual_forward(logits_TE: Tensor, previous_TE: Tensor, weight: Tensor) -> Tensor:
    """The logits and what a matrix makes of those of the layer before (router-residual): [T, E], [T, E], [E, E] → [T, E]."""
    return logits_TE + logits_forward(previous_TE, weight)


def no_norm_forward(x_TD: Tensor) -> Tensor:
    """The input as it is."""
    return x_TD


def rms_norm_forward(x_TD: Tensor) -> Tensor:
    """The router's input with an RMS of 1 (router-norm): [T, D] → [T, D] in fp32 or better."""
    x_TD = at_least_fp32(x_TD)
    return x_TD / torch.sqrt(x_TD.square().mean(1, keepdim=True) + 1e-6)


INPUT_NORMS: dict[str, Callable[[Tensor], Tensor]] = {"none": no_norm_forward, "rms": rms_norm_forward}


def softcap_forward(logits_TE: Tensor, cap: float) -> Tensor:
    """Logits bent into (−c, c) (softcap); c = 0 leaves them alone."""
    return logits_TE if cap == 0 else torch.tanh(logits_TE / cap) * cap


def jitter(x_TD: Tensor, scale: float, draws: Draws) -> Tensor:
    """Switch's jitter (jitter) on the router's copy of the input: [T, D] → [T, D] in fp32 or better, where a factor near 1 survives."""
    x_TD = at_least_fp32(x_TD)
    factor_TD = 1 - scale + 2 * scale * draws.uniform("jitter", x_TD.shape, x_TD)
    return x_TD * factor_TD.to(x_TD.dtype)


def no_noise(x_TD: Tensor, scale: float, draws: Draws) -> Tensor:
    """The input as it is."""
    return x_TD


INPUT_NOISE: dict[str, Callable[[Tensor, float, Draws], Tensor]] = {"none": no_noise, "jitter": jitter}


def softmax_forward(logits_TE: Tensor) -> Tensor:
    """Softmax over the experts (softmax): [T, E] → [T, E]."""
    return torch.softmax(logits_TE, 1)


def sigmoid_forward(logits_TE: Tensor) -> Tensor:
    """Each expert judged on its own (score-sigmoid): [T, E] → [T, E]."""
    return torch.sigmoid(logits_TE)


def sqrt_softplus_forward(logits_TE: Tensor) -> Tensor:
    """√log(1 + exp z) (score-sqrt-softplus): [T, E] → [T, E]; the gradient of a score that underflowed to 0 is 0, not 0/0."""
    inner_TE = torch.logaddexp(logits_TE, logits_TE.new_zeros(()))
    alive_TE = inner_TE > 0
    return torch.where(alive_TE, torch.where(alive_TE, inner_TE, 1).sqrt(), 0)


def relu_score_forward(logits_TE: Tensor) -> Tensor:
    """max(z, 0) (score-relu): [T, E] → [T, E]."""
    return torch.relu(logits_TE)


def identity_forward(logits_TE: Tensor) -> Tensor:
    """The logits themselves (score-identity)."""
    return logits_TE


def share_forward(scores_TE: Tensor) -> Tensor:
    """Scores ≥ 0 as a distribution over the experts (score-share): [T, E] → [T, E]."""
    return scores_TE / (scores_TE.sum(1, keepdim=True) + 1e-20)


class ScoreFunction(NamedTuple):
    """logits → scores, and scores → the distribution over all experts that the balance losses average."""

    forward: Callable[[Tensor], Tensor]
    probability_forward: Callable[[Tensor], Tensor]


SCORE_FUNCTIONS: dict[str, ScoreFunction] = {
    "softmax": ScoreFunction(softmax_forward, identity_forward),
    "sigmoid": ScoreFunction(sigmoid_forward, share_forward),
    "sqrt_softplus": ScoreFunction(sqrt_softplus_forward, share_forward),
    "relu": ScoreFunction(relu_score_forward, share_forward),
    "identity": ScoreFunction(identity_forward, softmax_forward),
}
