"""Museum, room four: the layer as a whole, its noise, its memory, its gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from ..balancing import count_load
from ..config import BalanceConfig, CapacityConfig, ExpertsConfig, GatingConfig, MoEConfig, ScoresConfig
from ..dispatch import DispatchCache, combine_forward, dispatch_forward
from ..experts import Params, experts_backward, experts_forward
from ..gating import gates_backward, gates_forward
from ..layer import init_params, moe_backward, moe_forward, update_bias
from ..scores import jitter, softmax_backward, softmax_forward
from ..tokens import Draws
from .equal import round_to
from .exhibit import Bug, expect

D, E = 6, 4
PLAIN = MoEConfig(D, gating=GatingConfig(top_k=2), experts=ExpertsConfig(count=E, width=5))
NOISY = dataclasses.replace(PLAIN, scores=ScoresConfig(noise="jitter", noise_scale=0.5))
TIGHT = dataclasses.replace(PLAIN, capacity=CapacityConfig("per_assignment", factor=0.5))
STEERED = dataclasses.replace(
    PLAIN, gating=GatingConfig(top_k=2, correction_bias=True), balance=BalanceConfig(bias_rule="sign", bias_rate=0.1)
)
BALANCED = dataclasses.replace(PLAIN, balance=BalanceConfig((("expert_balance", 0.5),)))
Layer = Callable[..., np.ndarray]


def _setting(config: MoEConfig, tokens: int = 9) -> tuple[np.ndarray, Params]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((tokens, D)), init_params(config, rng)


def dropped_tokens_add_nothing(layer: Layer) -> None:
    """A token that no expert kept has an output of exactly 0; the residual stream carries it."""
    x_TD, params = _setting(TIGHT)
    lost_T = ~moe_forward(x_TD, params, TIGHT)[0].routing.keep.any(1)
    y_TD = layer(x_TD, params, TIGHT)
    expect(lost_T.any() and not y_TD[lost_T].any(), f"{lost_T.sum()} dropped tokens have outputs up to {np.abs(y_TD[lost_T]).max():.3f}")


def evaluation_is_deterministic(layer: Layer) -> None:
    """Two evaluations with different generators agree bit for bit."""
    x_TD, params = _setting(NOISY)
    first, second = (layer(x_TD, params, NOISY, np.random.default_rng(seed)) for seed in (1, 2))
    expect(np.array_equal(first, second), f"two evaluations differ by {np.abs(first - second).max():.3f}")


def experts_see_no_noise(layer: Layer) -> None:
    """With a router of zeros, whose choice no noise can change, training with jitter gives the output without it, and x is left alone."""
    x_TD, params = _setting(NOISY)
    params["router.weight"][:] = 0
    given_TD = x_TD.copy()
    error = float(np.abs(layer(given_TD, params, NOISY, np.random.default_rng(1)) - moe_forward(x_TD, params, PLAIN)[0].y).max())
    expect(error < 1e-12 and np.array_equal(given_TD, x_TD), f"jitter moved the experts' output by {error:.3f}")


def evaluation_moves_no_bias(evaluate: Callable[[np.ndarray, Params, MoEConfig], None]) -> None:
    """A pass in evaluation leaves the correction bias as it is."""
    x_TD, params = _setting(STEERED)
    evaluate(x_TD, params, STEERED)
    bias_E = params["router.correction_bias"]
    expect(not bias_E.any(), f"evaluation moved the bias to {bias_E.astype(float).round(4).tolist()}")


def recomputing_counts_once(load: Callable[[np.ndarray, Params, MoEConfig], np.ndarray]) -> None:
    """A step that runs the forward pass again for its backward reports T · K assignments."""
    x_TD, params = _setting(PLAIN)
    total = int(load(x_TD, params, PLAIN).sum())
    expect(total == 18, f"9 tokens with K = 2 are counted as {total} assignments")


def idle_experts_have_no_gradient(gradient: Callable[[np.ndarray, np.ndarray, Params], np.ndarray]) -> None:
    """The weight gradient of an expert without tokens is exactly 0."""
    x_TD, params = _setting(PLAIN)
    dweight = gradient(x_TD, np.array([0, 4, 4, 7, 9]), params)
    expect(
        np.array_equal(dweight[1], np.zeros_like(dweight[1])), f"the gradient of an expert without tokens starts with {dweight[1].flat[0]}"
    )


def experts_start_apart(init: Callable[[MoEConfig, np.random.Generator], Params]) -> None:
    """No two experts start with the same weights."""
    weight = init(PLAIN, np.random.default_rng(0))["experts.down_proj"]
    distinct = len({expert.tobytes() for expert in weight})
    expect(distinct == E, f"{E} experts start with {distinct} distinct weights")


def replayed_choices_teach_the_router(gradient: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    """Every gate of a replayed choice is alive, also where the router has meanwhile come to prefer other experts."""
    logits_TE = np.array([[3.0, 2.0, 0.0, 0.0], [2.0, 3.0, 0.0, 0.0]])
    replayed_TK = np.array([[0, 1], [2, 3]])
    dlogits_TE = gradient(logits_TE, replayed_TK)
    expect(np.abs(dlogits_TE).max(1).min() > 0, f"the second token, replayed to other experts, has the gradient {dlogits_TE[1].tolist()}")


def balance_reaches_the_router(gradient: Callable[[np.ndarray, Params, MoEConfig], np.ndarray]) -> None:
    """Without any task the balance loss alone gives the router a gradient."""
    x_TD, params = _setting(BALANCED)
    largest = float(np.abs(gradient(x_TD, params, BALANCED)).max())
    expect(largest > 1e-4, f"the balance loss has a weight of 0.5 and gives the router a gradient of {largest}")


def small_contributions_survive(combine: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    """One expert's 256 and sixteen experts' 0.5 add up to 264."""
    total = float(combine(np.array([[256.0]] + [[0.5]] * 16), np.ones((1, 17)))[0, 0])
    expect(total == 264, f"256 + 16 · 0.5 is combined to {total}")


def repeated_experts_count_twice(combine: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    """A token sent twice to one expert (a hash table may do so) receives both gates."""
    importance_TE = combine(np.array([[1, 1, 2]]), np.array([[0.3, 0.2, 0.5]]))
    expect(np.allclose(importance_TE, [[0, 0.5, 0.5, 0]]), f"gates 0.3 + 0.2 to expert 1 became {importance_TE[0, 1]}")


def train_step(x_TD: np.ndarray, params: Params, config: MoEConfig, rng: np.random.Generator | None = None) -> np.ndarray:
    """Draws noise, and so gives another output for each draw: right in training, a mistake where it also runs in evaluation."""
    return moe_forward(x_TD, params, config, training=True, rng=rng)[0].y


def evaluate_output(x_TD: np.ndarray, params: Params, config: MoEConfig, rng: np.random.Generator | None = None) -> np.ndarray:
    """The same output on every call."""
    return moe_forward(x_TD, params, config, rng=rng)[0].y


def dropped_tokens_as_input(x_TD: np.ndarray, params: Params, config: MoEConfig) -> np.ndarray:
    """Starts from a copy of x instead of zeros and scales it by the router's probability: a dropped token becomes p · x, residual aside."""
    output, _ = moe_forward(x_TD, params, config)
    lost = ~output.routing.keep.any(axis=1, keepdims=True)
    return output.y + np.where(lost, output.routing.scores.max(1, keepdims=True) * x_TD, 0)


