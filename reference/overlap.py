"""Whether two experts are the same expert: by their weights, and by what they answer to the same tokens.

Neither needs labels. Both start near chance when experts are drawn anew, and at 1 when they start as copies (upcycling).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from .config import MoEConfig, require
from .experts import ACTIVATIONS, experts_forward, ffn_keys
from .specialization import Chance, against_chance, check_draws


def hidden_units(params: Mapping[str, np.ndarray], config: MoEConfig) -> np.ndarray:
    """Each hidden unit of each expert as the vectors that it reads and writes: [E, F, 3, D] gated (gate, up, down), else [E, F, 2, D].

    Biases are left out. Raises ValueError where a matrix is missing.
    """
    experts = config.experts
    first, down = ffn_keys("experts", experts)[:2]
    for key in (first, down):
        require(key in params, f"params has no {key!r}; the experts of this config have {first} and {down}")
    halves = 2 if ACTIVATIONS[experts.activation].gated else 1
    reads = np.asarray(params[first], np.float64).reshape(experts.count, halves, experts.width, config.d_model)
    writes = np.asarray(params[down], np.float64).transpose(0, 2, 1)[:, None]
    return np.concatenate([reads, writes], axis=1).transpose(0, 2, 1, 3)


def _pairs(experts: int) -> list[tuple[int, int]]:
    require(experts >= 2, f"there is {experts} expert; an overlap needs at least 2")
    return [(e, f) for e in range(experts) for f in range(experts) if e != f]


def _directions(vectors: np.ndarray) -> np.ndarray:
    """Vectors of the last axis at length 1; a zero vector stays zero, and so has cosine 0 with all others."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def _rotation(rng: np.random.Generator, width: int) -> np.ndarray:
    """A rotation or reflection of the model's space, uniform (Haar): QR with the signs of the diagonal taken out."""
    basis, upper = np.linalg.qr(rng.standard_normal((width, width)))
    return basis * np.sign(np.diag(upper))


def weight_overlap(units: np.ndarray, rng: np.random.Generator, *, draws: int = 20) -> Chance:
    """How alike the hidden units of two experts are, the mean over all pairs, beside experts that were turned at random.

    Equation (weight-overlap): O = mean over e ≠ f and units i of e of max_j cos(u_ei, u_fj).

    The order of hidden units means nothing, so each unit is compared with its best counterpart: copies have O = 1 however their units are
    shuffled. The best of F is above 0 by chance alone. A draw of the null turns each expert by a rotation of its own, the same for
    all vectors of the expert: what it computes inside stays, only its directions relative to the other experts are lost.

    Shapes: units [E, F, …, D] as of `hidden_units`. 2 ≤ E. O lies in [−1, 1]. No gradient.
    Raises ValueError for another shape, fewer than two experts, draws < 1, and an `rng` that is no Generator.
    Deviates: published overlaps take the cosine of whole matrices, which is 0 for a copy with shuffled units. Here as there, a gated unit
    whose up and down vectors are both negated counts as another one, although it computes the same.
    """
    check_draws(rng, draws, "draws")
    units = np.asarray(units, np.float64)
    require(units.ndim >= 3, f"units has shape {units.shape}; it must be [E, F, …, D]")
    pairs = _pairs(len(units))

    def overlap(turned: np.ndarray) -> float:
        unit = _directions(turned.reshape(*turned.shape[:2], -1))
        return float(np.mean([(unit[e] @ unit[f].T).max(1).mean() for e, f in pairs]))

    null = [overlap(np.stack([expert @ _rotation(rng, units.shape[-1]) for expert in units])) for _ in range(draws)]
    return against_chance(overlap(units), null)


def all_outputs(x_TD: np.ndarray, params: Mapping[str, np.ndarray], config: MoEConfig) -> np.ndarray:
    """What every expert says about every token, asked or not: out [E, T, D] for x [T, D]; no gates."""
    experts, (tokens, width) = config.experts.count, x_TD.shape
    rows_ND, bounds_P = np.tile(x_TD, (experts, 1)), np.arange(experts + 1) * tokens
    return experts_forward(rows_ND, bounds_P, dict(params), config.experts)[0].reshape(experts, tokens, width)


def output_overlap(out: ArrayLike, rng: np.random.Generator, *, draws: int = 200) -> Chance:
    """How alike two experts answer one token, the mean over all tokens and pairs, beside their answers to different tokens.

    Equation (output-overlap): O = mean over t and e ≠ f of cos(o_et, o_ft).

    A draw of the null permutes the tokens of each expert by itself. It keeps what experts say whatever the token is, so `excess` is the
    agreement that the token causes, and null_mean the direction that they share.

    Shapes: out [E, T, D] as of `all_outputs`. O lies in [−1, 1]; 1 for copies. No gradient.
    Raises ValueError for another shape, fewer than two experts, no token, draws < 1, and an `rng` that is no Generator.
    """
    check_draws(rng, draws, "draws")
    out = np.asarray(out, np.float64)
    require(out.ndim == 3 and out.shape[1] > 0, f"out has shape {out.shape}; it must be [E, T, D] with at least 1 token")
    experts, tokens, _ = out.shape
    pairs = len(_pairs(experts))
    unit = _directions(out)

    def overlap(unit: np.ndarray) -> float:
        # |Σ_e u_e|² holds each pair twice and each expert with itself once.
        together, alone = np.square(unit.sum(0)).sum(1), np.square(unit).sum((0, 2))
        return float((together - alone).mean() / pairs)

    null = [overlap(np.stack([own[rng.permutation(tokens)] for own in unit])) for _ in range(draws)]
    return against_chance(overlap(unit), null)
