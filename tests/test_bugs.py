"""Every piece of the bug museum is caught by its named check, and the reference is not."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from reference.proof import museum_losses
from reference.proof.bugs import MUSEUM, ROOMS, get
from reference.proof.exhibit import Bug

BUGS = pytest.mark.parametrize("bug", MUSEUM.values(), ids=list(MUSEUM))
# The standing order of the specification: these have been real, so none of them may leave the museum.
EXPECTED = {
    "loss not divided by K", "counted after the drop", "probability over the chosen only", "softmax twice", "layers pooled",
    "first choices in an aliased mask", "jitter reaches the experts", "renormalized top-1", "biased scores as gates",
    "correction bias in bfloat16", "closed groups set to 0", "best expert instead of the best two", "no eps under the sum",
    "second choices from zero", "padding eats capacity", "padding in the load", "capacity without K", "noise in evaluation",
    "dropped tokens as input", "z-loss of biased logits", "z-loss averaged over experts", "unstable ties", "bias updated per rank",
    "counted twice under recompute", "shared experts in K", "shared experts in the softmax", "idle experts keep old memory",
    "additive jitter", "bias moved in evaluation", "first choice of an unsorted top-k", "divided by the survivors",
}  # fmt: skip


def test_nothing_was_carried_out_of_the_museum():
    assert set(MUSEUM) >= EXPECTED
    assert len(MUSEUM) == sum(len(room) for room in ROOMS.values()), "two pieces share a name"
    with pytest.raises(ValueError, match="no bug 'typo'; known: loss not divided by K"):
        get("typo")


@BUGS
def test_the_right_function_passes(bug):
    bug.check(bug.right)


@BUGS
def test_the_wrong_function_is_caught(bug):
    with pytest.raises(AssertionError) as caught:
        bug.check(bug.wrong)
    assert re.search(r"\d|True|nan", str(caught.value)), "the message shows no measured value"
    assert not re.search(r"\.\d{7}", str(caught.value)), "the message shows digits that mean nothing"
    assert bug.symptom() == str(caught.value)


@BUGS
def test_a_piece_explains_itself(bug):
    assert bug.mistake.endswith(".") and inspect.getdoc(bug.check).endswith(".")
    assert re.search(r"#\d+|near: .+|\.py|\d{4}|/st-moe", bug.seen), bug.seen
    assert bug.wrong is not bug.right and get(bug.name) is bug


def test_a_check_that_catches_nothing_is_reported():
    blind = Bug("blind", "near: here 2000", museum_losses.not_divided_by_k, museum_losses.balance_loss, lambda loss: None)
    with pytest.raises(AssertionError, match="accepts the bug 'blind'"):
        blind.symptom()


@pytest.mark.parametrize("room", ROOMS)
def test_every_function_of_a_room_is_used(room):
    module = __import__(f"reference.proof.museum_{room}", fromlist=["BUGS"])
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert defined <= used, defined - used
