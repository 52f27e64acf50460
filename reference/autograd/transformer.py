"""A decoder-only Transformer language model around `MoE`: pre-norm blocks of causal attention and a dense or MoE FFN.

Parameters are named as in the decoders of transformers, so that a checkpoint of the one can be read by the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..config import ExpertsConfig, require
from ..experts import ACTIVATIONS, first_matrix
from ..model_config import AttentionConfig, ModelConfig
from .experts import FFN, ffn_forward
from .layer import MoE

NORM_EPS = 1e-6
ROPE_THETA = 10000.0
EMBEDDING_STD = 0.02


class ModelAux(NamedTuple):
    """What the MoE layers of one pass report.

    loss    the sum of their weighted balance losses; 0 in evaluation
    layers  layer number → that layer's aux, for the MoE layers
    """

    loss: Tensor
    layers: dict[int, Any]

    @property
    def routing(self) -> dict[int, Any]:
        """Layer number → routing: what `replay` takes."""
        return {number: aux.routing for number, aux in self.layers.items()}


class KVCache:
    """Rotated keys and values of the positions seen so far, by layer number: [B, H_kv, S_past, head_dim] each."""

    def __init__(self) -> None:
        self.entries: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """How many positions are stored."""
        return next(iter(self.entries.values()))[0].shape[2] if self.entries else 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) of all positions, the new ones last."""
        if layer in self.entries:
            old_key, old_value = self.entries[layer]
            key, value = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
        self.entries[layer] = key, value
        return key, value


class Context(NamedTuple):
    """What all blocks of a pass share.

    tokens_BS, pad_mask_BS   the pass's arguments
    cos, sin                 [B or 1, 1, S, head_dim / 2], or None with learned positions
    allowed                  [B or 1, 1, S, S_past + S], True where a query sees a key; None: plain causal (or one query, which sees all)
    causal                   whether attention applies the causal mask itself
    cache                    KVCache or None
    """

    tokens_BS: Tensor
    pad_mask_BS: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    allowed: Tensor | None
    causal: bool
    cache: KVCache | None


