"""The reference's layer with experts taken away from each token, for `reference.redundancy`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference.autograd.layer import MoE, Routing
from reference.autograd.tokens import TokenInfo
from reference.autograd.training import heldout_bits
from reference.autograd.transformer import LanguageModel
from reference.redundancy import Rule, disable_top, without_disabled
from reference.text import Corpus


class MaskedMoE(MoE):
    """`reference.autograd.MoE` whose tokens must do without the experts that `rule` names; gates are those of the experts that take over.

    For routers that take the K best of all experts by score and correction bias, without a capacity.
    """

    rule: Rule = staticmethod(disable_top(0))

    def route_tokens(self, x_TD: Tensor, tokens: TokenInfo, replay: Any = None) -> tuple[Routing, dict[str, Tensor]]:
        """The routing of the experts that are left."""
        routing, _ = super().route_tokens(x_TD, tokens)
        bias = self.tensors().get("router.correction_bias", 0)
        gating, experts = self.config.gating, self.config.experts.count
        expert_TK = without_disabled((routing.scores + bias).detach().numpy(), self.rule, gating.top_k)
        load_E = np.bincount(expert_TK.ravel(), minlength=experts)
        record = routing._replace(expert=torch.from_numpy(expert_TK), load=torch.from_numpy(load_E))
        return super().route_tokens(x_TD, tokens, record)


def masked_bits(model: LanguageModel, corpus: Corpus, length: int, count: int) -> Any:
    """`loss(rule)` for `redundancy`: mean held-out bits per byte of the model over the domains, `count` windows each."""
    masked = LanguageModel(model.config, moe_class=MaskedMoE)
    masked.load_state_dict(model.state_dict())

    def loss(rule: Rule) -> float:
        for moe in masked.moe_layers().values():
            moe.rule = rule  # type: ignore[assignment]
        bits = heldout_bits(masked, corpus, length, count, 3 * count)
        return float(np.mean(list(bits.values())))

    return loss
