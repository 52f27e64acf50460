"""Museum, room one: balance losses and what they count."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..balancing import LossInputs, coefficient_of_variation, count_load, expert_balance_forward, router_z_forward
from ..choices import choose
from ..config import GatingConfig
from ..gating import top_k
from ..scores import softmax_forward
from ..tokens import token_info
from .exhibit import Bug, expect

EXPERTS = 8


def loss_inputs(logits_TE: np.ndarray, slots: int, pad_mask: np.ndarray | None = None) -> LossInputs:
    """What a balance loss sees of a softmax router with these logits."""
    tokens = token_info(len(logits_TE), pad_mask=pad_mask)
    scores_TE, _ = softmax_forward(logits_TE)
    expert_TK, picked_TK = choose(scores_TE, None, GatingConfig(top_k=slots), tokens)
    return LossInputs(logits_TE, scores_TE, scores_TE, expert_TK, picked_TK, tokens)


def _even(slots: int) -> LossInputs:
    """Token t prefers expert t: the load is exactly even."""
    row = np.linspace(2, -2, EXPERTS)
    return loss_inputs(np.stack([np.roll(row, t) for t in range(EXPERTS)]), slots)


def _collapsed(first: int = 0) -> LossInputs:
    """Every token prefers the same two experts."""
    logits_TE = np.zeros((2 * EXPERTS, EXPERTS))
    logits_TE[:, first : first + 2] = 9, 8.9
    return loss_inputs(logits_TE, 2)


def balance_loss(inputs: LossInputs) -> float:
    """The reference's loss, whatever a variant of it is given beside the inputs."""
    return float(expert_balance_forward(inputs)[0])


def _product(f_E: np.ndarray, p_E: np.ndarray) -> float:
    return float(len(f_E) * (f_E * p_E).sum())


def _counts(inputs: LossInputs) -> np.ndarray:
    return count_load(inputs.expert_TK, inputs.picked_TK, inputs.scores_TE.shape[1])


def even_load_costs_one(loss: Callable[[LossInputs], float]) -> None:
    """At exactly even load the loss is 1, for every K."""
    for slots in (1, 2, 4):
        value = loss(_even(slots))
        expect(abs(value - 1) < 1e-9, f"even load with K = {slots} costs {value:.4f} instead of 1")


def collapse_costs_the_most(loss: Callable[[LossInputs], float]) -> None:
    """When every token takes the same two of eight experts, the loss is close to its maximum E / K = 4."""
    value = loss(_collapsed())
    expect(value > 3.9, f"a collapsed router costs {value:.3f}; the maximum is 4")


def layers_that_collapse_apart_stay_expensive(loss: Callable[[Sequence[LossInputs]], float]) -> None:
    """Two layers that collapse on different experts cost as much as two that collapse on the same ones."""
    same, apart = loss([_collapsed(), _collapsed()]), loss([_collapsed(), _collapsed(first=4)])
    expect(abs(same - apart) < 1e-9, f"layers collapsed apart cost {apart:.3f}, collapsed alike {same:.3f}")


def drops_do_not_change_the_loss(loss: Callable[[LossInputs, np.ndarray], float]) -> None:
    """The loss is about what the router wants; how many of its wishes capacity grants does not matter."""
    inputs = _collapsed()
    granted_TK = np.arange(len(inputs.expert_TK))[:, None] < np.array([[3, 5]])
    free, tight = loss(inputs, np.ones_like(inputs.picked_TK)), loss(inputs, granted_TK)
    expect(abs(free - tight) < 1e-9, f"the same router costs {free:.3f} without drops and {tight:.3f} with them")


