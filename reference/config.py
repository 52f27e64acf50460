"""`MoEConfig`: every architecture of the field is a setting of these fields.

A config is `d_model` and five parts, one for each arrow of the data flow; a stage function receives its own part and nothing
else. A field that names a choice (a score function, a drop order, a loss) is a key of a table in the stage's own file, so a new
router is a new function and a new row, never a new branch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .checks import check_flags, is_amount, is_count, known_fields, named_pairs, require


@dataclass(frozen=True)
class ScoresConfig:
    """x_TD → logits_TE → scores_TE.

    function     "softmax" over the experts | "sigmoid" | "sqrt_softplus" | "relu" | "identity" (the logits; the gates are then a
                 softmax over the chosen)
    bias         whether the router adds a bias to its logits
    noise        "none" | "jitter": in training the router's copy of the input is multiplied by U(1 − noise_scale, 1 + noise_scale), ≥ 0
    input_norm   "none" | "rms": the router's copy of the input has an RMS of 1
    softcap      c > 0 bends the logits into (−c, c); 0: not
    logit_noise  "none" | "learned": in training, normal noise on the logits whose size each token learns (Shazeer 2017)
    residual     a learned matrix adds to the logits those of the MoE layer before, where they are given (MoE++)
    """

    function: str = "softmax"
    bias: bool = False
    noise: str = "none"
    noise_scale: float = 0.0
    input_norm: str = "none"
    softcap: float = 0.0
    logit_noise: str = "none"
    residual: bool = False

    def __post_init__(self) -> None:
        for name in ("noise_scale", "softcap"):
            value = getattr(self, name)
            require(is_amount(value), f"scores.{name} is {value!r}; it must be a finite number ≥ 0")


@dataclass(frozen=True)
class GatingConfig:
    """scores_TE → expert_TK, gate_TK.

    choice           "top_k": the K highest scores, ties to the lowest expert id | "gumbel": K drawn at random | "hash": by token id |
                     "balanced" (BASE) | "sinkhorn" | "expert_choice": each expert its best tokens | "positive": all scores > 0 |
                     "soft": none, tokens are mixed (Soft MoE)
    top_k            K, experts per token; their mean number for the last ones, whose routings have E slots per token
    vocabulary       V, rows of the hash table; 0 for the other choices
    slots            C, slots per expert and group of "soft"; 0 for the other choices
    iterations       of Sinkhorn's algorithm
    correction_bias  add a per-expert bias to the scores for the choice alone; it never enters a gate
    groups           the experts lie in this many groups of equal size, in order of their id
    top_groups       only experts of a token's best `top_groups` groups can be chosen (−∞ outside)
    group_score      "max" | "top2_sum": what makes a group good
    normalize        "none" | "sum" (gates divided by their sum + eps) | "softmax" (over the chosen scores)
    eps, scale       added to the sum; multiplied onto the gates at the end
    after_drop       gates are normalized over the experts that kept the token, instead of over those that it chose
    expert_scale     a learned factor for each expert, multiplied onto its gates
    second_choice    "always" | "random": a token's second expert is kept with probability min(1, gate / second_threshold)
    """

    top_k: int = 1
    choice: str = "top_k"
    vocabulary: int = 0
    slots: int = 0
    iterations: int = 8
    correction_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    normalize: str = "none"
    eps: float = 0.0
    scale: float = 1.0
    after_drop: bool = False
    expert_scale: bool = False
    second_choice: str = "always"
    second_threshold: float = 0.5

    def __post_init__(self) -> None:
        require(is_count(self.top_k, 1), f"gating.top_k is {self.top_k!r}; a token needs at least 1 expert")
        require(is_count(self.groups, 1), f"gating.groups is {self.groups!r}; it must be an integer ≥ 1")
        require(
            is_count(self.top_groups, 1) and self.top_groups <= self.groups,
            f"gating.top_groups is {self.top_groups!r}; it must lie between 1 and gating.groups = {self.groups}",
        )
        require(is_amount(self.eps), f"gating.eps is {self.eps!r}; it must be a finite number ≥ 0")
        require(is_amount(self.scale) and self.scale > 0, f"gating.scale is {self.scale!r}; it must be a finite number > 0")
        require(
            self.second_choice == "always" or self.top_k == 2,
            f"gating.second_choice is {self.second_choice!r} but gating.top_k is {self.top_k}; the rule is defined for top_k = 2",
        )
        threshold = self.second_threshold
        require(is_amount(threshold) and threshold > 0, f"gating.second_threshold is {threshold!r}; it must be a finite number > 0")
        require(is_count(self.iterations, 1), f"gating.iterations is {self.iterations!r}; it must be an integer ≥ 1")
        require(
            is_count(self.vocabulary, 0) and (self.vocabulary > 0) == (self.choice == "hash"),
            f"gating.vocabulary is {self.vocabulary!r} with gating.choice = {self.choice!r}; only a hash table has rows",
        )
        require(
            is_count(self.slots, 0) and (self.slots > 0) == (self.choice == "soft"),
            f"gating.slots is {self.slots!r} with gating.choice = {self.choice!r}; only 'soft' has slots, and at least 1",
        )
        require(
            self.choice != "balanced" or self.top_k == 1,
            f"gating.choice is 'balanced' but gating.top_k is {self.top_k}; the assignment gives each token 1 expert",
        )


@dataclass(frozen=True)
class CapacityConfig:
    """expert_TK → keep_TK: how many assignments an expert accepts from one group of tokens.

    formula      "none" (dropless) | "per_assignment": ⌈factor·K·S/E⌉ | "per_token": ⌈factor·S/E⌉, S the group's real tokens
    factor       the capacity factor in training
    eval_factor  in evaluation; None: the same
    minimum      no capacity is smaller than this
    order        who comes first: "choice_major" (all first choices, then all second ones) | "token_major" (by position) |
                 "probability" (the highest gate) | "batch_prioritized" (in each round the token with the highest gate) | "random"
    recycle      "none" | "random": in training a dropped token takes a free slot of another expert (Hunyuan; K = 1)
    """

    formula: str = "none"
    factor: float = 1.0
    eval_factor: float | None = None
    minimum: int = 0
    order: str = "choice_major"
    recycle: str = "none"

    def __post_init__(self) -> None:
        for name in ("factor", "eval_factor"):
            value = getattr(self, name)
            require(value is None or is_amount(value), f"capacity.{name} is {value!r}; a capacity cannot be negative or infinite")
        require(self.factor is not None, "capacity.factor is None; only capacity.eval_factor may be left open")
        require(is_count(self.minimum, 0), f"capacity.minimum is {self.minimum!r}; it must be an integer ≥ 0")


@dataclass(frozen=True)
class ExpertsConfig:
    """rows_ND → out_ND.

    count         E, routed experts, those without a network included
    width         F, the width of one routed expert
    activation    "relu" | "gelu" | "relu2" (squared ReLU) | "swiglu" | "geglu" | "clamped_swiglu" (gpt-oss)
    bias          whether both matrices of an expert have a bias
    gate_inputs   gates multiply an expert's input (Llama 4) instead of its output
    shared        how many experts every token passes through, beside the routed ones
    shared_width  the width of all of them together (they are one FFN: a sum of FFNs is a wider FFN); None: shared · width
    shared_gate   "none" | "sigmoid" (Qwen2-MoE: each token weighs them) | "softmax" (PR-MoE: it weighs them against the routed ones)
    zero_computation  pairs (kind, how many), the last of the count, no networks: "zero" | "copy" | "constant" (MoE++, LongCat-Flash)
    network_share     τ, how much load and capacity a network gets for each 1 of a zero-computation expert (MoE++)
    dropout       the share of the networks' hidden units that training sets to 0 (Switch, in fine-tuning)
    """

    count: int = 8
    width: int = 16
    activation: str = "swiglu"
    bias: bool = False
    gate_inputs: bool = False
    shared: int = 0
    shared_width: int | None = None
    shared_gate: str = "none"
    zero_computation: tuple[tuple[str, int], ...] = ()
    network_share: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "zero_computation", named_pairs(self.zero_computation, "experts.zero_computation"))
        require(is_count(self.count, 1), f"experts.count is {self.count!r}; a layer needs at least 1 expert")
        require(is_count(self.width, 1), f"experts.width is {self.width!r}; it must be an integer ≥ 1")
        require(is_amount(self.dropout) and self.dropout < 1, f"experts.dropout is {self.dropout!r}; it must lie in [0, 1)")
        require(is_count(self.shared, 0), f"experts.shared is {self.shared!r}; it must be an integer ≥ 0")
        require(
            self.shared_width is None or (self.shared > 0 and is_count(self.shared_width, 1)),
            f"experts.shared_width is {self.shared_width!r} with experts.shared = {self.shared}; it needs shared ≥ 1 and a width ≥ 1",
        )
        require(
            self.shared_gate == "none" or self.shared > 0,
            f"experts.shared_gate is {self.shared_gate!r} but experts.shared is {self.shared}: there is nothing to weigh",
        )

    @property
    def networks(self) -> int:
        """How many of the routed experts are networks: the first ones."""
        return self.count - sum(number for _, number in self.zero_computation)

    @property
    def total_shared_width(self) -> int:
        """Width of the shared experts together; 0 without them."""
        return self.shared * self.width if self.shared_width is None else self.shared_width


@dataclass(frozen=True)
class BalanceConfig:
    """What keeps the load even.

    losses     pairs (name, weight): "first_choice_balance" (GShard, Switch) | "expert_balance" (DeepSeekMoE) |
               "sequence_balance" (DeepSeek-V3) | "device_balance", "communication_balance" (DeepSeek-V2, groups for devices) |
               "heterogeneous_balance" (MoE++) | "router_z" (ST-MoE) | "importance", "smooth_load" (Shazeer 2017) |
               "gate_l1" (ReMoE), whose weight is multiplied by the router's penalty
    bias_rule  "none" | "sign": after every optimizer step the correction bias moves by ±bias_rate against the load (DeepSeek-V3) |
               "centered_sign": less the mean step (torchtitan) | "proportional": by how far the load is from even (LongCat-Flash)
    bias_rate  γ
    penalty_start, penalty_rate   where gate_l1's penalty starts, and what it is multiplied or divided by after every optimizer step
    """

    losses: tuple[tuple[str, float], ...] = ()
    bias_rule: str = "none"
    bias_rate: float = 0.0
    penalty_start: float = 1e-8
    penalty_rate: float = 1.2

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", named_pairs(self.losses, "balance.losses"))
        names = [name for name, _ in self.losses]
        require(len(set(names)) == len(names), f"balance.losses names a loss twice: {names}")
        for name, weight in self.losses:
            require(is_amount(weight), f"balance.losses gives {name!r} the weight {weight!r}; it must be a finite number ≥ 0")
        require(is_amount(self.bias_rate), f"balance.bias_rate is {self.bias_rate!r}; it must be a finite number ≥ 0")
        start, rate = self.penalty_start, self.penalty_rate
        require(is_amount(start) and start > 0, f"balance.penalty_start is {start!r}; it must be a finite number > 0")
        require(is_amount(rate) and rate >= 1, f"balance.penalty_rate is {rate!r}; it must be a finite number ≥ 1")


PARTS = {
    "scores": ScoresConfig, "gating": GatingConfig, "capacity": CapacityConfig, "experts": ExpertsConfig, "balance": BalanceConfig,
}  # fmt: skip


@dataclass(frozen=True)
class MoEConfig:
    """One Mixture-of-Experts layer: its model width and the five parts of its data flow.

    Raises ValueError with the values when fields contradict each other or name no function that exists.
    """

    d_model: int
    scores: ScoresConfig = field(default_factory=ScoresConfig)
    gating: GatingConfig = field(default_factory=GatingConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)

    def __post_init__(self) -> None:
        for name, part in PARTS.items():
            require(isinstance(getattr(self, name), part), f"{name} is {getattr(self, name)!r}; it must be a {part.__name__}")
            check_flags(getattr(self, name), f"{name}.")
        gating, experts = self.gating, self.experts
        require(is_count(self.d_model, 1), f"d_model is {self.d_model!r}; it must be an integer ≥ 1")
        require(gating.top_k <= experts.count, f"gating.top_k is {gating.top_k} but experts.count is {experts.count}")
        require(
            experts.count % gating.groups == 0,
            f"gating.groups is {gating.groups}, which does not divide experts.count = {experts.count}",
        )
        open_experts = gating.top_groups * (experts.count // gating.groups)
        require(
            gating.top_k <= open_experts,
            f"gating.top_k is {gating.top_k} but top_groups = {gating.top_groups} of groups = {gating.groups} leave {open_experts} experts",
        )
        require(
            self.balance.bias_rule == "none" or gating.correction_bias,
            f"balance.bias_rule is {self.balance.bias_rule!r} but gating.correction_bias is False, so there is no bias to update",
        )
        self._check_tables()
        self._check_rule()

    def _check_rule(self) -> None:
        """What the rule of gating.choice excludes."""
        from .choices import CHOICES

        gating, rule, said = self.gating, CHOICES[self.gating.choice], f"gating.choice is {self.gating.choice!r}"
        require(rule.in_groups or gating.groups == 1, f"{said}, which knows no groups, but gating.groups is {gating.groups}")
        require(rule.biased or not gating.correction_bias, f"{said}, which no bias steers, but gating.correction_bias is True")
        one_expert = gating.top_k == 1 and not rule.every_expert
        recycle, second = self.capacity.recycle, gating.second_choice
        require(
            recycle == "none" or one_expert, f"capacity.recycle is {recycle!r}, for one expert per token, but {said}, top_k {gating.top_k}"
        )
        require(
            recycle == "none" or "importance" not in dict(self.balance.losses),
            f"balance.losses names 'importance', the sum of an expert's own gates, but capacity.recycle is {recycle!r}",
        )
        always = second == "always" or not rule.every_expert
        require(always, f"{said}, which knows no second choice, but gating.second_choice is {second!r}")
        formula = self.capacity.formula
        require(gating.choice != "positive" or formula == "none", f"{said}, which is dropless, but capacity.formula is {formula!r}")
        require(
            gating.normalize != "sum" or self.scores.function != "relu" or gating.eps > 0,
            f"gating.eps is {gating.eps}, but scores.function 'relu' can give a token only zeros to divide by their sum",
        )
        rule.check(self)

    def _check_tables(self) -> None:
        """Each tagged choice must be a row of its stage's table (imported here: the stages import this file)."""
        from . import balancing, capacity, choices, experts, gating, noise, scores, shared, zero_computation

        tables = {
            "scores.function": (self.scores.function, scores.SCORE_FUNCTIONS),
            "scores.noise": (self.scores.noise, scores.INPUT_NOISE),
            "scores.input_norm": (self.scores.input_norm, scores.INPUT_NORMS),
            "scores.logit_noise": (self.scores.logit_noise, noise.LOGIT_NOISE),
            "gating.choice": (self.gating.choice, choices.CHOICES),
            "gating.group_score": (self.gating.group_score, gating.GROUP_SCORES),
            "gating.normalize": (self.gating.normalize, gating.NORMALIZERS),
            "gating.second_choice": (self.gating.second_choice, gating.SECOND_CHOICES),
            "capacity.formula": (self.capacity.formula, capacity.FORMULAS),
            "capacity.order": (self.capacity.order, capacity.ORDERS),
            "capacity.recycle": (self.capacity.recycle, capacity.RECYCLES),
            "experts.activation": (self.experts.activation, experts.ACTIVATIONS),
            "experts.shared_gate": (self.experts.shared_gate, shared.SHARED_GATES),
            "balance.bias_rule": (self.balance.bias_rule, balancing.BIAS_RULES),
        }
        rows = [(where, value, table) for where, (value, table) in tables.items()]
        rows += [("balance.losses", name, balancing.LOSSES) for name, _ in self.balance.losses]
        rows += [("experts.zero_computation", kind, zero_computation.KINDS) for kind, _ in self.experts.zero_computation]
        for where, value, table in rows:
            require(isinstance(value, str) and value in table, f"{where} is {value!r}; known: {', '.join(table)}")
        zero_computation.check(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for JSON; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MoEConfig:
        """The config that `to_dict` wrote. Raises ValueError naming an unknown field."""
        checked = known_fields(cls, data)
        return cls(**{k: PARTS[k](**known_fields(PARTS[k], v)) if k in PARTS else v for k, v in checked.items()})
