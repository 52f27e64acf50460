"""What an architecture costs, counted from its config: parameters by component, FLOPs, bytes read, activations, traffic, dense equals.

A component's active parameters are those that one token passes through: everything but the experts that were not chosen. Papers
differ in whether they count the embedding table, of which a token reads one row, and the head; `sum_parameters` takes either view.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from .config import BalanceConfig, ExpertsConfig, GatingConfig, MoEConfig, require
from .experts import ACTIVATIONS
from .layer import BUFFERS, parameter_shapes
from .model_config import AttentionConfig, ModelConfig
from .zero_computation import networks_per_token, zero_computation_shapes

LAYER_COMPONENTS = {"router": "router", "experts": "routed_experts", "shared": "shared_experts"}  # by first word of a parameter's name
COMPONENTS = ("embedding", "attention", "cross_attention", "norms", "dense_ffn", *LAYER_COMPONENTS.values(), "head")
"""The parts in which parameters are counted."""


class Parameters(NamedTuple):
    """total: how many numbers are stored; active: how many of them one token meets."""

    total: int
    active: int


def layer_parameters(config: MoEConfig) -> dict[str, Parameters]:
    """Parameters of one MoE layer by component: router, routed_experts, shared_experts (layer-parameters).

    routed, SwiGLU: total E · 3DF, active K · 3DF;  shared: 3DF_shared;  router: ED. Biases are added where the config has them.
    The arrays are those of `parameter_shapes`; buffers are not parameters. A dropped token meets fewer experts than K. Where some experts
    are no networks, active is the mean over tokens at balance, rounded: `networks_per_token` networks, and its part of what others learn.
    """
    totals = dict.fromkeys(LAYER_COMPONENTS.values(), 0)
    for name, shape in parameter_shapes(config).items():
        if name not in BUFFERS:
            totals[LAYER_COMPONENTS[name.split(".")[0]]] += math.prod(shape)
    counts = {component: Parameters(total, total) for component, total in totals.items()}
    routed, experts = totals["routed_experts"], config.experts
    others = sum(math.prod(shape) for shape in zero_computation_shapes(config.d_model, experts).values())
    met = networks_per_token(config)
    if not experts.zero_computation:
        return counts | {"routed_experts": Parameters(routed, routed // experts.count * config.gating.top_k)}
    active = (routed - others) / experts.networks * met + others / (experts.count - experts.networks) * (config.gating.top_k - met)
    return counts | {"routed_experts": Parameters(routed, round(active))}


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


def grouped_output_parameters(attention: AttentionConfig, d_model: int) -> int:
    """DeepSeek-V4's attention (grouped-output-parameters), with the norms of its latents and a sink per head:

    queries  D·r_q + r_q + r_q·H·d_head;   key, which is the value too  D·d_head + d_head;   output  H·d_head·r_o + G·r_o·D

    Each of the G groups of heads has an r_o of its own. What compresses keys and finds them is not counted.
    Source: DeepSeek-V4, §2.3.1; the norms: its released code.
    """
    heads, width = attention.heads, attention.head_dim
    queries = attention.q_rank * (d_model + 1 + heads * width)
    output = heads * width * attention.o_rank + attention.o_groups * attention.o_rank * d_model
    return queries + width * (d_model + 1) + output + heads


def lstm_parameters(attention: AttentionConfig, d_model: int) -> int:
    """An LSTM of D units on D inputs, in the place of attention (lstm-parameters): four gates of 2D² + D.

    Source: Hochreiter & Schmidhuber 1997; around a mixture of experts: Shazeer et al. 2017, §C.1.
    """
    return 4 * (2 * d_model**2 + d_model)


ATTENTION: dict[str, Callable[[AttentionConfig, int], int]] = {
    "gqa": grouped_query_parameters,
    "mla": latent_parameters,
    "grouped_output": grouped_output_parameters,
    "lstm": lstm_parameters,
}


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
    mixtures = Counter(model.moe_layers())
    moe_layers = mixtures.total()
    attention = ATTENTION[model.attention.kind](model.attention, width)
    relative = stacks * model.attention.relative_buckets * model.attention.heads
    cross = decoder if encoder else 0
    extra = moe_layers if model.extra_dense else 0
    table = model.vocabulary * width
    totals = {
        "embedding": (0 if model.tied_embeddings else table) + model.max_positions * width,
        "attention": blocks * attention + relative,
        "cross_attention": cross * attention,
        "norms": (2 * blocks + cross + stacks + extra) * width,
        "dense_ffn": (blocks - moe_layers + extra) * ffn_parameters(width, model.dense_width, model.dense_activation),
        "head": table,
    }
    counts = {name: Parameters(total, total) for name, total in totals.items()} | dict.fromkeys(LAYER_COMPONENTS.values(), Parameters(0, 0))
    for config, number in mixtures.items():
        for name, (total, active) in layer_parameters(config).items():
            counts[name] = Parameters(counts[name].total + number * total, counts[name].active + number * active)
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


CODE_BYTES = 4  # what names the expert of an assignment on its way


class AllToAll(NamedTuple):
    """Bytes that rank i sends to rank j in each of the four all-to-alls of a layer, [R, R] int64; 0 on the diagonal.

    dispatch, combine                     of the forward pass
    combine_gradient, dispatch_gradient   of the backward pass
    """

    dispatch: np.ndarray
    combine: np.ndarray
    combine_gradient: np.ndarray
    dispatch_gradient: np.ndarray

    @property
    def total(self) -> int:
        """All of them together, over all ranks."""
        return int(sum(part.sum() for part in self))


def all_to_all_volume(
    expert_TK: np.ndarray, keep_TK: np.ndarray, rank_T: np.ndarray, owner_E: np.ndarray, d_model: int, *,
    ranks: int, itemsize: int = 2, gate_itemsize: int = 4,
) -> AllToAll:  # fmt: skip
    """What expert parallelism sends for a routing (all-to-all-volume): V_ij = Q_ij · D · b + A_ij · (b_gate + 4).

    Q_ij counts the tokens of rank i with at least one kept expert on rank j: each crosses once, and one row comes back. A_ij counts the
    kept assignments; each brings its gate and the 4 bytes that name its expert. Back travel Q_ji rows; gradients take the opposite ways,
    the gates' with those of x. Counts, which are exchanged first, do not depend on the routing and are left out.
    An expert without a network is on every rank, and nothing travels for it. Where tokens are mixed (Soft MoE), the slots travel: each is
    a token with its one expert, on the rank of its group.
    Shapes: expert, keep [T, K] over all tokens; rank [T], where each token is; owner, where each network is, whose ids come first.
    Raises: ValueError for a shape that differs or a rank outside 0 … ranks − 1.
    Source: one copy per destination as in DeepSeek-V3 technical report, §3.2.2 (there per node).
    """
    tokens = len(expert_TK)
    require(keep_TK.shape == expert_TK.shape, f"keep has shape {keep_TK.shape}, expert {expert_TK.shape}")
    require(rank_T.shape == (tokens,), f"rank has shape {rank_T.shape}; there are {tokens} tokens")
    for name, where in (("rank", rank_T), ("owner", owner_E)):
        low, high = where.min(initial=0), where.max(initial=0)
        require(low >= 0 and high < ranks, f"{name} names ranks {low} … {high}; there are {ranks}")
    owned_TK = keep_TK & (expert_TK < len(owner_E))
    owner_TK = owner_E[np.where(owned_TK, expert_TK, 0)]
    assignments_TR = np.stack([((owner_TK == rank) & owned_TK).sum(1) for rank in range(ranks)], axis=1)
    remote_TR = assignments_TR * (rank_T[:, None] != np.arange(ranks))
    crossings_RR, copies_RR = np.zeros((2, ranks, ranks), np.int64)
    np.add.at(crossings_RR, rank_T, remote_TR > 0)
    np.add.at(copies_RR, rank_T, remote_TR)
    rows = crossings_RR * d_model * itemsize
    return AllToAll(rows + copies_RR * (gate_itemsize + CODE_BYTES), rows.T, rows, rows.T + copies_RR.T * gate_itemsize)


class Flops(NamedTuple):
    """Of one token. weights: its products with parameters; attention: its products with other tokens' keys and values."""

    weights: float
    attention: float

    @property
    def forward(self) -> float:
        """Both."""
        return self.weights + self.attention

    @property
    def training(self) -> float:
        """Forward and backward: every product has two more in the backward pass, one for each of its operands."""
        return 3 * self.forward