def padding_changes_no_loss(loss: Callable[[LossInputs], float]) -> None:
    """Appending padding leaves the loss as it is."""
    logits_TE = np.random.default_rng(0).standard_normal((6, EXPERTS))
    longer = np.concatenate([logits_TE, np.full((4, EXPERTS), 3.0) * np.eye(EXPERTS)[0]])
    bare, padded = loss(loss_inputs(logits_TE, 2)), loss(loss_inputs(longer, 2, np.arange(10) >= 6))
    expect(abs(bare - padded) < 1e-9, f"the loss is {bare:.4f}, and {padded:.4f} with four padding tokens appended")


def padding_is_no_load(load: Callable[[np.ndarray, np.ndarray, int], np.ndarray]) -> None:
    """Padding tokens add nothing to the load."""
    expert_TK, real_T = np.array([[0, 1], [2, 1], [0, 3], [0, 3]]), np.array([True, True, False, False])
    counted = load(expert_TK, np.repeat(real_T[:, None], 2, axis=1), 4).tolist()
    expect(counted == [1, 2, 1, 0], f"two real tokens load the experts with {counted} instead of [1, 2, 1, 0]")


def z_loss_is_the_mean_square_of_logsumexp(loss: Callable[[LossInputs, np.ndarray], float]) -> None:
    """Equal logits z cost (z + log E)², whatever the correction bias is."""
    inputs, expected = loss_inputs(np.full((5, EXPERTS), 2.0), 2), (2 + np.log(EXPERTS)) ** 2
    value = loss(inputs, np.linspace(-1, 1, EXPERTS))
    expect(abs(value - expected) < 1e-9, f"equal logits cost {value:.4f} instead of {expected:.4f}")


def first_choices_are_the_best_experts(load: Callable[[np.ndarray, int], np.ndarray]) -> None:
    """The first choice counted for a token is the expert with its highest score."""
    scores_TE = softmax_forward(np.random.default_rng(1).standard_normal((50, EXPERTS)))[0]
    expected, counted = np.bincount(scores_TE.argmax(1), minlength=EXPERTS), load(scores_TE, 2)
    expect(np.array_equal(counted, expected), f"first choices are {expected.tolist()}, counted {counted.tolist()}")


def variation_is_of_the_population(variation: Callable[[np.ndarray], float]) -> None:
    """One busy expert of two varies by 1, and a single expert by 0."""
    two, one = variation(np.array([0.0, 4.0])), variation(np.array([4.0]))
    expect(two == 1 and one == 0, f"loads [0, 4] vary by {two:.4f} instead of 1, the load [4] by {one} instead of 0")


def not_divided_by_k(inputs: LossInputs) -> float:
    """Counts assignments per token, not per assignment: even load costs K, and a coefficient tuned elsewhere is K times too large."""
    return _product(_counts(inputs) / len(inputs.expert_TK), inputs.scores_TE.mean(0))


def probability_of_the_chosen_only(inputs: LossInputs) -> float:
    """Averages only the chosen scores: experts that nobody chose get no gradient, and even load does not cost 1."""
    chosen_TE = np.zeros_like(inputs.scores_TE)
    chosen_TK = np.take_along_axis(inputs.scores_TE, inputs.expert_TK, axis=1)
    np.put_along_axis(chosen_TE, inputs.expert_TK, chosen_TK, axis=1)
    return _product(_counts(inputs) / inputs.expert_TK.size, chosen_TE.mean(0))


def softmax_twice(inputs: LossInputs) -> float:
    """Takes the router's probabilities for logits and applies the softmax again, which flattens them: the penalty is almost gone."""
    return _product(_counts(inputs) / inputs.expert_TK.size, softmax_forward(inputs.scores_TE)[0].mean(0))


def mean_score_per_slot(inputs: LossInputs) -> float:
    """Averages the chosen scores slot by slot and broadcasts the K means against the E counts: the loss no longer sees who is busy."""
    slot_K = np.take_along_axis(inputs.scores_TE, inputs.expert_TK, axis=1).mean(0)
    return float(EXPERTS * ((_counts(inputs) / inputs.expert_TK.size)[:, None] * slot_K).sum())


