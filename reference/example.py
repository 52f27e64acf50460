"""The running example: eight words, four experts, two of them for each word, and numbers that a pencil can follow.

Documentation, tests, figures and notebooks all use this layer. Its logits have one decimal, one expert is asked for more than it
may take, and so exactly one assignment is dropped:

>>> from reference import moe_forward
>>> output, _ = moe_forward(inputs(), params(), CONFIG, training=True)
>>> output.routing.logits[2].round(1).tolist()                 # "sat" fits the action expert best, the grammar expert next
[1.0, -1.0, 1.6, 0.3]
>>> output.routing.expert[2].tolist()
[2, 0]
>>> output.routing.load.tolist()                               # capacity is ⌈1 · 2 · 8 / 4⌉ = 4: the grammar expert must refuse one
[5, 4, 4, 3]
>>> [(WORDS[token], EXPERTS[output.routing.expert[token, slot]]) for token, slot in np.argwhere(~output.routing.keep)]
[('sat', 'grammar')]

First choices are served before second ones, so "sat" loses its second expert. Served by position instead, a later word loses its first:

>>> from dataclasses import replace
>>> by_position = replace(CONFIG, capacity=replace(CONFIG.capacity, order="token_major"))
>>> routing = moe_forward(inputs(), params(), by_position, training=True)[0].routing
>>> [(WORDS[token], EXPERTS[routing.expert[token, slot]]) for token, slot in np.argwhere(~routing.keep)]
[('and', 'grammar')]

The gates of "cat" are a softmax over its two chosen logits, 1.8 and 0.4:

>>> output.routing.gate[1].round(4).tolist(), round(1 / (1 + np.exp(0.4 - 1.8)), 4).item()
([0.8022, 0.1978], 0.8022)

The first word's experts write 0.9 to "grammar", and 0.4 to "thing" with 1.0 to "action" (see `params`); the gates weigh them:

>>> gate = output.routing.gate[0]
>>> np.allclose(output.y[0], gate[0] * np.array([0.9, 0, 0, 0]) + gate[1] * np.array([0, 0.4, 1.0, 0]))
True
"""

from __future__ import annotations

import numpy as np

from .config import BalanceConfig, CapacityConfig, ExpertsConfig, GatingConfig, MoEConfig

WORDS = ("the", "cat", "sat", "on", "the", "mat", "and", "purred")
"""T = 8 tokens; "the" occurs twice, with the same vector."""

VOCABULARY = ("the", "cat", "sat", "on", "mat", "and", "purred")
"""Token id → word."""

EXPERTS = ("grammar", "thing", "action", "place")
"""What each of the E = 4 experts is asked for. The D = 4 numbers of a word say how much of each it is, in the same order."""

CONFIG = MoEConfig(
    d_model=4,
    gating=GatingConfig(top_k=2, normalize="sum"),
    capacity=CapacityConfig("per_assignment", factor=1.0),
    experts=ExpertsConfig(count=4, width=2, activation="relu"),
    balance=BalanceConfig((("first_choice_balance", 0.01), ("router_z", 0.001))),
)
"""GShard's layer without its noise: softmax, top-2, gates that sum to 1, capacity factor 1, first choices first."""


def token_ids() -> np.ndarray:
    """The id of each word in VOCABULARY, [T] int64.

    >>> token_ids().tolist()
    [0, 1, 2, 3, 0, 4, 5, 6]
    """
    return np.array([VOCABULARY.index(word) for word in WORDS])


def inputs() -> np.ndarray:
    """The words' vectors, [T, D] fp64: how much grammar, thing, action and place is in each. A new array at each call."""
    return np.array([
        [0.9, 0.4, 0.0, 0.1],
        [0.1, 1.0, 0.2, 0.0],
        [0.5, 0.0, 1.0, 0.4],
        [0.8, 0.0, 0.1, 0.9],
        [0.9, 0.4, 0.0, 0.1],
        [0.0, 0.9, 0.0, 0.6],
        [1.0, 0.0, 0.4, 0.2],
        [0.0, 0.1, 0.9, 0.5],
    ])  # fmt: skip


def params() -> dict[str, np.ndarray]:
    """The layer's parameters by name, fp64, small integers throughout. New arrays at each call.

    The router asks for expert e with twice feature e less the next one. The expert's first hidden unit reads feature e and writes it to
    its place; the second reads by how much feature e − 1 exceeds it, and writes that e + 1 times to the next place.

    >>> params()["router.weight"].astype(int).tolist()
    [[2, -1, 0, 0], [0, 2, -1, 0], [0, 0, 2, -1], [-1, 0, 0, 2]]
    >>> params()["experts.up_proj"][1].astype(int).tolist(), params()["experts.down_proj"][1].astype(int).tolist()
    ([[0, 1, 0, 0], [1, -1, 0, 0]], [[0, 0], [1, 0], [0, 2], [0, 0]])
    """
    own = np.eye(4)
    before, following = np.roll(own, -1, axis=1), np.roll(own, 1, axis=1)
    times = np.arange(1.0, 5.0)[:, None]
    return {
        "router.weight": 2 * own - following,
        "experts.up_proj": np.stack([own, before - own], axis=1),
        "experts.down_proj": np.stack([own, times * following], axis=2),
    }