def rotary_tables(position_BS: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of p · θ^(−2i / head_dim): [B, 1, S, head_dim / 2] each, angles in fp32 or better.

    Source: Su et al. 2021 (RoPE), §3.2.2.
    """
    wide = torch.promote_types(dtype, torch.float32)
    frequency = ROPE_THETA ** (-torch.arange(0, head_dim, 2, device=position_BS.device, dtype=wide) / head_dim)
    angle = position_BS[:, None, :, None].to(wide) * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: the pairs (x_i, x_{i + half}) turned by the position's angles; [B, H, S, head_dim] → the same.

    Source: Su et al. 2021, eq. 34. Deviates: the paper pairs neighbours (2i, 2i + 1); Llama's and most released weights pair the halves.
    """
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _positions(tokens_BS: Tensor, pad_mask_BS: Tensor | None, past: int) -> Tensor:
    """[B, S], or [1, S] where all sequences have the same."""
    if pad_mask_BS is None:
        return torch.arange(past, past + tokens_BS.shape[1], device=tokens_BS.device)[None]
    # Counted over real tokens, so that padding on the left changes nothing.
    return ((~pad_mask_BS).cumsum(1) - 1).clamp(min=0)


def _allowed(length: int, past: int, pad_mask_BS: Tensor | None, device: torch.device) -> Tensor | None:
    """The attention mask where the plain causal one would be wrong: with padding, or for several queries behind a cache."""
    if pad_mask_BS is None and (past == 0 or length == 1):
        return None
    causal = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)[None, None]
    if pad_mask_BS is None:
        return causal
    # A padding query sees itself: whether a softmax over nothing is 0 or NaN depends on the attention kernel.
    own = torch.eye(length, dtype=torch.bool, device=device)
    return (causal & ~pad_mask_BS[:, None, None, :]) | own


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions; `layer` is its number in a `KVCache`.

    Source: Vaswani et al. 2017, §3.2; grouped queries: Ainslie et al. 2023; norm on queries and keys: Qwen3, and over all heads OLMoE.
    """

    def __init__(self, d_model: int, config: AttentionConfig, layer: int, **factory: Any) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        wide, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(d_model, wide, bias=config.bias, **factory)
        self.k_proj = nn.Linear(d_model, narrow, bias=config.bias, **factory)
        self.v_proj = nn.Linear(d_model, narrow, bias=config.bias, **factory)
        self.o_proj = nn.Linear(wide, d_model, bias=False, **factory)
        if config.qk_norm:
            joint = config.qk_norm_joint
            self.q_norm = nn.RMSNorm(wide if joint else config.head_dim, eps=NORM_EPS, **factory)
            self.k_norm = nn.RMSNorm(narrow if joint else config.head_dim, eps=NORM_EPS, **factory)

    def _heads(self, flat: Tensor, heads: int, norm: Callable[[Tensor], Tensor] | None) -> Tensor:
        """[B, S, heads · head_dim] → [B, heads, S, head_dim], normed over a head or over all of them."""
        split = (*flat.shape[:2], heads, self.config.head_dim)
        if norm is None:
            return flat.view(split).transpose(1, 2)
        normed = norm(flat).view(split) if self.config.qk_norm_joint else norm(flat.view(split))
        return normed.transpose(1, 2)

    def forward(self, hidden_BSD: Tensor, context: Context) -> Tensor:
        """hidden [B, S, D] → [B, S, D]: softmax(q kᵀ / √head_dim) v over the positions that a query may see, through `o_proj`."""
        config = self.config
        q_norm, k_norm = (self.q_norm, self.k_norm) if config.qk_norm else (None, None)
        query = self._heads(self.q_proj(hidden_BSD), config.heads, q_norm)
        key = self._heads(self.k_proj(hidden_BSD), config.kv_heads, k_norm)
        value = self._heads(self.v_proj(hidden_BSD), config.kv_heads, None)
        if context.cos is not None and context.sin is not None:
            query, key = rotate(query, context.cos, context.sin), rotate(key, context.cos, context.sin)
        if context.cache is not None:
            key, value = context.cache.extend(self.layer, key, value)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=context.allowed, is_causal=context.causal, enable_gqa=config.heads != config.kv_heads
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class DenseFFN(nn.Module):
    """The FFN of a layer without experts, of width F = `width`. Raises ValueError for an unknown activation."""

    def __init__(self, d_model: int, width: int, activation: str, **factory: Any) -> None:
        super().__init__()
        require(activation in ACTIVATIONS, f"dense_activation is {activation!r}; known: {', '.join(ACTIVATIONS)}")
        self.activation, gated = activation, ACTIVATIONS[activation].gated
        self.first = first_matrix(ExpertsConfig(activation=activation))
        self.register_parameter(self.first, nn.Parameter(torch.zeros(2 * width if gated else width, d_model, **factory)))
        self.down_proj = nn.Parameter(torch.zeros(d_model, width, **factory))

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """hidden [B, S, D] → [B, S, D]: the equation of one expert (ffn), without biases."""
        ffn = FFN(getattr(self, self.first), self.down_proj, None, None)
        return ffn_forward(hidden_BSD.flatten(0, 1), ffn, self.activation).view(hidden_BSD.shape)


class Block(nn.Module):
    """One pre-norm layer: h ← h + attention(norm(h)), then h ← h + FFN(norm(h)). The FFN is that of the layer's number, MoE or dense."""

    def __init__(self, config: ModelConfig, layer: int, moe_class: Callable[..., nn.Module], **factory: Any) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.d_model, eps=NORM_EPS, **factory)
        self.self_attn = Attention(config.d_model, config.attention, layer, **factory)
        self.post_attention_layernorm = nn.RMSNorm(config.d_model, eps=NORM_EPS, **factory)
        self.is_moe = config.is_moe(layer)
        self.reads_previous = self.is_moe and config.layer_moe(layer).scores.residual
        if self.is_moe:
            self.mlp = moe_class(config.layer_moe(layer), **factory)
        else:
            self.mlp = DenseFFN(config.d_model, config.dense_width, config.dense_activation, **factory)

    def forward(self, hidden_BSD: Tensor, context: Context, replay: Any = None, previous_TE: Tensor | None = None) -> tuple[Tensor, Any]:
        """(hidden [B, S, D] behind the layer, the MoE layer's aux or None).

        replay       an earlier routing of this layer
        previous_TE  the logits of the MoE layer before, which a router with a residual reads
        """
        hidden_BSD = hidden_BSD + self.self_attn(self.input_layernorm(hidden_BSD), context)
        normed_BSD = self.post_attention_layernorm(hidden_BSD)
        if not self.is_moe:
            return hidden_BSD + self.mlp(normed_BSD), None
        chained = {"previous_logits": previous_TE} if self.reads_previous else {}
        y_BSD, aux = self.mlp(normed_BSD, token_ids=context.tokens_BS, pad_mask=context.pad_mask_BS, replay=replay, **chained)
        return hidden_BSD + y_BSD, aux