def jitter_in_place(x_TD: np.ndarray, params: Params, config: MoEConfig, rng: np.random.Generator) -> np.ndarray:
    """Multiplies the hidden states themselves by the jitter, so the experts compute on noise too."""
    x_TD *= jitter(x_TD, config.scores.noise_scale, Draws(rng))[1]
    return moe_forward(x_TD, params, PLAIN)[0].y


def evaluate_only(x_TD: np.ndarray, params: Params, config: MoEConfig) -> None:
    """The reference in evaluation; the bias moves by `update_bias` after an optimizer step, and by nothing else."""
    moe_forward(x_TD, params, config)


def forward_updates_the_bias(x_TD: np.ndarray, params: Params, config: MoEConfig) -> None:
    """Updates the bias inside every forward pass, evaluation included."""
    output, _ = moe_forward(x_TD, params, config)
    params["router.correction_bias"] = update_bias(params["router.correction_bias"], output.routing.load, config)


def load_of_a_recomputed_step(x_TD: np.ndarray, params: Params, config: MoEConfig) -> np.ndarray:
    """The reference's load: it is an output, so the pass that is run again for the backward adds nothing to it."""
    passes = [moe_forward(x_TD, params, config, training=True)[0].routing.load for _ in range(2)]
    return passes[0]


