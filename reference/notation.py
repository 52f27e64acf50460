"""The letters of array shapes, every equation by its id, and how the papers write what is named here.

An equation's id stands in parentheses in the docstring of the function that computes it; the documentation finds the LaTeX here.
"""

from __future__ import annotations

from .equations import ROUTERS, Equation

LETTERS = {
    "B": "sequences; GShard's groups are these",
    "S": "positions in a sequence; of a group whose capacity is counted, its tokens without padding",
    "T": "tokens, B · S where the sequences are equally long",
    "D": "model width",
    "F": "width of an expert",
    "M": "rows of an expert's first matrix: 2F where its activation is gated, else F",
    "E": "experts",
    "K": "experts chosen by a token",
    "A": "assignments, T · K, kept or not",
    "N": "rows, one for each assignment: T · K when nothing is dropped",
    "C": "capacity: slots of an expert",
    "G": "groups of experts",
    "I": "experts inside one group of experts, E / G",
    "Q": "crossings: a token and a rank that holds experts of it",
    "R": "ranks",
    "L": "experts local to a rank",
    "P": "bounds between the experts' rows, E + 1",
    "V": "vocabulary, or the labels of tokens",
    "H": "attention heads",
}
"""An array named `gate_TK` has shape [T, K]; equal letters in one function are equal sizes."""

