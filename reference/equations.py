"""The equations of the rarer routers, by their ids; `notation.EQUATIONS` holds them with all others."""

from __future__ import annotations

from typing import NamedTuple


class Equation(NamedTuple):
    """latex: in KaTeX's dialect; function: where it is computed, a dotted name; paper: a key of PAPERS, or "" for common knowledge."""

    latex: str
    function: str
    paper: str = ""


# fmt: off
ROUTERS = {
    "router-norm": Equation(
        r"\tilde x_t = \frac{x_t}{\sqrt{\frac{1}{D} \sum_d x_{td}^2 + 10^{-6}}}", "reference.scores.rms_norm_forward", "RMSNorm"),
    "router-residual": Equation(
        r"z^{(l)}_{te} = \sum_d x_{td} W_{ed} + \sum_j z^{(l-1)}_{tj}\, V_{ej}", "reference.scores.residual_forward", "MoE++"),
    "softcap": Equation(r"\tilde z_{te} = c \tanh \frac{z_{te}}{c}", "reference.scores.softcap_forward", "Gemma 2"),
    "score-sqrt-softplus": Equation(
        r"s_{te} = \sqrt{\log(1 + \exp z_{te})}", "reference.scores.sqrt_softplus_forward"),
    "score-relu": Equation(r"s_{te} = \max(z_{te}, 0)", "reference.scores.relu_score_forward", "ReMoE"),
    "box-muller": Equation(
        r"n = \sqrt{-2 \log(1 - u)} \, \cos 2 \pi v, \quad u, v \sim \mathcal{U}(0, 1)", "reference.noise.standard_normal"),
    "noisy-logits": Equation(
        r"h_{te} = z_{te} + n_{te}\, \sigma_{te}, \quad "
        r"\sigma_{te} = \operatorname{softplus}\Bigl(\sum_d x_{td} W^{\text{noise}}_{ed}\Bigr) + 0.01, \quad n_{te} \sim \mathcal{N}(0, 1)",
        "reference.noise.learned_noise_forward", "Shazeer 2017"),
    "cv-squared": Equation(
        r"\text{CV}^2(a) = \frac{\frac{1}{E} \sum_e (a_e - \bar a)^2}{\bar a^2 + 10^{-10}}", "reference.noise.squared_variation",
        "Shazeer 2017"),
    "loss-importance": Equation(
        r"\mathcal{L} = \text{CV}^2(I), \quad I_e = \sum_{(t, k) : e_{tk} = e} g_{tk}", "reference.noise.importance_forward",
        "Shazeer 2017"),
    "smooth-load": Equation(
        r"\hat\ell_e = \sum_t \Phi\Bigl(\frac{z_{te} - \theta_{te}}{\sigma_{te}}\Bigr), \quad \theta_{te} = K\text{-th highest of } "
        r"\{h_{tj} : j \ne e\}", "reference.noise.smooth_load", "Shazeer 2017"),
    "loss-smooth-load": Equation(
        r"\mathcal{L} = \text{CV}^2(\hat\ell)", "reference.noise.smooth_load_forward", "Shazeer 2017"),
    "loss-gate-l1": Equation(
        r"\mathcal{L} = \frac{E}{T} \sum_t \sum_e f_e s_{te}, \quad f_e = \frac{\ell_e}{K T}", "reference.penalty.gate_l1_forward",
        "ReMoE"),
    "penalty-update": Equation(
        r"\lambda \leftarrow \lambda \, \alpha^{\operatorname{sign}\left(\frac{1}{T} \sum_e \ell_e - K\right)}",
        "reference.penalty.update_penalty", "ReMoE"),

    "choose-gumbel": Equation(
        r"e_{t1}, \dots, e_{tK} = \operatorname{top}K_e\, (\log p_{te} - \log(-\log u_{te})), \quad u_{te} \sim \mathcal{U}(0, 1)",
        "reference.choices.choose_gumbel", "Gumbel-top-k"),
    "expert-choice": Equation(
        r"e \in \mathcal{E}_t \iff t \in \operatorname{top}C_{t'}\, s_{t'e}, \quad "
        r"C = \Bigl\lceil f_{\text{cap}} \frac{K S}{E} \Bigr\rceil",
        "reference.choices.choose_tokens", "Expert choice"),
    "hash-table": Equation(
        r"\bigl|\{v : H_{vk} = e\}\bigr| \in \Bigl\{\Bigl\lfloor \frac{V}{E} \Bigr\rfloor, \Bigl\lceil \frac{V}{E} \Bigr\rceil\Bigr\}",
        "reference.choices.balanced_hash", "Hash layers"),
    "choose-hash": Equation(r"e_{tk} = H_{\text{id}(t), k}", "reference.choices.choose_by_hash", "Hash layers"),
    "unit": Equation(r"\hat x = \frac{x}{\sqrt{\sum_d x_d^2 + 10^{-6}}}", "reference.soft.unit_forward", "Soft MoE"),
    "soft-logits": Equation(r"z_{tec} = s \sum_d \hat x_{td}\, \hat W_{ecd}", "reference.soft.slot_logits_forward", "Soft MoE"),
    "soft-dispatch": Equation(
        r"d_{tec} = \frac{\exp z_{tec}}{\sum_{t' \in B(t)} \exp z_{t'ec}}", "reference.soft.soft_mix", "Soft MoE"),
    "soft-combine": Equation(r"c_{tec} = \frac{\exp z_{tec}}{\sum_{e', c'} \exp z_{te'c'}}", "reference.soft.soft_mix", "Soft MoE"),
    "soft-moe": Equation(
        r"y_t = \sum_{e, c} c_{tec} \operatorname{FFN}_e\Bigl(\sum_{t'} d_{t'ec}\, x_{t'}\Bigr)", "reference.soft.mix_forward", "Soft MoE"),
    "balanced-assignment": Equation(
        r"\max_{e_1, \dots, e_S} \sum_t a_{t, e_t} \quad \text{such that} \quad \bigl|\{t : e_t = e\}\bigr| \le C",
        "reference.choices.balanced_assignment", "BASE"),
    "choose-balanced": Equation(
        r"a_{te} = z_{te}, \quad C = \Bigl\lceil \frac{S}{E} \Bigr\rceil", "reference.choices.choose_balanced", "BASE"),
    "sinkhorn-potential": Equation(
        r"r_t = -\log \sum_e \exp(z_{te} + c_e), \quad c_e \leftarrow -\log \sum_t \exp(z_{te} + r_t)",
        "reference.choices.sinkhorn_potential", "Unified scaling"),
    "choose-sinkhorn": Equation(
        r"e_{t1}, \dots, e_{tK} = \operatorname{top}K_e\, (z_{te} + c_e)", "reference.choices.choose_sinkhorn", "Unified scaling"),
    "choose-positive": Equation(r"\mathcal{E}_t = \{e : s_{te} > 0\}", "reference.choices.choose_positive", "ReMoE"),
    "survivors": Equation(
        r"g_{tk} = \frac{s_{t, e_{tk}}}{\sum_{j : \text{keep}_{tj}} s_{t, e_{tj}}}", "reference.gating.survivors"),
    "expert-scale": Equation(r"g_{tk} \leftarrow g_{tk}\, \rho_{e_{tk}}", "reference.gating.expert_scale_forward"),

    "expert-dropout": Equation(
        r"h \leftarrow \frac{m \odot h}{1 - p}, \quad m_f = \mathbf{1}[u_f \ge p], \quad u_f \sim \mathcal{U}(0, 1)",
        "reference.expert_dropout.dropout_factors", "Switch"),
    "expert-zero": Equation(r"E(x) = 0", "reference.zero_computation.zero_forward", "MoE++"),
    "expert-copy": Equation(r"E(x) = x", "reference.zero_computation.copy_forward", "MoE++"),
    "expert-constant": Equation(
        r"E(x) = \alpha_1 x + \alpha_2 v, \quad (\alpha_1, \alpha_2) = \operatorname{softmax}(W_c\, x)",
        "reference.zero_computation.constant_forward", "MoE++"),
    "loss-heterogeneous": Equation(
        r"\mathcal{L} = \Bigl( N + \frac{Z}{\tau} \Bigr) \sum_e \eta_e \frac{\ell_e}{\sum_j \ell_j} P_e, \quad "
        r"\eta_e = \begin{cases} 1 & e \le N \\ \tau & \text{otherwise} \end{cases}",
        "reference.balancing.heterogeneous_balance_forward", "MoE++"),
    "capacity-heterogeneous": Equation(
        r"C_e = \Bigl\lceil f_{\text{cap}} \frac{w_e K S}{\tau N + Z} \Bigr\rceil, \quad "
        r"w_e = \begin{cases} \tau & e \le N \\ 1 & \text{otherwise} \end{cases}",
        "reference.capacity.expert_capacity", "MoE++"),
    "networks-per-token": Equation(
        r"K_e = K \frac{\tau N}{\tau N + Z}", "reference.zero_computation.networks_per_token", "MoE++"),

    "order-probability": Equation(
        r"(t, k) \prec (t', k') \iff g_{tk} > g_{t'k'}, \quad \text{ties by position}", "reference.capacity.by_probability"),
    "order-batch-prioritized": Equation(
        r"(t, k) \prec (t', k') \iff k < k' \ \lor\ (k = k' \land \max_j g_{tj} > \max_j g_{t'j})",
        "reference.capacity.batch_prioritized", "V-MoE"),
    "order-random": Equation(
        r"(t, k) \prec (t', k') \iff k < k' \ \lor\ (k = k' \land u_t < u_{t'}), \quad u_t \sim \mathcal{U}(0, 1)",
        "reference.capacity.in_random_order", "Multitask MoE"),
    "lstm-parameters": Equation(r"4 (2 D^2 + D)", "reference.cost.lstm_parameters", "LSTM"),
    "recycle": Equation(
        r"e_t \leftarrow \text{free}_{\lfloor r_t n \rfloor}, \quad r_t \sim \mathcal{U}(0, 1)", "reference.capacity.recycle_at_random",
        "Hunyuan-Large"),
}
# fmt: on
