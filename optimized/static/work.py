"""What each launch has to do and what it does: bytes and FLOPs of one layer, from its sizes, its load and the blocks.

The tests count the same numbers in Triton's interpreter, byte by byte and product by product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from reference.config import MoEConfig

from ..kernels.activations import ACTIVATIONS
from ..kernels.blocks import Blocks, power_of_2
from ..kernels.launch import ceil_div


class Work(NamedTuple):
    """Bytes and FLOPs of one launch.

    least     bytes of its inputs and outputs, each once: what any implementation of this step reads and writes
    touched   bytes of different addresses that the kernel reads and writes, tables of the schedule included
    useful    FLOPs of the products of existing rows;  executed: of the blocks that are multiplied, with their padding
    bound     what executed / useful may be: 1 + E · tile / (T·K)
    """

    least: int
    touched: int
    useful: int = 0
    executed: int = 0
    bound: float = 1.0


@dataclass(frozen=True)
class Sizes:
    """One layer's sizes: T tokens, the load of each expert, D, F, the width M of the first product, bytes of an element."""

    config: MoEConfig
    tokens: int
    load: Sequence[int]
    bytes: int
    blocks: Mapping[str, Blocks]

    @property
    def rows(self) -> int:
        """N = T·K, nothing dropped."""
        return self.tokens * self.config.gating.top_k

    @property
    def used(self) -> int:
        """Experts with a token."""
        return sum(count > 0 for count in self.load)

    @property
    def pre(self) -> int:
        """M."""
        return (1 + ACTIVATIONS[self.config.experts.activation].gated) * self.config.experts.width

    def tiles(self, height: int) -> int:
        """Σ_e ⌈rows of e / height⌉."""
        return sum(ceil_div(count, height) for count in self.load)

    def table(self, height: int, header: int) -> int:
        """Bytes of the tables that the tiles of a product look up: the header, (expert, first row) of a tile, each expert's end."""
        return 4 * header + 8 * self.tiles(height) + 4 * self.used

    def product(self, columns: int, depth: int, blocks: Blocks) -> dict[str, int | float]:
        """FLOPs of rows [N, depth] times a matrix [depth, columns] per expert."""
        executed = 2 * self.tiles(blocks.rows) * blocks.rows * _up_to(columns, blocks.columns) * _up_to(depth, blocks.depth)
        bound = 1 + len(self.load) * blocks.rows / self.rows
        return {"useful": 2 * self.rows * columns * depth, "executed": executed, "bound": bound}


def uniform_load(tokens: int, experts: int, top_k: int, seed: int = 0) -> list[int]:
    """Tokens of each expert where every token chooses `top_k` different ones at random."""
    chosen = np.random.default_rng(seed).random((tokens, experts)).argpartition(top_k - 1, axis=1)[:, :top_k]
    return np.bincount(chosen.ravel(), minlength=experts).tolist()


def _up_to(size: int, block: int) -> int:
    return ceil_div(size, block) * block


def _route(s: Sizes) -> Work:
    experts, height = s.config.experts.count, s.blocks["route"].rows
    least = 8 * s.tokens * experts + 12 * s.rows + 4 * experts * s.config.gating.correction_bias
    return Work(least, least + s.tokens + ceil_div(s.tokens, height) * power_of_2(experts, 16))


def _up(s: Sizes) -> Work:
    width, bias = s.config.d_model, s.config.experts.bias
    least = s.bytes * (s.tokens * width + s.used * s.pre * (width + bias) + s.rows * (s.pre + s.config.experts.width))
    blocks = s.blocks["up"]
    halves = s.pre // s.config.experts.width
    flops = s.product(s.config.experts.width, s.config.d_model, blocks)
    flops |= {"useful": halves * flops["useful"], "executed": halves * flops["executed"]}
    return Work(least, least + s.table(blocks.rows, 2) + 4 * s.rows, **flops)  # type: ignore[arg-type]


def _down(s: Sizes) -> Work:
    width, inner = s.config.d_model, s.config.experts.width
    least = s.bytes * (s.rows * inner + s.used * width * (inner + s.config.experts.bias) + s.rows * width)
    blocks = s.blocks["product"]
    return Work(least, least + s.table(blocks.rows, 1), **s.product(width, inner, blocks))  # type: ignore[arg-type]


def _combine(s: Sizes) -> Work:
    least = s.bytes * (s.rows + s.tokens) * s.config.d_model + 4 * s.rows
    return Work(least, least + 4 * s.rows + 4)


def _parts(s: Sizes) -> int:
    return ceil_div(s.config.experts.width, s.blocks["activation"].columns)


def _activation(s: Sizes) -> Work:
    width, inner = s.config.d_model, s.config.experts.width
    weights = s.used * width * (inner + s.config.experts.bias)
    least = s.bytes * (s.tokens * width + weights + s.rows * (2 * s.pre + inner)) + 8 * s.rows
    blocks = s.blocks["activation"]
    tables = s.table(blocks.rows, 1) + 4 * s.rows + 4 * s.rows * (_parts(s) - 1)
    return Work(least, least + tables, **s.product(inner, width, blocks))  # type: ignore[arg-type]


def _weights(s: Sizes, outer: int, inner: int, *, left: int, right: int, gates: bool) -> Work:
    """left, right: rows of the two operands that exist; the others are read again."""
    blocks, experts = s.blocks["weight"], len(s.load)
    least = s.bytes * (left * outer + right * inner + experts * outer * (inner + s.config.experts.bias)) + 4 * s.rows * gates
    executed = 2 * s.tiles(blocks.depth) * blocks.depth * _up_to(outer, blocks.rows) * _up_to(inner, blocks.columns)
    return Work(least, least + 4 * (experts + 1) + 4 * s.rows, 2 * s.rows * outer * inner, executed, 1 + experts * blocks.depth / s.rows)


def _up_gradient(s: Sizes) -> Work:
    return _weights(s, s.pre, s.config.d_model, left=s.rows, right=s.tokens, gates=False)


def _down_gradient(s: Sizes) -> Work:
    return _weights(s, s.config.d_model, s.config.experts.width, left=s.tokens, right=s.rows, gates=s.config.experts.bias)


def _rows_gradient(s: Sizes) -> Work:
    width = s.config.d_model
    least = s.bytes * (s.rows * s.pre + s.used * s.pre * width + s.rows * width)
    blocks = s.blocks["product"]
    return Work(least, least + s.table(blocks.rows, 1), **s.product(width, s.pre, blocks))  # type: ignore[arg-type]


def _input_gradient(s: Sizes) -> Work:
    least = s.bytes * (s.rows + s.tokens) * s.config.d_model + 8 * s.rows
    return Work(least, least + 4 * s.rows + 4 + 4 * s.rows * (_parts(s) - 1))


def _router_gradient(s: Sizes) -> Work:
    least = 12 * s.tokens * s.config.experts.count + 12 * s.rows
    return Work(least, least)


WORK: dict[str, Callable[[Sizes], Work]] = {
    "route": _route, "up": _up, "down": _down, "combine": _combine, "activation's gradient": _activation,
    "up's gradient": _up_gradient, "down's gradient": _down_gradient, "rows' gradient": _rows_gradient,
    "input's gradient": _input_gradient, "router's gradient": _router_gradient,
}  # fmt: skip


def work(sizes: Sizes) -> dict[str, Work]:
    """The work of every launch but the sort's, by its role in `capture.ROLES`."""
    return {role: count(sizes) for role, count in WORK.items()}