PAPERS = {
    "LSTM": "Hochreiter and Schmidhuber 1997, Long Short-Term Memory, Neural Computation 9(8)",
    "Shazeer 2017": "Shazeer et al. 2017, Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer, "
    "arXiv:1701.06538",
    "GShard": "Lepikhin et al. 2020, GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding, arXiv:2006.16668",
    "Switch": "Fedus, Zoph and Shazeer 2021, Switch Transformers, arXiv:2101.03961",
    "ST-MoE": "Zoph et al. 2022, ST-MoE: Designing Stable and Transferable Sparse Expert Models, arXiv:2202.08906",
    "MegaBlocks": "Gale et al. 2022, MegaBlocks: Efficient Sparse Training with Mixture-of-Experts, arXiv:2211.15841",
    "DeepSeekMoE": "Dai et al. 2024, DeepSeekMoE: Towards Ultimate Expert Specialization, arXiv:2401.06066",
    "OpenMoE": "Xue et al. 2024, OpenMoE: An Early Effort on Open Mixture-of-Experts Language Models, arXiv:2402.01739",
    "DeepSeek-V2": "DeepSeek-AI 2024, DeepSeek-V2, arXiv:2405.04434",
    "Loss-free": "Wang et al. 2024, Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, arXiv:2408.15664",
    "DeepSeek-V3": "DeepSeek-AI 2024, DeepSeek-V3 Technical Report, arXiv:2412.19437",
    "Hash layers": "Roller et al. 2021, Hash Layers For Large Sparse Models, arXiv:2106.04426",
    "BASE": "Lewis et al. 2021, BASE Layers: Simplifying Training of Large, Sparse Models, arXiv:2103.16716",
    "V-MoE": "Riquelme et al. 2021, Scaling Vision with Sparse Mixture of Experts, arXiv:2106.05974",
    "GLaM": "Du et al. 2021, GLaM: Efficient Scaling of Language Models with Mixture-of-Experts, arXiv:2112.06905",
    "Expert choice": "Zhou et al. 2022, Mixture-of-Experts with Expert Choice Routing, arXiv:2202.09368",
    "Soft MoE": "Puigcerver et al. 2023, From Sparse to Soft Mixtures of Experts, arXiv:2308.00951",
    "DeepSeek-V4": "DeepSeek-AI 2026, DeepSeek-V4: Towards Highly Efficient Million-Token Context Intelligence, arXiv:2606.19348",
    "Unified scaling": "Clark et al. 2022, Unified Scaling Laws for Routed Language Models, arXiv:2202.01169",
    "Gumbel-top-k": "Kool et al. 2019, Stochastic Beams and Where to Find Them, arXiv:1903.06059",
    "ReMoE": "Wang et al. 2024, ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing, arXiv:2412.14711",
    "Hunyuan-Large": "Sun et al. 2024, Hunyuan-Large: An Open-Source MoE Model with 52 Billion Activated Parameters, arXiv:2411.02265",
    "RMSNorm": "Zhang and Sennrich 2019, Root Mean Square Layer Normalization, arXiv:1910.07467",
    "Gemma 2": "Gemma Team 2024, Gemma 2: Improving Open Language Models at a Practical Size, arXiv:2408.00118",
    "GQA": "Ainslie et al. 2023, GQA: Training Generalized Multi-Query Transformer Models, arXiv:2305.13245",
    "GLU variants": "Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202",
    "Primer": "So et al. 2021, Primer: Searching for Efficient Transformers for Language Modeling, arXiv:2109.08668",
    "Qwen2": "Yang et al. 2024, Qwen2 Technical Report, arXiv:2407.10671",
    "Llama 4": "Meta 2025, The Llama 4 herd (announcement), and the model card meta-llama/Llama-4-Scout-17B-16E",
    "Global batch": "Qiu et al. 2025, Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized "
    "Mixture-of-Expert Models, arXiv:2501.11873",
    "MoE++": "Jin et al. 2024, MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts, arXiv:2410.07348",
    "LongCat-Flash": "Meituan LongCat Team 2025, LongCat-Flash Technical Report, arXiv:2509.01322",
    "Kaplan": "Kaplan et al. 2020, Scaling Laws for Neural Language Models, arXiv:2001.08361",
    "Jacobs 1991": "Jacobs, Jordan, Nowlan and Hinton 1991, Adaptive Mixtures of Local Experts, Neural Computation 3(1)",
    "Jordan & Jacobs": "Jordan and Jacobs 1994, Hierarchical Mixtures of Experts and the EM Algorithm, Neural Computation 6(2)",
    "gpt-oss": "OpenAI 2025, gpt-oss-120b & gpt-oss-20b Model Card, arXiv:2508.10925",
    "DeepSpeed-MoE": "Rajbhandari et al. 2022, DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training, arXiv:2201.05596",
    "Multitask MoE": "Kim et al. 2021, Scalable and Efficient MoE Training for Multitask Multilingual Models, arXiv:2109.10465",
    "GELU": "Hendrycks and Gimpel 2016, Gaussian Error Linear Units, arXiv:1606.08415",
    "Shannon": "Shannon 1948, A Mathematical Theory of Communication, Bell System Technical Journal 27",
    "Phipson & Smyth": "Phipson and Smyth 2010, Permutation P-values Should Never Be Zero, Stat. Appl. Genet. Mol. Biol. 9(1)",
    "StableMoE": "Dai et al. 2022, StableMoE: Stable Routing Strategy for Mixture of Experts, arXiv:2204.08396",
    "Cohen": "Cohen 1960, A Coefficient of Agreement for Nominal Scales, Educational and Psychological Measurement 20(1)",
    "Theil": "Theil 1970, On the Estimation of Relationships Involving Qualitative Variables, American Journal of Sociology 76(1)",
}
"""Short name → reference. Which section or equation of it is meant stands in the function's docstring."""