def _check_trainable(config: ModelConfig) -> None:
    limit = "reference.autograd trains decoders with grouped-query attention only"
    require(config.attention.kind == "gqa", f"attention.kind is {config.attention.kind!r}; {limit}")
    require(config.encoder_layers == 0, f"encoder_layers is {config.encoder_layers}; {limit}")
    require(not config.extra_dense, "extra_dense is True; the model that trains has one FFN in each layer")
    require(
        config.attention.relative_buckets == 0, f"attention.relative_buckets is {config.attention.relative_buckets}; positions are rotary"
    )
    require(
        config.max_positions > 0 or config.attention.head_dim % 2 == 0,
        f"attention.head_dim is {config.attention.head_dim}; rotary positions need an even one",
    )


class LanguageModel(nn.Module):
    """A decoder-only language model: logits_BSV of the next token at every position.

    config     which layers are MoE, widths, heads, vocabulary; max_positions > 0 replaces rotary positions by learned ones
    moe_class  the class of its MoE layers; the fast track's has the same parameters, so a state dict fits both

    A sequence is one group of its MoE layers. `activation_checkpointing = True` computes each block again in the backward pass instead
    of keeping its activations; loads and losses come from the first computation alone.

    Weights start from N(0, 1/fan-in), embeddings from N(0, 0.02²), and what writes into the residual stream (o_proj, down_proj) is
    divided by √(2 · layers).
    Raises: ValueError for multi-head latent attention, an encoder, and relative position biases.
    Source: pre-norm and the division by √(2 · layers): Radford et al. 2019 (GPT-2), §2.3; RMSNorm: Zhang & Sennrich 2019.
    """

    def __init__(
        self, config: ModelConfig, *, moe_class: Callable[..., nn.Module] = MoE,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        _check_trainable(config)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.activation_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocabulary, config.d_model, **factory)
        if config.max_positions:
            self.embed_positions = nn.Embedding(config.max_positions, config.d_model, **factory)
        self.layers = nn.ModuleList(Block(config, layer, moe_class, **factory) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.d_model, eps=NORM_EPS, **factory)
        if not config.tied_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocabulary, bias=False, **factory)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(std=EMBEDDING_STD)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, DenseFFN):
                for weight in module.parameters():
                    weight.normal_(std=weight.shape[-1] ** -0.5)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                weight.mul_((2 * self.config.layers) ** -0.5)

    def moe_layers(self) -> dict[int, nn.Module]:
        """Layer number → its MoE module."""
        return {number: block.mlp for number, block in enumerate(self.layers) if block.is_moe}  # type: ignore[union-attr, misc]

    def update_bias(self, load: Mapping[int, Tensor]) -> None:
        """Move every MoE layer's correction bias once: load maps the layer's number to its load [E], summed over all micro-batches."""
        for number, moe in self.moe_layers().items():
            moe.update_bias(load[number])  # type: ignore[operator]

    def update_penalty(self, load: Mapping[int, Tensor], tokens: int) -> None:
        """Move every MoE layer's penalty once, where it has one; tokens: how many the loads were counted over."""
        for number, moe in self.moe_layers().items():
            moe.update_penalty(load[number], tokens)  # type: ignore[operator]

    def _context(self, tokens_BS: Tensor, pad_mask_BS: Tensor | None, cache: KVCache | None) -> tuple[Tensor, Context]:
        config, length, past = self.config, tokens_BS.shape[1], cache.length if cache is not None else 0
        require(cache is None or pad_mask_BS is None, "pad_mask and cache exclude each other: cached positions have no padding")
        position = _positions(tokens_BS, pad_mask_BS, past)
        hidden_BSD = self.embed_tokens(tokens_BS)
        cos = sin = None
        if config.max_positions:
            require(past + length <= config.max_positions, f"{past + length} positions, but max_positions is {config.max_positions}")
            hidden_BSD = hidden_BSD + self.embed_positions(position)
        else:
            cos, sin = rotary_tables(position, config.attention.head_dim, hidden_BSD.dtype)
        allowed = _allowed(length, past, pad_mask_BS, tokens_BS.device)
        return hidden_BSD, Context(tokens_BS, pad_mask_BS, cos, sin, allowed, allowed is None and past == 0, cache)

    def forward(
        self, tokens_BS: Tensor, pad_mask: Tensor | None = None, replay: Mapping[int, Any] | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, ModelAux]:
        """(logits [B, S, V], aux) of tokens [B, S], integers below the vocabulary.

        pad_mask  [B, S] bool, True for padding
        replay    layer number → an earlier routing, `aux.routing` of an earlier pass
        cache     holds the positions before, and takes these in

        Raises: ValueError for tokens or a mask of wrong shape or dtype, padding beside a cache, and more positions than are learned.
        """
        integer = not (tokens_BS.is_floating_point() or tokens_BS.is_complex() or tokens_BS.dtype == torch.bool)
        require(
            tokens_BS.ndim == 2 and integer,
            f"tokens have shape {tuple(tokens_BS.shape)} and dtype {tokens_BS.dtype}; (B, S) integers needed",
        )
        wrong = None if pad_mask is None or (pad_mask.shape == tokens_BS.shape and pad_mask.dtype == torch.bool) else pad_mask
        require(
            wrong is None,
            f"pad_mask must be bool of shape {tuple(tokens_BS.shape)}, got {getattr(wrong, 'dtype', '')} {getattr(wrong, 'shape', '')}",
        )
        hidden_BSD, context = self._context(tokens_BS, pad_mask, cache)
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled() and cache is None
        layers: dict[int, Any] = {}
        previous_TE = None
        for number, block in enumerate(self.layers):
            arguments = hidden_BSD, context, None if replay is None else replay.get(number), previous_TE
            hidden_BSD, aux = checkpoint(block, *arguments, use_reentrant=False) if recompute else block(*arguments)
            if aux is not None:
                layers[number], previous_TE = aux, aux.routing.logits
        head = self.embed_tokens.weight if self.config.tied_embeddings else self.lm_head.weight
        logits_BSV = functional.linear(self.norm(hidden_BSD), head)
        losses = [aux.loss for aux in layers.values()]
        return logits_BSV, ModelAux(torch.stack(losses).sum() if losses else logits_BSV.new_zeros(()), layers)


def cross_entropy(logits_BSV: Tensor, target_BS: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats, in fp32 or better: −1/T Σ log softmax(logits_t)[target_t]."""
    wide = torch.promote_types(logits_BSV.dtype, torch.float32)
    return functional.cross_entropy(logits_BSV.flatten(0, 1).to(wide), target_BS.flatten())


def bits_per_byte(nats: float) -> float:
    """A byte model's cross-entropy in bits: nats / ln 2."""
    return nats / math.log(2)
