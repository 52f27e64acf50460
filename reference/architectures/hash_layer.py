"""Hash layers: a frozen table says which expert a token id goes to; nothing is learned about it and nothing weighs the output.

Source: Roller et al. 2021 (Hash layers, arXiv 2106.04426), §3.
Specific: the id is that of the token at this position, not the vector that context has made of it; a balanced table evens the load, so
that there is no loss. The table is part of the checkpoint.
"""

from __future__ import annotations

import numpy as np

from ..config import MoEConfig
from ..experts import Params
from ..tokens import Draws, TokenInfo
from ._mixture import mixture


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = FFN_{hash(id_t)}(x_t): (y [T, D], no losses)."""
    assert info.token_ids_T is not None
    expert_T = params["router.hash_table"][info.token_ids_T, 0]
    return mixture(x_TD, (expert_T[:, None] == np.arange(config.experts.count)).astype(x_TD.dtype), params, "relu"), {}
