"""The task of notebooks 04 and 06: tokens of eight kinds, a different linear map for each kind, eight experts.

Every token shares a large common part, as hidden vectors in a Transformer do. So at the start the router's rows see nearly the same number
for every token, and whichever rows happen to fit the common part best win them all.
"""

from __future__ import annotations

import numpy as np

from reference import MoEConfig, init_params
from reference.config import ExpertsConfig, GatingConfig

CONFIG = MoEConfig(8, gating=GatingConfig(top_k=2, normalize="sum"), experts=ExpertsConfig(8, 16, "relu"))
KINDS, OF_EACH = 8, 32


def task(seed: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(x [T, D], target [T, D] with standard deviation 1, parameters at the start)."""
    rng, width = np.random.default_rng(seed), CONFIG.d_model
    params = init_params(CONFIG, rng)
    common_D = rng.standard_normal(width)
    common_D *= 2 * np.sqrt(width) / np.linalg.norm(common_D)
    kind_TD = np.repeat(rng.standard_normal((KINDS, width)), OF_EACH, axis=0)
    x_TD = common_D + kind_TD + 0.3 * rng.standard_normal(kind_TD.shape)
    maps = rng.standard_normal((KINDS, width, width))
    target_TD = np.concatenate([part @ own for part, own in zip(np.split(x_TD, KINDS), maps, strict=True)])
    return x_TD, target_TD / target_TD.std(), params
