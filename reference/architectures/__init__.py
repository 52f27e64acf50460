"""Each paper's layer as a straight line: no flags, the paper's order, checked against the layer that `MoEConfig` drives.

A recipe writes the training pass of its paper for real tokens: `forward(x_TD, params, config, info, draws) -> (y_TD, losses)`.
It reads sizes and factors from the config and never asks which router it is: that is what the file says. `run` adds what no paper
has, padding and the numbering of groups. Unlike the sorted dispatch of the layer, a recipe computes the sum over all experts, or
GShard's einsums; so the two share score functions, top-k and networks, and differ in the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..config import MoEConfig, require
from ..experts import Params
from ..layer import check_input, check_params, check_previous
from ..tokens import Draws, TokenInfo, token_info
from . import (
    base_layer,
    deepseek_moe,
    deepseek_v2,
    deepseek_v3,
    deepseek_v4,
    deepspeed_moe,
    dense,
    expert_choice,
    fastmoe,
    glam,
    gpt_oss,
    gshard,
    hash_layer,
    llama4,
    longcat_flash,
    mixtral,
    moe_plus_plus,
    olmoe,
    openmoe,
    qwen2_moe,
    qwen3_moe,
    remoe,
    shazeer,
    soft_moe,
    st_moe,
    switch,
)

Recipe = Callable[[np.ndarray, Params, MoEConfig, TokenInfo, Draws], tuple[np.ndarray, dict[str, float]]]

RECIPES: dict[str, Recipe] = {
    "dense": dense.forward,
    "gshard-600b": gshard.forward,
    "switch-base-128": switch.forward,
    "switch-c-2048": switch.forward,
    "switch-xxl-128": switch.forward,
    "mixtral-8x7b": mixtral.forward,
    "mixtral-8x22b": mixtral.forward,
    "olmoe-1b-7b": olmoe.forward,
    "qwen3-30b-a3b": qwen3_moe.forward,
    "qwen3-235b-a22b": qwen3_moe.forward,
    "deepseek-moe-2b": deepseek_moe.forward,
    "deepseek-moe-16b": deepseek_moe.forward,
    "deepseek-moe-145b": deepseek_moe.forward_on_devices,
    "deepseek-v2": deepseek_v2.forward,
    "deepseek-v2-lite": deepseek_moe.forward,
    "deepseek-v3": deepseek_v3.forward,
    "deepseek-r1": deepseek_v3.forward,
    "shazeer-2017": shazeer.forward,
    "glam-64b-64e": glam.forward,
    "st-moe-32b": st_moe.forward,
    "openmoe-8b": openmoe.forward,
    "openmoe-34b": openmoe.forward,
    "expert-choice-8b-64e": expert_choice.forward,
    "soft-moe-s16-128": soft_moe.forward,
    "soft-moe-b16-128": soft_moe.forward,
    "base-layer-44b": base_layer.forward,
    "hash-layer-1.28b": hash_layer.forward,
    "moe-plus-plus-7b": moe_plus_plus.forward,
    "deepspeed-moe-1.3b-128": deepspeed_moe.forward,
    "deepspeed-moe-350m-128": deepspeed_moe.forward,
    "pr-moe-1.3b-64-128": deepspeed_moe.forward_residual,
    "pr-moe-350m-32-64": deepspeed_moe.forward_residual,
    "fastmoe-naive": fastmoe.forward_naive,
    "fastmoe-noisy": fastmoe.forward_noisy,
    "fastmoe-gshard": fastmoe.forward_gshard,
    "fastmoe-switch": fastmoe.forward_switch,
    "remoe-182m": remoe.forward,
    "qwen1.5-moe-a2.7b": qwen2_moe.forward,
    "qwen2-57b-a14b": qwen2_moe.forward,
    "gpt-oss-120b": gpt_oss.forward,
    "gpt-oss-20b": gpt_oss.forward,
    "llama4-scout": llama4.forward,
    "llama4-maverick": llama4.forward,
    "deepseek-v4-flash": deepseek_v4.forward,
    "deepseek-v4-flash-hash": deepseek_v4.forward_by_hash,
    "longcat-flash": longcat_flash.forward,
}


def run(
    name: str, x_TD: np.ndarray, params: Params, config: MoEConfig, *,
    rng: np.random.Generator | None = None, token_ids: np.ndarray | None = None, group_ids: np.ndarray | None = None,
    pad_mask: np.ndarray | None = None, previous_logits: np.ndarray | None = None, draws: Mapping[str, np.ndarray] | None = None,
) -> tuple[np.ndarray, dict[str, float]]:  # fmt: skip
    """(y [T, D], unweighted losses by name) of the recipe of preset `name`, in training.

    Shapes: x [T, D]; token_ids, group_ids [T] int; pad_mask [T] bool, True for padding, which no recipe sees and whose y is 0;
    previous_logits [T, E], 0 where they are not given.
    draws: the recorded random numbers of a layer's pass (`routing.draws`), to compare under noise; else they come from rng.
    Raises: ValueError for an unknown name, or as `moe_forward` does.
    """
    require(name in RECIPES, f"there is no recipe {name!r}; known: {', '.join(RECIPES)}")
    check_input(x_TD, config)
    check_params(params, config)
    check_previous(previous_logits, len(x_TD), config)
    tokens = token_info(len(x_TD), token_ids, group_ids, pad_mask)
    real_T = tokens.real_T
    previous_TE = np.zeros((len(x_TD), config.experts.count)) if previous_logits is None else previous_logits
    ids = None if tokens.token_ids_T is None else tokens.token_ids_T[real_T]
    info = TokenInfo(tokens.group_T[real_T], tokens.groups, real_T[real_T], ids, previous_TE[real_T])
    replayed = None if draws is None else {key: np.asarray(value)[real_T] for key, value in draws.items()}
    y_TD = np.zeros_like(x_TD)
    y_TD[real_T], losses = RECIPES[name](x_TD[real_T], params, config, info, Draws(rng, replayed))
    return y_TD, losses