def load_accumulated_in_forward(x_TD: np.ndarray, params: Params, config: MoEConfig) -> np.ndarray:
    """Adds to a counter inside forward, which activation checkpointing runs twice."""
    counter_E = np.zeros(E, np.int64)
    for _ in range(2):
        routing = moe_forward(x_TD, params, config, training=True)[0].routing
        counter_E += count_load(routing.expert, routing.keep, E)
    return counter_E


def expert_gradient(x_TD: np.ndarray, bounds_P: np.ndarray, params: Params) -> np.ndarray:
    """The reference's gradient of the down-projections for a cotangent of ones."""
    _, cache = experts_forward(x_TD, bounds_P, params, PLAIN.experts)
    return experts_backward(np.ones_like(x_TD), cache)[1]["experts.down_proj"]


def uninitialised_gradient(x_TD: np.ndarray, bounds_P: np.ndarray, params: Params) -> np.ndarray:
    """Allocates the gradient without initialising it (here: NaN) and writes only the experts that have rows."""
    dweight = np.full_like(params["experts.down_proj"], np.nan)
    used = np.flatnonzero(np.diff(bounds_P))
    dweight[used] = expert_gradient(x_TD, bounds_P, params)[used]
    return dweight


def copies_of_one_expert(config: MoEConfig, rng: np.random.Generator) -> Params:
    """Makes every expert a deep copy of one module: equal experts get equal gradients while they are chosen alike."""
    params = init_params(config, rng)
    return {name: np.repeat(w[:1], E, axis=0) if name.startswith("experts.") else w for name, w in params.items()}


def replayed_gradient(logits_TE: np.ndarray, replayed_TK: np.ndarray) -> np.ndarray:
    """The reference's gradient through a replay: gates of the replayed experts, read from all scores."""
    scores_TE, cache = softmax_forward(logits_TE)
    gate_TK, gates_cache = gates_forward(scores_TE, replayed_TK, GatingConfig(top_k=2))
    return softmax_backward(gates_backward(gate_TK, gates_cache), cache)


def replay_reads_masked_scores(logits_TE: np.ndarray, replayed_TK: np.ndarray) -> np.ndarray:
    """Reads replayed gates from scores that are 0 outside today's top-k: a drifted choice gets gate 0 and no gradient, silently."""
    scores_TE, cache = softmax_forward(logits_TE)
    open_TE = scores_TE >= np.sort(scores_TE, axis=1)[:, -2:-1]
    gate_TK, gates_cache = gates_forward(np.where(open_TE, scores_TE, 0), replayed_TK, GatingConfig(top_k=2))
    return softmax_backward(gates_backward(gate_TK, gates_cache) * open_TE, cache)


def balance_gradient(x_TD: np.ndarray, params: Params, config: MoEConfig, dloss: float = 1.0) -> np.ndarray:
    """The reference's router gradient where the task has none."""
    _, cache = moe_forward(x_TD, params, config, training=True)
    return moe_backward(np.zeros_like(x_TD), cache, dloss)[1]["router.weight"]


def loss_computed_and_discarded(x_TD: np.ndarray, params: Params, config: MoEConfig) -> np.ndarray:
    """Computes and logs the balance loss but drops the value that ties it to the graph."""
    return balance_gradient(x_TD, params, config, dloss=0.0)


