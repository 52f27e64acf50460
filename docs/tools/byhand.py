"""One word's way through the layer of the running example, every number of it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from layout import digits, markdown

from reference import example, moe_forward
from reference.capacity import choice_major, expert_capacity, position_in_expert
from reference.tokens import Draws, token_info

NBSP = "\u00a0"
"""A space at which no line ends: a row of numbers stays on one, and a step with its number."""


def vector(values: Iterable[float], places: int = 1) -> str:
    """A row of numbers in parentheses."""
    return f"({f',{NBSP}'.join(digits(value, places) for value in values)})"


def rows(matrix: Iterable[Iterable[float]]) -> str:
    """A matrix of whole numbers, row by row."""
    return "rows " + " ".join(vector(row, 0) for row in matrix)


def layer(token: int = 2) -> str:
    """The table: a row for each step of the figure; of the experts those that the word reached."""
    output, _ = moe_forward(example.inputs(), example.params(), example.CONFIG, training=True)
    routing, params, x_D = output.routing, example.params(), example.inputs()[token]
    chosen, kept = routing.expert[token], routing.keep[token]
    names, score_K = [example.EXPERTS[e] for e in chosen], routing.scores[token, chosen]

    tokens = len(routing.expert)
    places = expert_capacity(example.CONFIG, token_info(tokens), training=True)[0]
    queue_N = choice_major(routing.expert, Draws(None))
    place_TK = position_in_expert(routing.expert, np.ones_like(routing.keep), np.zeros(tokens, np.int64), queue_N)
    asked = [
        f"{name}: place {place + 1}, {'kept' if keep else 'dropped'}"
        for name, place, keep in zip(names, place_TK[token], kept, strict=True)
    ]

    answers = []
    for e in chosen[kept]:
        up, down = (params[f"experts.{half}_proj"][e] for half in ("up", "down"))
        hidden_F = np.maximum(up @ x_D, 0)
        answers.append(
            f"{example.EXPERTS[e]}: W~up~ has the {rows(up)}, hidden units {vector(up @ x_D)}, of which what is negative becomes 0: "
            f"{vector(hidden_F)}; W~down~ has the {rows(down)}, so out = {vector(down @ hidden_F)}"
        )
    told = {
        "1 the word": f"x = {vector(x_D)}",
        "2 logits": f"W has the {rows(params['router.weight'])}; x W^T^ = {vector(routing.logits[token])}",
        "3 scores": f"softmax: {vector(routing.scores[token], 3)}",
        "4 choice and gates": "; ".join(
            f"{name} {digits(s)} / {digits(score_K.sum())} = {digits(s / score_K.sum())}" for name, s in zip(names, score_K, strict=True)
        ),
        "5 places": f"{places} at each expert. " + "; ".join(asked),
        "6 experts": "; ".join(answers),
        "7 output": f"y = {vector(output.y[token], 3)}",
    }
    steps = [(step.replace(" ", NBSP, 1), text) for step, text in told.items()]
    return markdown(["step", f"“{example.WORDS[token]}”, among the eight words"], steps, numbers=False)