def local_expert_count(inputs: LossInputs) -> float:
    """Scales by the square of the experts on this rank instead of all experts (here on two ranks)."""
    return balance_loss(inputs) / 2**2


def divided_by_shared_too(inputs: LossInputs) -> float:
    """Divides the counts by all active experts, the two shared ones included, instead of the K routed ones."""
    slots = inputs.expert_TK.shape[1]
    return balance_loss(inputs) * slots / (slots + 2)


def layers_pooled(layers: Sequence[LossInputs]) -> float:
    """Concatenates the logits of all layers first: layers that collapse on different experts look even together."""
    return balance_loss(loss_inputs(np.concatenate([inputs.logits_TE for inputs in layers]), layers[0].expert_TK.shape[1]))


def mean_over_layers(layers: Sequence[LossInputs]) -> float:
    """The reference's loss of each layer, averaged."""
    return float(np.mean([balance_loss(inputs) for inputs in layers]))


def loss_before_the_drop(inputs: LossInputs, keep_TK: np.ndarray) -> float:
    """The reference's loss, which never sees the drops."""
    return balance_loss(inputs)


def counted_after_the_drop(inputs: LossInputs, keep_TK: np.ndarray) -> float:
    """Counts what capacity let through: a full expert looks no busier than its capacity, so collapse is cheap."""
    return _product(count_load(inputs.expert_TK, keep_TK, EXPERTS) / inputs.expert_TK.size, inputs.scores_TE.mean(0))


def counted_in_an_aliased_mask(inputs: LossInputs, keep_TK: np.ndarray) -> float:
    """Takes the first choices as a view of the one-hot mask, from which the drop then erases them in place."""
    mask_TKE = np.eye(EXPERTS)[inputs.expert_TK]
    first_TE = mask_TKE[:, 0]
    mask_TKE *= keep_TK[:, :, None]
    return _product(first_TE.mean(0), inputs.scores_TE.mean(0))


def divided_by_the_survivors(inputs: LossInputs, keep_TK: np.ndarray) -> float:
    """Divides the sums by the number of tokens that kept an expert instead of T, so the loss grows as tokens are dropped."""
    survivors = int(keep_TK.any(1).sum())
    return _product(count_load(inputs.expert_TK, keep_TK, EXPERTS) / keep_TK.sum(), inputs.scores_TE.sum(0) / survivors)


def padding_in_the_loss(inputs: LossInputs) -> float:
    """Counts and averages over every position, padding included."""
    counts_E = np.bincount(inputs.expert_TK.ravel(), minlength=EXPERTS)
    return _product(counts_E / inputs.expert_TK.size, inputs.scores_TE.mean(0))


def padding_in_the_load(expert_TK: np.ndarray, picked_TK: np.ndarray, experts: int) -> np.ndarray:
    """Counts every position, so the correction bias is steered by padding."""
    return np.bincount(expert_TK.ravel(), minlength=experts)


def z_loss(inputs: LossInputs, correction_bias: np.ndarray) -> float:
    """The reference's z-loss, which never sees the correction bias."""
    return float(router_z_forward(inputs)[0])


def z_loss_of_biased_logits(inputs: LossInputs, correction_bias: np.ndarray) -> float:
    """Adds the correction bias to the logits first, so that the loss punishes the balance controller."""
    return z_loss(inputs._replace(logits_TE=inputs.logits_TE + correction_bias), correction_bias)


def z_loss_mean_over_experts(inputs: LossInputs, correction_bias: np.ndarray) -> float:
    """Averages over tokens and experts instead of tokens: the coefficient becomes E times weaker."""
    return z_loss(inputs, correction_bias) / EXPERTS


def z_loss_of_probabilities(inputs: LossInputs, correction_bias: np.ndarray) -> float:
    """Overwrites the logits with probabilities on the way to the loss, whose logsumexp then hardly moves."""
    return z_loss(inputs._replace(logits_TE=inputs.scores_TE), correction_bias)