# fmt: off
EQUATIONS = {
    "router-logits": Equation(r"z_{te} = \sum_d x_{td}\, W_{ed} + b_e", "reference.scores.logits_forward", "Shazeer 2017"),
    "jitter": Equation(
        r"\tilde x_{td} = x_{td}\, u_{td}, \quad u_{td} \sim \mathcal{U}(1 - \varepsilon, 1 + \varepsilon)",
        "reference.scores.jitter", "Switch"),
    "softmax": Equation(r"s_{te} = \frac{\exp z_{te}}{\sum_j \exp z_{tj}}", "reference.scores.softmax_forward"),
    "score-sigmoid": Equation(r"s_{te} = \sigma(z_{te}) = \frac{1}{1 + \exp(-z_{te})}", "reference.scores.sigmoid_forward", "DeepSeek-V3"),
    "score-identity": Equation(r"s_{te} = z_{te}", "reference.scores.identity_forward"),
    "score-share": Equation(
        r"p_{te} = \frac{s_{te}}{\sum_j s_{tj} + 10^{-20}}", "reference.scores.share_forward", "DeepSeek-V3"),

    "top-k": Equation(
        r"(e_{t1}, \dots, e_{tK}) = \operatorname{argsort}_e(-v_{te})_{1 \dots K}, \quad \text{ties to the lowest } e",
        "reference.gating.top_k"),
    "group-max": Equation(r"q_{tg} = \max_{e \in \mathcal{G}_g} c_{te}", "reference.gating.group_max", "DeepSeek-V2"),
    "group-top2-sum": Equation(
        r"q_{tg} = \max_{\{i \ne j\} \subseteq \mathcal{G}_g} (c_{ti} + c_{tj})", "reference.gating.group_top2_sum", "DeepSeek-V3"),
    "group-limit": Equation(
        r"c'_{te} = \begin{cases} c_{te} & g(e) \in \operatorname{top}_g q_{tg} \\ -\infty & \text{otherwise} \end{cases}",
        "reference.gating.limit_to_groups", "DeepSeek-V2"),
    "choice": Equation(r"e_{t1}, \dots, e_{tK} = \operatorname{top}K_e\, (s_{te} + b_e)", "reference.choices.choose", "DeepSeek-V3"),
    "gate-plain": Equation(r"g_{tk} = s_{t, e_{tk}}", "reference.gating.no_normalizer_forward", "Switch"),
    "gate-sum": Equation(
        r"g_{tk} = \frac{s_{t, e_{tk}}}{\sum_j s_{t, e_{tj}} + \epsilon}", "reference.gating.sum_normalizer_forward", "GShard"),
    "gate-softmax": Equation(
        r"g_{tk} = \frac{\exp z_{t, e_{tk}}}{\sum_j \exp z_{t, e_{tj}}}", "reference.gating.softmax_normalizer_forward", "Shazeer 2017"),
    "gates": Equation(
        r"g_t = \lambda \cdot \operatorname{normalize}(s_{t, e_{t1}}, \dots, s_{t, e_{tK}})",
        "reference.gating.gates_forward"),
    "random-second": Equation(
        r"\text{keep the second expert of } t \iff \frac{g_{t2}}{\theta} > r_t, \quad r_t \sim \mathcal{U}(0, 1)",
        "reference.gating.random_second", "GShard"),

    "capacity-none": Equation(r"C = S", "reference.capacity.no_limit"),
    "capacity-per-assignment": Equation(
        r"C = \left\lceil f_{\text{cap}} \cdot \frac{K S}{E} \right\rceil", "reference.capacity.per_assignment", "GShard"),
    "capacity-per-token": Equation(
        r"C = \left\lceil f_{\text{cap}} \cdot \frac{S}{E} \right\rceil",
        "reference.capacity.per_token", "Switch"),
    "order-choice-major": Equation(
        r"(t, k) \prec (t', k') \iff k < k' \ \lor\ (k = k' \land t < t')", "reference.capacity.choice_major", "GShard"),
    "order-token-major": Equation(
        r"(t, k) \prec (t', k') \iff t < t' \ \lor\ (t = t' \land k < k')", "reference.capacity.token_major", "MegaBlocks"),
    "position": Equation(
        r"\pi_{tk} = \bigl|\{(t', k') \prec (t, k) : e_{t'k'} = e_{tk},\ B(t') = B(t)\}\bigr|", "reference.capacity.position_in_expert"),
    "keep": Equation(r"\text{keep}_{tk} \iff \pi_{tk} < C_{B(t)}", "reference.capacity.keep_within_capacity", "GShard"),

    "dispatch": Equation(r"r_n = x_{t(n)}, \quad e(1) \le e(2) \le \dots \le e(N)", "reference.dispatch.dispatch_forward", "MegaBlocks"),
    "gate-input": Equation(
        r"y_t = \sum_k \operatorname{FFN}_{e_{tk}}(g_{tk}\, x_t)", "reference.dispatch.gate_rows_forward", "Llama 4"),
    "combine": Equation(r"y_t = \sum_k g_{tk}\, o_{n(t, k)}", "reference.dispatch.combine_forward", "Shazeer 2017"),
    "one-hot-slots": Equation(
        r"\delta_{tkec} = \begin{cases} 1 & e_{tk} = e \text{ and } (t, k) \text{ fills slot } c \\ 0 & \text{otherwise} \end{cases}",
        "reference.dispatch.one_hot_slots", "GShard"),
    "one-hot-dispatch": Equation(r"r_{ecd} = \sum_{t, k} \delta_{tkec}\, x_{td}", "reference.dispatch.one_hot_dispatch", "GShard"),
    "one-hot-combine": Equation(
        r"y_{td} = \sum_{k, e, c} g_{tk}\, \delta_{tkec}\, o_{ecd}",
        "reference.dispatch.one_hot_combine", "GShard"),

    "act-relu": Equation(r"h = \max(u, 0)", "reference.experts.relu_forward", "Switch"),
    "act-gelu": Equation(r"h = u \, \Phi(u)", "reference.experts.gelu_forward", "GELU"),
    "act-swiglu": Equation(
        r"h = a \, \sigma(a) \odot u, \quad (a, u) = W_{\text{up}}\, x",
        "reference.experts.swiglu_forward", "GLU variants"),
    "act-relu2": Equation(r"h = \max(u, 0)^2", "reference.experts.relu2_forward", "Primer"),
    "act-geglu": Equation(r"h = a \, \Phi(a) \odot u", "reference.experts.geglu_forward", "GLU variants"),
    "act-clamped-swiglu": Equation(
        r"h = a' \, \sigma(1.702\, a') \odot (u' + 1), \quad a' = \min(a, 7), \quad u' = \min(\max(u, -7), 7)",
        "reference.experts.clamped_swiglu_forward", "gpt-oss"),
    "ffn": Equation(
        r"\operatorname{FFN}(x) = W_{\text{down}} \operatorname{act}(W_{\text{up}}\, x + b_{\text{up}}) + b_{\text{down}}",
        "reference.experts.ffn_forward"),
    "experts": Equation(r"o_n = \operatorname{FFN}_e(r_n), \quad \beta_e \le n < \beta_{e+1}", "reference.experts.experts_forward"),
    "shared": Equation(
        r"\sum_{i=1}^{K_s} \operatorname{FFN}_i(x_t) = \operatorname{FFN}_{\text{shared}}(x_t)",
        "reference.shared.shared_forward", "DeepSeekMoE"),
    "shared-sigmoid": Equation(
        r"y_t = \sum_k g_{tk} \operatorname{FFN}_{e_{tk}}(x_t) + \sigma(w \cdot x_t) \operatorname{FFN}_{\text{shared}}(x_t)",
        "reference.shared.sigmoid_forward", "Qwen2"),
    "shared-softmax": Equation(
        r"y_t = c_{t0} \sum_k g_{tk} \operatorname{FFN}_{e_{tk}}(x_t) + c_{t1} \operatorname{FFN}_{\text{shared}}(x_t), "
        r"\quad c_t = \operatorname{softmax}(W x_t + b)",
        "reference.shared.softmax_shares_forward", "DeepSpeed-MoE"),
    "moe": Equation(
        r"y_t = \sum_{k=1}^{K} g_{tk} \operatorname{FFN}_{e_{tk}}(x_t) + \operatorname{FFN}_{\text{shared}}(x_t)",
        "reference.layer.moe_forward"),

    "load": Equation(r"\ell_e = \bigl|\{(t, k) : e_{tk} = e\}\bigr|", "reference.balancing.count_load"),
    "importance": Equation(r"P_e = \frac{1}{T} \sum_t p_{te}", "reference.balancing.mean_probability"),
    "loss-first-choice": Equation(
        r"\mathcal{L} = E \sum_e f_e P_e, \quad f_e = \frac{1}{T} \bigl|\{t : e_{t1} = e\}\bigr|",
        "reference.balancing.first_choice_balance_forward", "Switch"),
    "loss-expert": Equation(
        r"\mathcal{L} = E \sum_e f_e P_e, \quad f_e = \frac{\ell_e}{K T}", "reference.balancing.expert_balance_forward", "DeepSeekMoE"),
    "loss-sequence": Equation(
        r"\mathcal{L} = \frac{E}{B} \sum_b \sum_e f_{be} P_{be}, \quad "
        r"f_{be} = \frac{1}{K T_b} \sum_{t \in b} \mathbf{1}[e \in \operatorname{top}K_j\, s_{tj}], "
        r"\quad P_{be} = \frac{1}{T_b} \sum_{t \in b} p_{te}",
        "reference.balancing.sequence_balance_forward", "DeepSeek-V3"),
    "loss-device": Equation(
        r"\mathcal{L} = E \sum_g f'_g P'_g, \quad f'_g = \frac{1}{|\mathcal{G}_g|} \sum_{e \in \mathcal{G}_g} f_e, "
        r"\quad P'_g = \sum_{e \in \mathcal{G}_g} P_e",
        "reference.balancing.device_balance_forward", "DeepSeekMoE"),
    "loss-communication": Equation(
        r"\mathcal{L} = \sum_g f''_g P'_g, \quad f''_g = \frac{G}{M T} "
        r"\bigl|\{t : \exists k,\ e_{tk} \in \mathcal{G}_g\}\bigr|",
        "reference.balancing.communication_balance_forward", "DeepSeek-V2"),
    "loss-global": Equation(
        r"\mathcal{L} = E \sum_e \frac{\ell^{\text{batch}}_e}{\sum_j \ell^{\text{batch}}_j} P_e",
        "reference.balancing.global_balance_forward", "Global batch"),
    "loss-router-z": Equation(
        r"\mathcal{L} = \frac{1}{T} \sum_t \Bigl( \log \sum_e \exp z_{te} \Bigr)^2", "reference.balancing.router_z_forward", "ST-MoE"),
    "bias-sign": Equation(
        r"b_e \leftarrow b_e + \gamma \operatorname{sign}(\bar\ell - \ell_e)",
        "reference.balancing.sign_bias_update", "Loss-free"),
    "bias-centered-sign": Equation(
        r"b_e \leftarrow b_e + \gamma \bigl(s_e - \tfrac{1}{E} \sum_j s_j\bigr), \quad s_e = \operatorname{sign}(\bar\ell - \ell_e)",
        "reference.balancing.centered_sign_bias_update"),
    "bias-proportional": Equation(
        r"b_e \leftarrow b_e + \mu \Bigl( \frac{1}{E} - \frac{\ell_e}{\sum_j \ell_j} \Bigr)",
        "reference.balancing.proportional_bias_update", "LongCat-Flash"),
    "max-violation": Equation(r"\text{MaxVio} = \frac{\max_e \ell_e}{\bar\ell} - 1", "reference.balancing.max_violation", "Loss-free"),
    "load-cv": Equation(
        r"\text{CV} = \frac{1}{\bar\ell} \sqrt{\frac{1}{E} \sum_e (\ell_e - \bar\ell)^2}",
        "reference.balancing.coefficient_of_variation", "Shazeer 2017"),
    "load-entropy": Equation(
        r"-\frac{1}{\log E} \sum_e q_e \log q_e, \quad q_e = \frac{\ell_e}{\sum_j \ell_j}", "reference.balancing.load_entropy"),
    "drop-by-position": Equation(
        r"\text{drop}_i = 1 - "
        r"\frac{\sum_{t \in \text{bin}_i} \sum_k \text{keep}_{tk}}{\sum_{t \in \text{bin}_i} \sum_k \text{picked}_{tk}}",
        "reference.balancing.drop_rate_by_position", "OpenMoE"),

    "mutual-information": Equation(
        r"I = \sum_{v, e} p(v, e) \log_2 \frac{p(v, e)}{p(v)\, p(e)}", "reference.specialization.mutual_information", "Shannon"),
    "permutation-p-value": Equation(
        r"p = \frac{1 + \bigl|\{i : I_i \ge I\}\bigr|}{1 + n}", "reference.specialization.measure", "Phipson & Smyth"),
    "uncertainty-coefficient": Equation(
        r"U = \frac{I}{H(\text{expert})}, \quad H = -\sum_e p(e) \log_2 p(e)", "reference.specialization.measure", "Theil"),
    "expert-share": Equation(
        r"\text{share}_{ve} = \frac{p(v, e)}{p(v)}", "reference.specialization.domain_expert_share"),

    "position-bin": Equation(
        r"v_t = \Bigl\lfloor \frac{b\, i_t}{S_{B(t)}} \Bigr\rfloor, \quad i_t = 0, 1, \dots \text{ the place in the sequence}",
        "reference.specialization.position_bins"),
    "weight-overlap": Equation(
        r"O = \frac{1}{E (E - 1) F} \sum_{e \ne f} \sum_i \max_j \cos(u_{ei}, u_{fj})", "reference.overlap.weight_overlap"),
    "output-overlap": Equation(
        r"O = \frac{1}{T E (E - 1)} \sum_t \sum_{e \ne f} \cos(o_{et}, o_{ft})", "reference.overlap.output_overlap"),
    "disabled-experts": Equation(
        r"\mathcal{M}_t = \operatorname{top}m_e\, c_{te}, \quad (e_{t1}, \dots, e_{tK}) = "
        r"\operatorname{top}K_{e \notin \mathcal{M}_t}\, c_{te}",
        "reference.redundancy.disable_top", "DeepSeekMoE"),
    "masked-increase": Equation(
        r"\Delta_m = \mathcal{L}(\mathcal{M} \text{ disabled}) - \mathcal{L}", "reference.redundancy.redundancy", "DeepSeekMoE"),
    "routing-churn": Equation(
        r"1 - a, \quad a = \frac{1}{T K} \sum_t |\mathcal{A}_t \cap \mathcal{B}_t|", "reference.churn.routing_churn", "StableMoE"),
    "chance-corrected": Equation(r"\kappa = \frac{a - a_0}{1 - a_0}", "reference.churn.routing_churn", "Cohen"),
    "best-relabelling": Equation(
        r"\max_\pi \sum_f n_{\pi(f), f}, \quad n_{ef} = |\{t : e \in \mathcal{A}_t,\ f \in \mathcal{B}_t\}|",
        "reference.churn.best_relabelling"),

    "layer-parameters": Equation(
        r"\underbrace{E D}_{\text{router}} + \underbrace{3 E D F}_{\text{routed}} + \underbrace{3 D F_{\text{shared}}}_{\text{shared}} "
        r"\quad (\text{active: } 3 K D F \text{ routed})", "reference.cost.layer_parameters"),
    "ffn-parameters": Equation(r"3 D F \text{ gated}, \quad 2 D F \text{ otherwise}", "reference.cost.ffn_parameters"),
    "gqa-parameters": Equation(r"2 D d_h (H + H_{\text{kv}})", "reference.cost.grouped_query_parameters", "GQA"),
    "mla-parameters": Equation(
        r"\underbrace{D r_q + r_q + r_q H (d_h + d_r)}_{\text{queries}} + \underbrace{D (r_{kv} + d_r) + r_{kv} + r_{kv} H (d_h + d_v)}"
        r"_{\text{keys, values}} + \underbrace{H d_v D}_{\text{output}}", "reference.cost.latent_parameters", "DeepSeek-V2"),
    "grouped-output-parameters": Equation(
        r"\underbrace{D r_q + r_q + r_q H d_h}_{\text{queries}} + \underbrace{D d_h + d_h}_{\text{key and value}} + "
        r"\underbrace{H d_h r_o + G r_o D}_{\text{output}} + \underbrace{H}_{\text{sinks}}",
        "reference.cost.grouped_output_parameters", "DeepSeek-V4"),
    "model-parameters": Equation(
        r"\sum_{\text{layers}} (\text{attention} + \text{norms} + \text{FFN or MoE}) + \text{embedding} + \text{head}",
        "reference.cost.model_parameters"),
    "flops-per-token": Equation(
        r"2 P_{\text{active}} + 2 w \Bigl( n_{\text{causal}} \frac{S + 1}{2} + n_{\text{full}}\, S \Bigr)",
        "reference.cost.flops_per_token", "Kaplan"),
    "experts-touched": Equation(
        r"E \Bigl( 1 - \bigl( 1 - \tfrac{K}{E} \bigr)^T \Bigr)", "reference.cost.expected_experts_touched"),
    "weight-bytes": Equation(
        r"b \Bigl( T D + P_{\text{resident}} + \frac{E_{\text{touched}}}{E} P_{\text{experts}} \Bigr)", "reference.cost.weight_bytes"),
    "activation-bytes": Equation(
        r"b\, T \bigl( D + E + K (2 D + M + F) + M_{\text{shared}} + F_{\text{shared}} \bigr)", "reference.cost.activation_bytes"),
    "dense-equal": Equation(r"F^* = \frac{P_{\text{active}}}{3 D} \text{ or } \frac{P_{\text{total}}}{3 D}", "reference.cost.dense_equal"),
    "loss-cooperative": Equation(
        r"\mathcal{L} = \frac{1}{T} \sum_t \Bigl( y_t - \sum_e g_{te} o_{te} \Bigr)^2", "reference.beginnings.cooperative", "Jacobs 1991"),
    "loss-expected": Equation(
        r"\mathcal{L} = \frac{1}{T} \sum_t \sum_e g_{te} (y_t - o_{te})^2", "reference.beginnings.expected", "Jacobs 1991"),
    "loss-competitive": Equation(
        r"\mathcal{L} = -\frac{1}{T} \sum_t \log \sum_e g_{te} \exp\Bigl( -\frac{(y_t - o_{te})^2}{2 \sigma^2} \Bigr)",
        "reference.beginnings.competitive", "Jacobs 1991"),
    "hierarchy-joint": Equation(
        r"P(g, i, y_t \mid x_t) = g_{tg}\, g_{t, i \mid g}\, \mathcal{N}(y_t; \mu_{tgi}, \sigma^2)",
        "reference.beginnings.log_joint", "Jordan & Jacobs"),
    "hierarchy": Equation(
        r"\mu_t = \sum_g g_{tg} \sum_i g_{t, i \mid g}\, \mu_{tgi}", "reference.beginnings.predict", "Jordan & Jacobs"),
    "hierarchy-em": Equation(
        r"h_{tgi} = \frac{P(g, i, y_t \mid x_t)}{\sum_{g', i'} P(g', i', y_t \mid x_t)}, \quad "
        r"\mu_{gi} \leftarrow \arg\min \sum_t h_{tgi} (y_t - \mu_{tgi})^2",
        "reference.beginnings.em_step", "Jordan & Jacobs"),
    "all-to-all-volume": Equation(
        r"V_{ij} = Q_{ij} D\, b + A_{ij} (b_{\text{gate}} + 4), \quad i \ne j", "reference.cost.all_to_all_volume", "DeepSeek-V3"),
}
# fmt: on
EQUATIONS |= ROUTERS

