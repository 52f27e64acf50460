"""The router's kernel against `reference.scores` and `reference.gating`: choices exactly, floats by the policy; and ties, NaN, batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from kernel_checks import DEVICE

from optimized.kernels import launch, routing
from reference.balancing import count_load
from reference.config import GatingConfig
from reference.gating import GROUP_SCORES, NORMALIZERS, gates_backward, gates_forward, limit_to_groups, top_k
from reference.proof.equal import assert_equal
from reference.proof.teeth import assert_teeth, tensor_mutations
from reference.scores import SCORE_FUNCTIONS

ROUTERS: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    "switch": (33, 8, "softmax", {"top_k": 1}),
    "gshard": (17, 6, "softmax", {"top_k": 2, "normalize": "sum"}),
    "mixtral": (40, 8, "identity", {"top_k": 2, "normalize": "softmax"}),
    "olmoe": (65, 64, "softmax", {"top_k": 8}),
    "deepseek-v2": (34, 20, "softmax", {"top_k": 4, "groups": 4, "top_groups": 2, "group_score": "max", "scale": 16.0}),
    "deepseek-v3": (
        70, 24, "sigmoid",
        {"top_k": 5, "groups": 8, "top_groups": 4, "group_score": "top2_sum", "normalize": "sum", "eps": 1e-20, "scale": 2.5,
         "correction_bias": True},
    ),
    "deepseek-v4": (
        23, 12, "sqrt_softplus", {"top_k": 3, "normalize": "sum", "eps": 1e-20, "scale": 1.5, "correction_bias": True},
    ),
    "relu": (23, 12, "relu", {"top_k": 3}),
    "prime": (19, 13, "sigmoid", {"top_k": 3, "normalize": "softmax", "correction_bias": True}),
    "all": (9, 5, "softmax", {"top_k": 5, "normalize": "sum"}),
    "one": (7, 1, "softmax", {"top_k": 1, "normalize": "sum"}),
    "most": (12, 40, "sigmoid", {"top_k": 16, "normalize": "sum", "eps": 1e-3}),
    "groups-of-one": (21, 6, "softmax", {"top_k": 2, "groups": 6, "top_groups": 3, "group_score": "top2_sum"}),
}  # fmt: skip


def drawn(name: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, str, GatingConfig]:
    tokens, experts, function, settings = ROUTERS[name]
    rng = np.random.default_rng(len(name))
    gating = GatingConfig(**settings)
    bias = rng.normal(0, 0.3, experts).astype(np.float32) if gating.correction_bias else None
    return rng.normal(0, 2, (tokens, experts)).astype(np.float32), bias, rng.random(tokens) < 0.8, function, gating


def on_device(array: np.ndarray | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array).to(DEVICE)


def reference_route(
    logits_TE: np.ndarray, expert_TK: np.ndarray, function: str, gating: GatingConfig, dtype: type
) -> dict[str, np.ndarray]:
    """Scores, gates and the gradient of the logits for given choices and the fixed cotangents, in one dtype."""
    rng = np.random.default_rng(7)
    row = SCORE_FUNCTIONS[function]
    scores_TE, scores_cache = row.forward(logits_TE.astype(dtype))
    gate_TK, gates_cache = gates_forward(scores_TE, expert_TK, gating)
    dscores_TE, dgate_TK = (rng.normal(size=array.shape).astype(np.float32).astype(dtype) for array in (scores_TE, gate_TK))
    total_TE = gates_backward(dgate_TK, gates_cache) + dscores_TE
    found = {"scores": scores_TE, "gate": gate_TK, "dlogits": row.backward(total_TE, scores_cache)}
    return found | {"of_gates": row.backward(gates_backward(dgate_TK, gates_cache), scores_cache), "dscores": dscores_TE, "dgate": dgate_TK}


@pytest.mark.parametrize("name", [name for name, (_, _, function, _) in ROUTERS.items() if function in SCORE_FUNCTIONS])
def test_route_and_its_backward(name: str) -> None:
    logits_TE, bias, real_T, function, gating = drawn(name)
    scores, expert, gate, load = launch.route(
        *(on_device(array) for array in (logits_TE, bias, real_T)), function, gating  # type: ignore[arg-type]
    )  # fmt: skip
    scores_TE = scores.cpu().numpy()
    expert_TK = top_k(limit_to_groups(scores_TE if bias is None else scores_TE + bias, gating), gating.top_k)
    picked_TK = np.repeat(real_T[:, None], gating.top_k, axis=1)
    np.testing.assert_array_equal(expert.cpu().numpy(), expert_TK)
    np.testing.assert_array_equal(load.cpu().numpy(), count_load(expert_TK, picked_TK, logits_TE.shape[1]))
    truth, eager = (reference_route(logits_TE, expert_TK, function, gating, dtype) for dtype in (np.float64, np.float32))
    dscores, dgate = (torch.from_numpy(truth.pop(key)).float().to(DEVICE) for key in ("dscores", "dgate"))
    found = {"scores": scores, "gate": gate}
    found["dlogits"] = launch.route_backward(dscores, dgate, scores, expert, function, gating)
    found["of_gates"] = launch.route_backward(None, dgate, scores, expert, function, gating)
    # With one expert a softmax is constantly 1; where K = E and gates are divided by their sum only rounding is left of some gradients.
    scales = {key: 1.0 for key in ("dlogits", "of_gates") if np.abs(truth[key]).max() < 1e-12}

    def assertion(outputs: Any) -> None:
        assert_equal(outputs, truth, eager, "float32", scales=scales)

    assertion({key: tensor.cpu().numpy() for key, tensor in found.items()})
    assert_teeth(assertion, truth, tensor_mutations(truth, "float32"), scales=scales, least=0 if name == "one" else 3)


def choices(logits: Any, gating: GatingConfig, function: str = "identity") -> list[list[int]]:
    tensor = torch.tensor(logits, dtype=torch.float32, device=DEVICE)
    real = torch.ones(len(tensor), dtype=torch.bool, device=DEVICE)
    return launch.route(tensor, None, real, function, gating)[1].tolist()


def test_ties_go_to_the_lowest_id() -> None:
    assert choices([[1, 3, 3, 3, 1], [0, 0, 0, 0, 0]], GatingConfig(top_k=3)) == [[1, 2, 3], [0, 1, 2]]
    groups = GatingConfig(top_k=2, groups=3, top_groups=1)
    assert choices([[1, 5, 5, 1, 5, 5]], groups) == [[1, 0]]
    rng = np.random.default_rng(0)
    coarse_TE = rng.integers(0, 3, (64, 11)).astype(np.float32)
    assert choices(coarse_TE, GatingConfig(top_k=4)) == np.argsort(-coarse_TE, axis=1, kind="stable")[:, :4].tolist()


def test_lanes_beyond_the_last_expert_are_never_chosen() -> None:
    """Below all others: scores that are more negative than the 0 of a padded lane, and −∞ itself."""
    low, nothing = (-1e30), float("-inf")
    assert choices([[low, 2 * low, 3 * low], [nothing, nothing, nothing]], GatingConfig(top_k=3)) == [[0, 1, 2], [0, 1, 2]]


def test_a_nan_token_spoils_itself_alone_and_still_chooses_different_experts() -> None:
    logits_TE, bias, real_T, function, gating = drawn("deepseek-v3")
    clean = launch.route(*(on_device(a) for a in (logits_TE, bias, real_T)), function, gating)  # type: ignore[arg-type]
    logits_TE[3] = np.nan
    logits_TE[5, 2] = np.nan
    spoilt = launch.route(*(on_device(a) for a in (logits_TE, bias, real_T)), function, gating)  # type: ignore[arg-type]
    others = [token for token in range(len(logits_TE)) if token not in (3, 5)]
    for one, other in zip(clean[:3], spoilt[:3], strict=True):
        assert torch.equal(one[others], other[others])
    assert len(set(spoilt[1][3].tolist())) == gating.top_k
    assert 2 not in spoilt[1][5].tolist()
    assert spoilt[0][3].isnan().all()


def test_a_token_is_routed_the_same_in_any_batch() -> None:
    logits_TE, bias, real_T, function, gating = drawn("olmoe")
    whole = launch.route(*(on_device(a) for a in (logits_TE, bias, real_T)), function, gating)  # type: ignore[arg-type]
    for token in (0, 31, 32, 64):
        alone = launch.route(
            on_device(logits_TE[token : token + 1]), None, on_device(real_T[token : token + 1]), function, gating  # type: ignore[arg-type]
        )  # fmt: skip
        for one, other in zip(whole[:3], alone[:3], strict=True):
            assert torch.equal(one[token], other[0])


def test_no_tokens() -> None:
    scores, expert, gate, load = launch.route(
        torch.zeros(0, 4, device=DEVICE), None, torch.zeros(0, dtype=torch.bool, device=DEVICE), "softmax", GatingConfig(top_k=2)
    )
    assert (scores.shape, expert.shape, gate.shape, load.tolist()) == ((0, 4), (0, 2), (0, 2), [0] * 4)


def test_every_row_of_the_reference_is_in_the_tables() -> None:
    for own, theirs in ((routing.SCORES, SCORE_FUNCTIONS), (routing.NORMALIZERS, NORMALIZERS), (routing.GROUP_SCORES, GROUP_SCORES)):
        assert set(own) >= set(theirs)
