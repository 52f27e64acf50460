"""Museum, room five: what happens inside an expert, and where its gate belongs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from ..config import ExpertsConfig, GatingConfig, MoEConfig, ScoresConfig
from ..dispatch import DispatchCache, combine_forward, dispatch_forward
from ..experts import CLAMP, Params, clamped_swiglu_forward, concatenate_gate_up
from ..layer import init_params, moe_forward, parameter_shapes
from ..scores import sigmoid
from .exhibit import Bug, expect

D, E = 6, 4
QWEN2 = MoEConfig(D, gating=GatingConfig(top_k=2), experts=ExpertsConfig(E, 5, shared=1, shared_gate="sigmoid"))
LLAMA4 = MoEConfig(D, ScoresConfig("sigmoid"), experts=ExpertsConfig(E, 5, gate_inputs=True))
TWO = MoEConfig(D, ScoresConfig("identity"), GatingConfig(top_k=2, normalize="softmax"), experts=ExpertsConfig(2, 5))
COPIES = dataclasses.replace(TWO, experts=ExpertsConfig(4, 5, zero_computation=(("copy", 2),)))
Rows = Callable[[np.ndarray], np.ndarray]


def alternating_rows_are_told_apart(hidden: Rows) -> None:
    """Rows that alternate gate, up, gate, up are paired with their own neighbours: (1, 2), (−3, ½), (9, −9)."""
    found = hidden(np.array([1.0, 2.0, -3.0, 0.5, 9.0, -9.0]))
    right = np.array([2.537387, -0.027107, -41.999719])
    expect(np.abs(found - right).max() < 1e-6, f"six alternating rows became {np.round(found, 3).tolist()}, not {right.tolist()}")


def the_gate_half_is_free_below(hidden: Rows) -> None:
    """The gate half is clamped above only: at −9 it is what SwiGLU of slope 1.702 makes of −9."""
    found, right = float(hidden(np.array([-9.0, 0.0]))[0]), float(-9 * sigmoid(np.array(-9 * 1.702)))
    expect(abs(found - right) < 1e-12, f"a gate of −9 gives {found:.3e} instead of {right:.3e}")


def a_closed_linear_half_still_passes(hidden: Rows) -> None:
    """With a linear half of 0 the gate half passes with weight 1."""
    found, right = float(hidden(np.array([2.0, 0.0]))[0]), float(2 * sigmoid(np.array(2 * 1.702)))
    expect(abs(found - right) < 1e-12, f"gate 2 beside a linear half of 0 gives {found:.4f} instead of {right:.4f}")


def biases_are_weighed(combine: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> None:
    """A down bias of 1 in each of two experts with gates ¼ and ½ adds ¾ to the token."""
    found = float(combine(np.zeros((2, 1)), np.ones((E, 1)), np.array([[0.25, 0.5]]))[0, 0])
    expect(abs(found - 0.75) < 1e-12, f"biases of 1 under the gates ¼ and ½ add {found} instead of 0.75")


def shared_experts_have_their_own_gate(layer: Callable[[np.ndarray, Params], np.ndarray]) -> None:
    """Shared weights of zero leave the routed experts alone, whatever the gate of the shared ones says."""
    rng = np.random.default_rng(0)
    x_TD, params = rng.standard_normal((7, D)), init_params(QWEN2, rng)
    params = params | {name: 0 * params[name] for name in ("shared.gate_up_proj", "shared.down_proj")}
    moved = np.abs(layer(x_TD, params) - layer(x_TD, params | {"shared.gate": 9 + params["shared.gate"]})).max()
    expect(moved < 1e-12, f"the gate of shared experts that give 0 moves the output by {moved:.3f}")


def gates_bend_with_the_expert(layer: Callable[[np.ndarray, Params], np.ndarray]) -> None:
    """At small inputs SwiGLU is nearly quadratic: a gate on the input acts almost as its square on the output."""
    rng = np.random.default_rng(0)
    x_TD, params = 1e-4 * rng.standard_normal((7, D)), init_params(LLAMA4, rng)
    params["router.weight"][:] = 0
    ungated = layer(x_TD, params | {"router.weight": params["router.weight"]}) / 0.25
    expert_0 = moe_forward(x_TD, params, MoEConfig(D, ScoresConfig("sigmoid"), experts=ExpertsConfig(E, 5)))[0].y / 0.5
    ratio = float(np.abs(ungated).sum() / np.abs(expert_0).sum())
    expect(abs(ratio - 1) < 1e-3, f"a gate of ½ on inputs acts as {ratio / 4:.3f} on the output instead of ¼")


def only_networks_have_matrices(shapes: Callable[[MoEConfig], dict[str, tuple[int, ...]]]) -> None:
    """Two experts more that copy their input cost two rows of the router, and nothing else."""
    found = sum(math.prod(shape) for shape in shapes(COPIES).values()) - sum(math.prod(shape) for shape in shapes(TWO).values())
    expect(found == 2 * D, f"two experts that copy brought {found} parameters instead of {2 * D}")


def a_copy_is_the_input(layer: Callable[[np.ndarray, Params], np.ndarray]) -> None:
    """A token that goes to copies alone, with gates that sum to 1, comes back as it was, and its caller's array stays as it is."""
    rng = np.random.default_rng(0)
    x_TD, params = np.abs(rng.standard_normal((7, D))), init_params(COPIES, rng)
    params["router.weight"] = np.repeat([-9.0, -9.0, 9.0, 9.0], D).reshape(4, D)
    before_TD = x_TD.copy()
    found = float(np.abs(layer(x_TD, params) - before_TD).max())
    expect(found < 1e-12, f"two copies under gates that sum to 1 change a token by {found:.3f}")
    expect(bool((x_TD == before_TD).all()), "the caller's tokens were written to")