def _one_token(out_ND: np.ndarray) -> DispatchCache:
    expert_TK = np.arange(len(out_ND))[None]
    return dispatch_forward(np.zeros((1, out_ND.shape[1])), expert_TK, np.ones(expert_TK.shape, bool), len(out_ND))[1]


def combine_in_fp32(out_ND: np.ndarray, gate_TK: np.ndarray) -> np.ndarray:
    """The reference's combine of one token's rows."""
    return combine_forward(out_ND.astype(np.float32), gate_TK.astype(np.float32), _one_token(out_ND))[0]


def combine_in_bfloat16(out_ND: np.ndarray, gate_TK: np.ndarray) -> np.ndarray:
    """Accumulates the weighted outputs in bfloat16, where 256 + 0.5 is 256."""
    y_TD = np.zeros((1, out_ND.shape[1]))
    for gate, out_D in zip(gate_TK[0], out_ND, strict=True):
        y_TD = round_to(y_TD + gate * out_D, "bfloat16")
    return y_TD


def gates_by_expert(expert_TK: np.ndarray, gate_TK: np.ndarray) -> np.ndarray:
    """The reference's combine, seen per expert: each expert returns its own unit vector."""
    keep_TK = np.ones(expert_TK.shape, bool)
    _, dispatch = dispatch_forward(np.zeros((len(expert_TK), E)), expert_TK, keep_TK, E)
    return combine_forward(np.repeat(np.eye(E), np.diff(dispatch.bounds_P), axis=0), gate_TK, dispatch)[0]


def last_slot_wins(expert_TK: np.ndarray, gate_TK: np.ndarray) -> np.ndarray:
    """Scatters the gates by assignment instead of addition: of two slots with the same expert only the last one counts."""
    gate_TE = np.zeros((len(expert_TK), E))
    np.put_along_axis(gate_TE, expert_TK, gate_TK, axis=1)
    return gate_TE


BUGS = (
    Bug("dropped tokens as input", "huggingface/transformers#37017, #37123",
        dropped_tokens_as_input, evaluate_output, dropped_tokens_add_nothing),
    Bug("noise in evaluation", "hpcaitech/ColossalAI#419", train_step, evaluate_output, evaluation_is_deterministic),
    Bug("jitter reaches the experts", "huggingface/transformers modeling_mixtral.py, modeling_dbrx.py",
        jitter_in_place, train_step, experts_see_no_noise),
    Bug("bias moved in evaluation", "near: Wang et al. 2024, algorithm 1 (a step of training); databricks/megablocks#69 for the loss",
        forward_updates_the_bias, evaluate_only, evaluation_moves_no_bias),
    Bug("counted twice under recompute", "pytorch/torchtitan#1117, #1593",
        load_accumulated_in_forward, load_of_a_recomputed_step, recomputing_counts_once),
    Bug("idle experts keep old memory", "tgale96/grouped_gemm#36; pytorch/pytorch#172439",
        uninitialised_gradient, expert_gradient, idle_experts_have_no_gradient),
    Bug("experts start as copies", "deepspeedai/DeepSpeed deepspeed/moe/experts.py",
        copies_of_one_expert, init_params, experts_start_apart),
    Bug("replay reads masked scores", "ISEEKYAN/Megatron-LM#79",
        replay_reads_masked_scores, replayed_gradient, replayed_choices_teach_the_router),
    Bug("loss computed and discarded", "NVIDIA-NeMo/Automodel#1412",
        loss_computed_and_discarded, balance_gradient, balance_reaches_the_router),
    Bug("combine in bfloat16", "near: deepspeedai/DeepSpeed, which sums the K routes in fp32 for this reason",
        combine_in_bfloat16, combine_in_fp32, small_contributions_survive),
    Bug("last slot wins", "ISEEKYAN/Megatron-LM#175", last_slot_wins, gates_by_expert, repeated_experts_count_twice),
)  # fmt: skip