def grouped_query_width(attention: AttentionConfig) -> int:
    """Numbers that a query meets in one key and one value, over all heads: 2 H d_head."""
    return 2 * attention.heads * attention.head_dim


def latent_width(attention: AttentionConfig) -> int:
    """As `grouped_query_width`, keys with a rotary part and values of their own width: H (d_head + d_rope + d_v)."""
    return attention.heads * (attention.head_dim + attention.rope_dim + attention.v_head_dim)


def recurrent_width(attention: AttentionConfig) -> int:
    """0: an LSTM looks at no other token, all of its products are with its weights."""
    return 0


# DeepSeek-V4 as if nothing were compressed: every query meets every earlier key, so this is the most that it can cost.
ATTENTION_WIDTH: dict[str, Callable[[AttentionConfig], int]] = {
    "gqa": grouped_query_width, "mla": latent_width, "grouped_output": grouped_query_width, "lstm": recurrent_width,
}  # fmt: skip


def flops_per_token(model: ModelConfig, context: int) -> Flops:
    """FLOPs of one token in a sequence of `context` tokens (flops-per-token): 2 · active parameters + 2 · width · tokens seen.

    A product with an [a, b] matrix is 2ab FLOPs. Active are all parameters that a token meets but the embedding and the norms. A causal
    layer sees (context + 1)/2 tokens on average, an encoder layer and a cross-attention all of them; width is that of keys and values.
    Softmaxes, activations and the choice of experts, of the order D and not D², are left out.
    Raises: ValueError for a context below 1.
    Source: Kaplan et al. 2020, §2.1. Deviates: it lets each position see the whole context.
    """
    require(context >= 1, f"context is {context}; a sequence has at least 1 token")
    active = sum_parameters(model_parameters(model), without={"embedding", "norms"}).active
    encoder = model.encoder_layers
    seen = model.layers * (context + 1) / 2 + (encoder + (model.layers if encoder else 0)) * context
    return Flops(2.0 * active, 2 * ATTENTION_WIDTH[model.attention.kind](model.attention) * seen)