def concatenated_first(rows: np.ndarray) -> np.ndarray:
    """The reference: one layout inside, and a conversion of the other."""
    return clamped_swiglu_forward(concatenate_gate_up(rows[None])[0][None])[0][0]


def reference_activation(rows: np.ndarray) -> np.ndarray:
    """The reference on rows that are concatenated already."""
    return clamped_swiglu_forward(rows[None])[0][0]


def split_in_halves(rows: np.ndarray) -> np.ndarray:
    """Takes the first half of alternating rows for the gate half."""
    return reference_activation(rows)


def clamped_on_both_sides(rows: np.ndarray) -> np.ndarray:
    """Clamps the gate half below too, as if it were the linear one."""
    gate_proj, up = np.split(rows, 2)
    return clamped_swiglu_forward(np.concatenate([np.maximum(gate_proj, -CLAMP), up])[None])[0][0]


def without_the_one(rows: np.ndarray) -> np.ndarray:
    """Multiplies by the linear half instead of the linear half plus 1."""
    gate_proj, up = np.split(rows, 2)
    return clamped_swiglu_forward(np.concatenate([gate_proj, up - 1])[None])[0][0]


def _dispatch() -> DispatchCache:
    return dispatch_forward(np.zeros((1, 1)), np.array([[0, 1]]), np.ones((1, 2), bool), E)[1]


def biased_then_combined(out_ND: np.ndarray, bias: np.ndarray, gate_TK: np.ndarray) -> np.ndarray:
    """The reference: a bias is part of its expert's output, and weighed like it."""
    return combine_forward(out_ND + bias[:2], gate_TK, _dispatch())[0]


def biased_after_the_gate(out_ND: np.ndarray, bias: np.ndarray, gate_TK: np.ndarray) -> np.ndarray:
    """Adds the chosen experts' biases after the weighted sum, unweighted."""
    return combine_forward(out_ND, gate_TK, _dispatch())[0] + bias[:2].sum(0)


def gated_shared(x_TD: np.ndarray, params: Params) -> np.ndarray:
    """The reference."""
    return moe_forward(x_TD, params, QWEN2)[0].y


def gate_over_everything(x_TD: np.ndarray, params: Params) -> np.ndarray:
    """Multiplies the sum of routed and shared experts by the shared experts' gate."""
    plain = MoEConfig(D, gating=QWEN2.gating, experts=ExpertsConfig(E, 5, shared=1))
    return sigmoid(x_TD @ params["shared.gate"].T) * moe_forward(x_TD, params, plain)[0].y


def gated_inputs(x_TD: np.ndarray, params: Params) -> np.ndarray:
    """The reference."""
    return moe_forward(x_TD, params, LLAMA4)[0].y


def gated_outputs(x_TD: np.ndarray, params: Params) -> np.ndarray:
    """Moves the gate behind the expert, as in every other model; the expert is not linear, so this is another function."""
    return moe_forward(x_TD, params, MoEConfig(D, LLAMA4.scores, experts=ExpertsConfig(E, 5)))[0].y


def own_matrices(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    """The reference."""
    return parameter_shapes(config)


def matrices_for_all(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    """Stacks a first matrix for every expert, those without a network included, which nothing ever reads."""
    shapes = parameter_shapes(config)
    return shapes | {"experts.gate_up_proj": (config.experts.count, *shapes["experts.gate_up_proj"][1:])}


def copies(x_TD: np.ndarray, params: Params) -> np.ndarray:
    """The reference."""
    return moe_forward(x_TD, params, COPIES)[0].y


def doubled_in_place(x_TD: np.ndarray, params: Params) -> np.ndarray:
    """Multiplies the tokens by K in place, to make up for gates that sum to 1; a copy then answers with K times its input."""
    x_TD *= COPIES.gating.top_k
    return moe_forward(x_TD, params, COPIES)[0].y


BUGS = (
    Bug("halves of alternating rows", "near: openai/gpt-oss gpt_oss/torch/model.py, whose layout differs from everybody's",
        split_in_halves, concatenated_first, alternating_rows_are_told_apart),
    Bug("gate half clamped below", "near: openai/gpt-oss gpt_oss/torch/model.py, which clamps its two halves differently",
        clamped_on_both_sides, reference_activation, the_gate_half_is_free_below),
    Bug("the forgotten 1", "near: openai/gpt-oss gpt_oss/torch/model.py, which adds 1 to the linear half",
        without_the_one, reference_activation, a_closed_linear_half_still_passes),
    Bug("bias outside the gate", "near: pytorch/torchtitan gpt_oss, which scales the down bias for tensor parallelism",
        biased_after_the_gate, biased_then_combined, biases_are_weighed),
    Bug("shared gate over everything", "near: Qwen2 (Yang et al. 2024), §2.2.2, which does not print the gate",
        gate_over_everything, gated_shared, shared_experts_have_their_own_gate),
    Bug("input gates moved to the output", "near: Llama 4's released code; every model before it gates outputs",
        gated_outputs, gated_inputs, gates_bend_with_the_expert),
    Bug("matrices for experts that have none", "huggingface/transformers modeling_longcat_flash.py: first matrices of 768 experts",
        matrices_for_all, own_matrices, only_networks_have_matrices),
    Bug("tokens doubled in place", "SkyworkAI/MoE-plus-plus MoE++/moe_plus_plus_layer.py, unless its configuration forbids it",
        doubled_in_place, copies, a_copy_is_the_input),
)  # fmt: skip