ROSETTA = {
    "token vector x_TD": {"Shazeer 2017": "x", "GShard": "x_s", "Switch": "x", "DeepSeekMoE": r"u_t^l", "DeepSeek-V3": r"u_t"},
    "T": {"GShard": r"S \text{ (in a group; } N \text{ in a batch)}", "Switch": "T", "DeepSeekMoE": "T", "DeepSeek-V3": "T"},
    "E": {"Shazeer 2017": "n", "GShard": "E", "Switch": "N", "DeepSeekMoE": r"mN - K_s", "DeepSeek-V3": "N_r"},
    "K": {"Shazeer 2017": "k", "GShard": "2", "Switch": "1", "DeepSeekMoE": r"mK - K_s", "DeepSeek-V3": "K_r"},
    "D": {"GShard": "M", "Switch": r"d_{\text{model}}", "DeepSeek-V3": "d"},
    "F": {"GShard": "H", "Switch": r"d_{\text{ff}}"},
    "router.weight": {"Shazeer 2017": "W_g", "GShard": "wg", "Switch": "W_r", "DeepSeekMoE": r"e_i^l", "DeepSeek-V3": "e_i"},
    "logit": {"Shazeer 2017": "H(x)_i", "GShard": r"wg \cdot x_s", "Switch": "h(x)_i", "DeepSeekMoE": r"{u_t^l}^{\mathsf T} e_i^l",
              "DeepSeek-V3": r"u_t^{\mathsf T} e_i"},
    "score": {"GShard": "g_{s,E}", "Switch": "p_i(x)", "DeepSeekMoE": "s_{i,t}", "DeepSeek-V3": "s_{i,t}"},
    "gate": {"Shazeer 2017": "G(x)_i", "GShard": r"\mathcal{G}_{s,e}", "Switch": "p_i(x)", "DeepSeekMoE": "g_{i,t}",
             "DeepSeek-V3": "g_{i,t}"},
    "correction bias": {"DeepSeek-V3": "b_i"},
    "bias_rate": {"DeepSeek-V3": r"\gamma"},
    "expert": {"Shazeer 2017": "E_i(x)", "GShard": r"\text{FFN}_e(x_s)", "Switch": "E_i(x)", "DeepSeekMoE": r"\text{FFN}_i(u_t^l)",
               "DeepSeek-V3": r"\text{FFN}^{(r)}_i(u_t)"},
    "shared experts": {"DeepSeekMoE": "K_s", "DeepSeek-V3": "N_s"},
    "capacity": {"GShard": "C", "Switch": r"\text{expert capacity}"},
    "top_groups": {"DeepSeek-V3": r"M \text{ (nodes)}"},
    "load share": {"GShard": "c_e / S", "Switch": "f_i", "DeepSeekMoE": r"f_i / N'", "DeepSeek-V3": "f_i / N_r"},
    "importance": {"Shazeer 2017": r"\text{Importance}(X)_i \text{ (a sum of gates)}", "GShard": "m_e", "Switch": "P_i",
                   "DeepSeekMoE": "P_i", "DeepSeek-V3": "P_i"},
    "weight of the balance loss": {"Shazeer 2017": r"w_{\text{importance}},\ w_{\text{load}}", "GShard": "k", "Switch": r"\alpha",
                                   "DeepSeekMoE": r"\alpha_1", "DeepSeek-V3": r"\alpha"},
}  # fmt: skip
"""Our name → paper (a key of PAPERS) → its symbol, in LaTeX; a paper without an entry has no symbol for it."""
