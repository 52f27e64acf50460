"""`ModelConfig`: the Transformer around the layer. `cost.py` counts it, `reference.autograd` trains it; the layer itself never reads it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .checks import check_flags, is_count, known_fields, require
from .config import MoEConfig


@dataclass(frozen=True)
class AttentionConfig:
    """Attention of a whole model; the layer itself never reads it.

    kind                    "gqa" (multi-head when kv_heads = heads) | "mla" (multi-head latent attention of DeepSeek-V2) |
                            "grouped_output" (DeepSeek-V4: one key that is also the value, and a compressed output) | "lstm" (an LSTM
                            of D units in its place; the other fields do not matter)
    heads, kv_heads         query heads, key/value heads
    head_dim                width of one head (mla: of its part without position; its value heads have v_head_dim)
    o_groups, o_rank        grouped_output: the heads' outputs are compressed to o_rank in each of so many groups
    q_rank, kv_rank, rope_dim, v_head_dim   mla: latent widths (q_rank 0: queries are not compressed) and the rotary part
    bias, qk_norm           biases on q, k, v; an RMSNorm on queries and keys, one for each head's width
    qk_norm_joint           that norm spans all heads together instead (OLMoE)
    relative_buckets        a learned bias per head and bucket of distance, shared by all layers of a stack (T5); 0: none
    """

    kind: str = "gqa"
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    v_head_dim: int = 0
    o_groups: int = 0
    o_rank: int = 0
    bias: bool = False
    qk_norm: bool = False
    qk_norm_joint: bool = False
    relative_buckets: int = 0

    def __post_init__(self) -> None:
        check_flags(self, "attention.")
        kinds = ("gqa", "mla", "grouped_output", "lstm")
        require(self.kind in kinds, f"attention.kind is {self.kind!r}; known: {', '.join(kinds)}")
        require(
            is_count(self.heads, 1) and is_count(self.kv_heads, 1) and self.heads % self.kv_heads == 0,
            f"attention.kv_heads is {self.kv_heads!r}, which does not divide attention.heads = {self.heads!r}",
        )
        require(is_count(self.head_dim, 1), f"attention.head_dim is {self.head_dim!r}; it must be an integer ≥ 1")
        require(self.qk_norm or not self.qk_norm_joint, "attention.qk_norm_joint is True but attention.qk_norm is False: no norm to join")
        for name in ("q_rank", "kv_rank", "rope_dim", "v_head_dim", "o_groups", "o_rank", "relative_buckets"):
            require(is_count(getattr(self, name), 0), f"attention.{name} is {getattr(self, name)!r}; it must be an integer ≥ 0")


@dataclass(frozen=True)
class ModelConfig:
    """A Transformer around the layer `moe`: what is counted by `cost.py` and trained by `reference.autograd`.

    layers          decoder layers;  encoder_layers: encoder layers before them (GShard, Switch), whose decoder then cross-attends
    first_dense     the first so many layers have a dense FFN;  moe_every: of the layers after them every n-th is MoE, the last of each n
                    (0: none); both rules hold for encoder and decoder alike
    expert_counts   E of each MoE layer, the largest moe.experts.count, where the layers differ (PR-MoE); empty: all have that
    dense_width     F of a dense FFN;  dense_activation: its activation;  extra_dense: a dense FFN also follows each MoE layer (ST-MoE)
    vocabulary      V;  tied_embeddings: whether head and embedding are one array;  max_positions: learned positions (0: none)
    source          where the sizes are published
    """

    name: str
    moe: MoEConfig
    layers: int
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    vocabulary: int = 256
    dense_width: int = 64
    dense_activation: str = "swiglu"
    extra_dense: bool = False
    first_dense: int = 0
    moe_every: int = 1
    expert_counts: tuple[int, ...] = ()
    encoder_layers: int = 0
    tied_embeddings: bool = False
    max_positions: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        check_flags(self)
        require(isinstance(self.name, str), f"name is {self.name!r}; it must be a string")
        require(is_count(self.layers, 1), f"layers is {self.layers!r}; a model needs at least 1 layer")
        require(is_count(self.vocabulary, 1), f"vocabulary is {self.vocabulary!r}; it must be an integer ≥ 1")
        require(is_count(self.dense_width, 1), f"dense_width is {self.dense_width!r}; it must be an integer ≥ 1")
        require(is_count(self.encoder_layers, 0), f"encoder_layers is {self.encoder_layers!r}; it must be an integer ≥ 0")
        require(is_count(self.max_positions, 0), f"max_positions is {self.max_positions!r}; it must be an integer ≥ 0")
        require(is_count(self.first_dense, 0), f"first_dense is {self.first_dense!r}; it must be an integer ≥ 0")
        require(is_count(self.moe_every, 0), f"moe_every is {self.moe_every!r}; it must be an integer ≥ 0 (0: no MoE layer)")
        object.__setattr__(self, "expert_counts", tuple(self.expert_counts))
        if self.expert_counts:
            self._check_counts(sum(map(self.is_moe, range(self.layers))))

    def _check_counts(self, moe_layers: int) -> None:
        counts, most = self.expert_counts, self.moe.experts.count
        require(len(counts) == moe_layers, f"expert_counts has {len(counts)} entries; the model has {moe_layers} MoE layers")
        require(self.encoder_layers == 0, f"expert_counts is for decoders alone, but encoder_layers is {self.encoder_layers}")
        require(not self.moe.scores.residual, f"scores.residual adds logits of layers with equal experts, but expert_counts is {counts}")
        require(all(is_count(count, 1) for count in counts), f"expert_counts is {counts}; a layer needs at least 1 expert")
        require(max(counts) == most, f"the largest of expert_counts is {max(counts)}, but moe.experts.count is {most}")
        for count in set(counts):
            self._with_experts(count)  # which raises where K or the groups do not fit

    def _with_experts(self, count: int) -> MoEConfig:
        return dataclasses.replace(self.moe, experts=dataclasses.replace(self.moe.experts, count=count))

    @property
    def d_model(self) -> int:
        """D, the model width: the layer's."""
        return self.moe.d_model

    def is_moe(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) has an MoE FFN."""
        return self.moe_every > 0 and layer >= self.first_dense and (layer - self.first_dense + 1) % self.moe_every == 0

    def layer_moe(self, layer: int) -> MoEConfig:
        """The MoE layer number `layer` (from 0) of the decoder: `moe`, with its own experts; the first reads no other's logits."""
        number = sum(map(self.is_moe, range(layer)))
        config = self._with_experts(self.expert_counts[number]) if self.expert_counts else self.moe
        return config if number else dataclasses.replace(config, scores=dataclasses.replace(config.scores, residual=False))

    def moe_layers(self) -> list[MoEConfig]:
        """The config of every MoE layer, the encoder's first."""
        stacks = (range(self.encoder_layers), range(self.layers))
        return [self.layer_moe(layer) for stack in stacks for layer in stack if self.is_moe(layer)]

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for JSON; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """The config that `to_dict` wrote. Raises ValueError naming an unknown field."""
        fields = dict(known_fields(cls, data))
        fields["moe"] = MoEConfig.from_dict(fields["moe"])
        fields["attention"] = AttentionConfig(**known_fields(AttentionConfig, fields.get("attention", {})))
        return cls(**fields)
