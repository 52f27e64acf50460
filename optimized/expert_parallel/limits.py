"""Which layers expert parallelism can spread: those whose every setting it is known to handle."""

from __future__ import annotations

import dataclasses

from reference.config import BalanceConfig, CapacityConfig, ExpertsConfig, GatingConfig, MoEConfig, ScoresConfig, require

# A field that is not listed may stand at its default only: what it means for tokens on several ranks has not been thought through.
# Known and left out is experts.dropout: its F numbers of an assignment are drawn with the routing, and would have to travel with the token.
FIELDS: dict[type, str] = {
    MoEConfig: "d_model scores gating capacity experts balance",
    ScoresConfig: "function bias residual noise noise_scale input_norm softcap logit_noise",
    GatingConfig: "top_k choice vocabulary slots iterations correction_bias groups top_groups group_score normalize eps scale after_drop "
    "expert_scale second_choice second_threshold",
    CapacityConfig: "formula factor eval_factor minimum order recycle",
    ExpertsConfig: "count width activation bias gate_inputs shared shared_width shared_gate zero_computation network_share",
    BalanceConfig: "losses bias_rule bias_rate penalty_start penalty_rate",
}
CHOICES = ("top_k", "gumbel", "hash", "balanced", "sinkhorn", "expert_choice", "positive", "soft")


def check_supported(config: MoEConfig, layer: str, parts: int = 1) -> None:
    """ValueError that names the setting, unless a layer of this config can be spread over ranks, each expert over `parts` of them."""
    sections = {"": config} | {f"{name}.": getattr(config, name) for name in FIELDS[MoEConfig].split() if name != "d_model"}
    for prefix, section in sections.items():
        known = FIELDS.get(type(section), "").split()
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            require(
                field.name in known or value == field.default,
                f"expert parallelism knows no {prefix}{field.name}, and the layer {layer} has {value!r}; known: {', '.join(known)}",
            )
    choice = config.gating.choice
    require(
        choice in CHOICES,
        f"expert parallelism sends tokens to experts, and the layer {layer} has gating.choice {choice!r}; supported: {', '.join(CHOICES)}",
    )
    _check_cut(config, layer, parts)


def _check_cut(config: MoEConfig, layer: str, parts: int) -> None:
    sizes = {"experts.width": config.experts.width} | ({"d_model": config.d_model} if config.experts.bias and parts > 1 else {})
    for name, size in sizes.items():
        require(size % parts == 0, f"{name} is {size} in the layer {layer}, which {parts} ranks of the second mesh dimension do not divide")
