"""Notebook 07: how many bits an expert tells about a label."""

from __future__ import annotations

import numpy as np

from reference.specialization import mutual_information

from . import Case, Exercise, Mistake


def _first_choices(expert_TK: np.ndarray, label_T: np.ndarray) -> float:
    return mutual_information(expert_TK[:, :1], label_T)


def _in_nats(expert_TK: np.ndarray, label_T: np.ndarray) -> float:
    return mutual_information(expert_TK, label_T) * float(np.log(2))


def _joint(expert_TK: np.ndarray, label_T: np.ndarray) -> np.ndarray:
    joint_VE = np.zeros((label_T.max() + 1, expert_TK.max() + 1))
    np.add.at(joint_VE, (label_T[:, None], expert_TK), 1 / expert_TK.size)
    return joint_VE


def _entropy_of_the_pair(expert_TK: np.ndarray, label_T: np.ndarray) -> float:
    share = _joint(expert_TK, label_T)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def _empty_cells_are_nan(expert_TK: np.ndarray, label_T: np.ndarray) -> float:
    joint_VE = _joint(expert_TK, label_T)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float((joint_VE * np.log2(joint_VE / (joint_VE.sum(1, keepdims=True) * joint_VE.sum(0)))).sum())


def _every_label_alike(expert_TK: np.ndarray, label_T: np.ndarray) -> float:
    joint_VE = _joint(expert_TK, label_T)
    joint_VE = joint_VE / joint_VE.sum(1, keepdims=True) / len(joint_VE)
    independent_VE = joint_VE.sum(1, keepdims=True) * joint_VE.sum(0)
    seen_VE = joint_VE > 0
    return float((joint_VE[seen_VE] * np.log2(joint_VE[seen_VE] / independent_VE[seen_VE])).sum())


def _each_cell_once(expert_TK: np.ndarray, label_T: np.ndarray) -> float:
    label_N, expert_N = np.nonzero(_joint(expert_TK, label_T))
    return mutual_information(expert_N[:, None], label_N)


def _labels_added_up(expert_TK: np.ndarray, label_T: np.ndarray) -> float:
    joint_VE = _joint(expert_TK, label_T)
    label_V1, seen_VE = joint_VE.sum(1, keepdims=True), joint_VE > 0
    ratio_VE = joint_VE / (label_V1 * joint_VE.sum(0))
    return float(((joint_VE / label_V1)[seen_VE] * np.log2(ratio_VE[seen_VE])).sum())


def _cases() -> tuple[Case, ...]:
    rng = np.random.default_rng(7)
    label_T = np.repeat([0, 1, 2], [20, 8, 4])
    mixed_TK = np.stack([np.argsort(rng.random(5) + 0.5 * (np.arange(5) == label))[-2:] for label in label_T])
    own_TK = np.stack([2 * label_T, 2 * label_T + 1], axis=1)
    return (
        Case("experts that lean towards a label, labels of unequal number", (mixed_TK, label_T)),
        Case("every label with two experts of its own: cells that stay empty", (own_TK, label_T)),
        Case("one expert for all: it tells nothing", (np.zeros((6, 1), np.int64), np.array([0, 0, 1, 1, 2, 2]))),
    )


EXERCISE = Exercise(
    {"bits": ()}, mutual_information, _cases(),
    (
        Mistake(_in_nats, "These are nats. Bits take the logarithm to the base 2."),
        Mistake(_first_choices, "Only the first choice of each token is counted. All K choices count, once each."),
        Mistake(_each_cell_once, "Each cell is counted once, however often it occurs: `table[label, expert] += 1` adds once for each "
                "distinct index. np.add.at adds every time."),
        Mistake(_empty_cells_are_nan, "A cell that never occurs contributes nothing, but 0 · log 0 is NaN for NumPy. Sum over the others."),
        Mistake(_entropy_of_the_pair, "This is the entropy of the pair. Divide by what the share would be if expert and label were "
                "independent, p(v) · p(e), inside the logarithm."),
        Mistake(_labels_added_up, "The labels are added up with weight 1 each: in front of the logarithm stands p(v, e), not p(e | v)."),
        Mistake(_every_label_alike, "The rows were normalised first, as if all labels were equally frequent. p(v, e) is a share of all "
                "assignments."),
    ),
    chapter="docs/chapters/specialization.md#the-equation",
)  # fmt: skip