def expected_experts_touched(config: MoEConfig, tokens: int) -> float:
    """Different networks that T tokens are sent to under a uniform router (experts-touched): E (1 − (1 − K/E)^T).

    Where only N of the experts are networks: N (1 − (1 − K_e/N)^T), K_e = `networks_per_token`.
    A trained router is less even and touches fewer: `experts_touched` counts them. Raises: ValueError for a negative T.
    """
    require(tokens >= 0, f"tokens is {tokens}; a batch cannot be negative")
    networks = config.experts.networks
    return networks * (1 - (1 - networks_per_token(config) / networks) ** tokens)


def experts_touched(expert_TK: np.ndarray, keep_TK: np.ndarray, networks: int | None = None) -> int:
    """Different experts among the kept assignments [T, K], only those below `networks` where it is given.

    Raises: ValueError for shapes that differ.
    """
    require(keep_TK.shape == expert_TK.shape, f"keep has shape {keep_TK.shape}, expert {expert_TK.shape}")
    touched = np.unique(expert_TK[keep_TK])
    return len(touched if networks is None else touched[touched < networks])


def weight_bytes(model: ModelConfig, tokens: int, *, touched: float | None = None, bytes_per_weight: float = 2) -> float:
    """Bytes of weights that a step of T tokens reads (weight-bytes): b (T D + resident + touched / E · experts).

    Of the embedding a row per token; of the experts those touched; everything else once. This, and not FLOPs, is what a step with few
    tokens waits for. touched: experts per layer, as measured; None: `expected_experts_touched`. bytes_per_weight: 2 for bf16, 1 for fp8,
    4.25/8 for MXFP4. Raises: ValueError for a negative T, or more experts touched than there are in a layer.
    """
    resident = sum_parameters(model_parameters(model), without={"embedding", "routed_experts"}).total
    read = tokens * model.d_model + resident
    for config in model.moe_layers():
        networks, expected = config.experts.networks, expected_experts_touched(config, tokens)
        share = (expected if touched is None else touched) / networks
        require(0 <= share <= 1, f"touched is {touched}; a layer has {networks} experts")
        read += share * layer_parameters(config)["routed_experts"].total
    return bytes_per_weight * read * (tokens > 0)


def activation_bytes(config: MoEConfig, tokens: int, *, bytes_per_number: float = 2) -> float:
    """What the backward pass of one MoE layer keeps of its forward pass (activation-bytes): b T (D + E + K (2D + M + F) + M_s + F_s).

    For each token x and its logits; for each of its K rows the copy of x, both sides of the activation (M = 2F where it is gated, else F)
    and the expert's output; for the shared experts both sides of theirs. Backends that gather x again or combine before they store keep
    less. Raises: ValueError for a negative T.
    """
    require(tokens >= 0, f"tokens is {tokens}; a batch cannot be negative")
    experts, sides = config.experts, 3 if ACTIVATIONS[config.experts.activation].gated else 2
    rows = networks_per_token(config) * (2 * config.d_model + sides * experts.width)
    return bytes_per_number * tokens * (config.d_model + experts.count + rows + sides * experts.total_shared_width)


def dense_equal(model: ModelConfig, what: str) -> ModelConfig:
    """The dense model of equal "active" or "total" parameters (dense-equal): MoE layers become FFNs of width F* = P / (3D).

    P is the MoE layer's count, router and shared experts included; 2D where the activation has no gate. The first asks what the experts
    added at equal FLOPs, the second what sparsity took away at equal size. Where dense layers lie between the MoE layers, these become
    layers of one expert, whose router costs D. Where MoE layers differ, P is their mean.
    Raises: ValueError for another word.
    """
    require(what in Parameters._fields, f"dense_equal was asked for {what!r}; known: {', '.join(Parameters._fields)}")
    activation = model.moe.experts.activation
    mixtures = model.moe_layers() or [model.moe]
    wanted = sum(getattr(count, what) for config in mixtures for count in layer_parameters(config).values()) / len(mixtures)
    width, name = max(1, round(wanted / ffn_parameters(model.d_model, 1, activation))), f"{model.name}-dense-{what}"
    blocks = [model.is_moe(layer) for layers in (model.encoder_layers, model.layers) for layer in range(layers)]
    if all(blocks):
        return replace(model, name=name, moe_every=0, expert_counts=(), dense_width=width, dense_activation=activation)
    one = MoEConfig(model.d_model, gating=GatingConfig(), experts=ExpertsConfig(1, width, activation), balance=BalanceConfig())
    return replace(model, name=name, moe=one, expert_counts=())
