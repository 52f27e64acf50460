"""What an architecture costs, counted from its config: parameters of a layer and of a model, in total and per token, by component.

A component's active parameters are those that one token passes through: everything but the experts that were not chosen. Papers
differ in whether they count the embedding table, of which a token reads one row, and the head; `sum_parameters` takes either view.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from .config import ExpertsConfig, MoEConfig, require
from .layer import BUFFERS, parameter_shapes
from .model_config import AttentionConfig, ModelConfig

LAYER_COMPONENTS = {"router": "router", "experts": "routed_experts", "shared": "shared_experts"}  # by first word of a parameter's name
COMPONENTS = ("embedding", "attention", "cross_attention", "norms", "dense_ffn", *LAYER_COMPONENTS.values(), "head")


class Parameters(NamedTuple):
    """total: how many numbers are stored; active: how many of them one token meets."""

    total: int
    active: int


def layer_parameters(config: MoEConfig) -> dict[str, Parameters]:
    """Parameters of one MoE layer by component: router, routed_experts, shared_experts (layer-parameters).

    routed, SwiGLU: total E · 3DF, active K · 3DF;  shared: 3DF_shared;  router: ED. Biases are added where the config has them.
    The arrays are those of `parameter_shapes`; buffers are not parameters. A dropped token meets fewer experts than K.
    """
    totals = dict.fromkeys(LAYER_COMPONENTS.values(), 0)
    for name, shape in parameter_shapes(config).items():
        if name not in BUFFERS:
            totals[LAYER_COMPONENTS[name.split(".")[0]]] += math.prod(shape)
    counts = {component: Parameters(total, total) for component, total in totals.items()}
    routed = totals["routed_experts"]
    return counts | {"routed_experts": Parameters(routed, routed // config.experts.count * config.gating.top_k)}


def ffn_parameters(d_model: int, width: int, activation: str) -> int:
    """Parameters of a dense FFN without biases: 3DF where the activation is gated, else 2DF (ffn-parameters)."""
    one_expert = MoEConfig(d_model, experts=ExpertsConfig(count=1, width=width, activation=activation))
    return layer_parameters(one_expert)["routed_experts"].total


def grouped_query_parameters(attention: AttentionConfig, d_model: int) -> int:
    """Grouped-query attention (gqa-parameters): 2D·H·d_head for q and output, 2D·H_kv·d_head for k and v; its biases and norms.

    Source: Ainslie et al. 2023 (GQA); norms of queries and keys: Qwen3 (of one head's width) and OLMoE (over all heads).
    """
    query, key = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    biases = query + 2 * key if attention.bias else 0
    norms = (query + key if attention.qk_norm_joint else 2 * attention.head_dim) if attention.qk_norm else 0
    return 2 * d_model * (query + key) + biases + norms


def latent_parameters(attention: AttentionConfig, d_model: int) -> int:
    """Multi-head latent attention (mla-parameters), with the norms of its latents:

    queries  D·r_q + r_q + r_q·H(d_head + d_rope), or D·H(d_head + d_rope) where they are not compressed
    keys, values  D(r_kv + d_rope) + r_kv + r_kv·H(d_head + d_v);   output  H·d_v·D

    Source: DeepSeek-V2, §2.1 and its appendix C; the norms: §3.1.2.
    """
    query = attention.heads * (attention.head_dim + attention.rope_dim)
    queries = attention.q_rank * (d_model + 1 + query) if attention.q_rank else d_model * query
    keys_values = attention.kv_rank * (1 + attention.heads * (attention.head_dim + attention.v_head_dim))
    down = d_model * (attention.kv_rank + attention.rope_dim)
    return queries + down + keys_values + attention.heads * attention.v_head_dim * d_model


ATTENTION: dict[str, Callable[[AttentionConfig, int], int]] = {"gqa": grouped_query_parameters, "mla": latent_parameters}


def model_parameters(model: ModelConfig) -> dict[str, Parameters]:
    """Parameters of a whole model by component, every one of `COMPONENTS` (model-parameters).

    attention        each layer's own, with its inner norms, and one table of relative biases per stack
    cross_attention  a decoder with an encoder before it attends to it in every layer
    norms            one vector D before each of attention, cross-attention and FFN, and one at the end of each stack
    embedding        V·D and learned positions;  head: V·D. A tied table is counted once, as the head that multiplies it.

    A token of an encoder-decoder is one source and one target token: active counts both stacks.
    Source: the equations of `layer_parameters`, `grouped_query_parameters` and `latent_parameters`.
    """
    width, decoder, encoder = model.d_model, model.layers, model.encoder_layers
    stacks, blocks = (2 if encoder else 1), decoder + encoder
    moe_layers = sum(model.is_moe(layer) for layers in (encoder, decoder) for layer in range(layers))
    attention = ATTENTION[model.attention.kind](model.attention, width)
    relative = stacks * model.attention.relative_buckets * model.attention.heads
    cross = decoder if encoder else 0
    table = model.vocabulary * width
    totals = {
        "embedding": (0 if model.tied_embeddings else table) + model.max_positions * width,
        "attention": blocks * attention + relative,
        "cross_attention": cross * attention,
        "norms": (2 * blocks + cross + stacks) * width,
        "dense_ffn": (blocks - moe_layers) * ffn_parameters(width, model.dense_width, model.dense_activation),
        "head": table,
    }
    layer = layer_parameters(model.moe)
    counts = {name: Parameters(total, total) for name, total in totals.items()}
    counts |= {name: Parameters(moe_layers * count.total, moe_layers * count.active) for name, count in layer.items()}
    return {name: counts[name] for name in COMPONENTS}


def sum_parameters(parts: Mapping[str, Parameters], *, without: Iterable[str] = ()) -> Parameters:
    """Sum of the components, all of them or all but those `without`: {"embedding"} for what a token multiplies with.

    Raises ValueError for a component that `parts` does not have.
    """
    left_out = frozenset(without)
    unknown = sorted(left_out - set(parts))
    require(not unknown, f"there is no component {', '.join(map(repr, unknown))}; known: {', '.join(parts)}")
    kept = [count for name, count in parts.items() if name not in left_out]
    return Parameters(sum(count.total for count in kept), sum(count.active for count in kept))