def first_choice_load(scores_TE: np.ndarray, slots: int) -> np.ndarray:
    """The reference's count of first choices."""
    return np.bincount(top_k(scores_TE, slots)[:, 0], minlength=EXPERTS)


def unsorted_first_choice(scores_TE: np.ndarray, slots: int) -> np.ndarray:
    """Asks for an unsorted top-k and takes its first column for the first choice."""
    return np.bincount(np.sort(top_k(scores_TE, slots), axis=1)[:, 0], minlength=EXPERTS)


def sample_variation(load_E: np.ndarray) -> float:
    """Uses the unbiased variance (N − 1): larger for few experts, NaN for one."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.sqrt(((load_E - load_E.mean()) ** 2).sum() / np.float64(len(load_E) - 1)) / load_E.mean())


BUGS = (
    Bug("loss not divided by K", "huggingface/transformers load_balancing_loss_func; allenai/OLMoE#45",
        not_divided_by_k, balance_loss, even_load_costs_one),
    Bug("probability over the chosen only", "paiml/aprender#2162", probability_of_the_chosen_only, balance_loss, even_load_costs_one),
    Bug("softmax twice", "huggingface/transformers#45111", softmax_twice, balance_loss, collapse_costs_the_most),
    Bug("loss blind to the load", "mindspore-ai/hyper-parallel#752", mean_score_per_slot, balance_loss, even_load_costs_one),
    Bug("number of local experts", "laekov/fastmoe fmoe/gates/gshard_gate.py", local_expert_count, balance_loss, even_load_costs_one),
    Bug("shared experts in K", "near: DeepSeekMoE (Dai et al. 2024), eq. 13", divided_by_shared_too, balance_loss, even_load_costs_one),
    Bug("layers pooled", "huggingface/transformers#31464, #29503",
        layers_pooled, mean_over_layers, layers_that_collapse_apart_stay_expensive),
    Bug("counted after the drop", "laekov/fastmoe fmoe/gates/switch_gate.py; NVIDIA/Megatron-LM#1513",
        counted_after_the_drop, loss_before_the_drop, drops_do_not_change_the_loss),
    Bug("first choices in an aliased mask", "lucidrains/st-moe-pytorch st_moe_pytorch.py",
        counted_in_an_aliased_mask, loss_before_the_drop, drops_do_not_change_the_loss),
    Bug("divided by the survivors", "laekov/fastmoe fmoe/gates/switch_gate.py",
        divided_by_the_survivors, loss_before_the_drop, drops_do_not_change_the_loss),
    Bug("padding in the loss", "NVIDIA/Megatron-LM#1984; huggingface/transformers#28505",
        padding_in_the_loss, balance_loss, padding_changes_no_loss),
    Bug("padding in the load", "NVIDIA/Megatron-LM#2121, #4776", padding_in_the_load, count_load, padding_is_no_load),
    Bug("z-loss of biased logits", "near: ST-MoE (Zoph et al. 2022), eq. 5, beside a correction bias",
        z_loss_of_biased_logits, z_loss, z_loss_is_the_mean_square_of_logsumexp),
    Bug("z-loss averaged over experts", "near: ST-MoE (Zoph et al. 2022), eq. 5",
        z_loss_mean_over_experts, z_loss, z_loss_is_the_mean_square_of_logsumexp),
    Bug("z-loss of probabilities", "huggingface/transformers#48293, #48421",
        z_loss_of_probabilities, z_loss, z_loss_is_the_mean_square_of_logsumexp),
    Bug("first choice of an unsorted top-k", "laekov/fastmoe fmoe/gates/gshard_gate.py",
        unsorted_first_choice, first_choice_load, first_choices_are_the_best_experts),
    Bug("unbiased variance", "laekov/fastmoe fmoe/gates/noisy_gate.py",
        sample_variation, coefficient_of_variation, variation_is_of_the_population),
)  # fmt: skip
