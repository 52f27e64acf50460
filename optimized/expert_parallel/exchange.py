"""Dispatch and combine over ranks as differentiable functions: two all-to-alls forward, two backward.

    x_TD, gate_TK ─Send─▸ (travelling) ─Receive─▸ rows_QD, gate_N ─local experts─▸ partial_QD ─Combine─▸ y_TD

A rank sums over its own experts of a token and returns one row. Rows travel in the dtype of x, gates in their own; sums over ranks run in
fp32 or better, in the order of the ranks, whatever arrives first. What is computed between Send and Receive overlaps with the journey, and
in the backward pass with that of the gradients. The gradient of a gate is computed where its expert lives, and travels with that of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reference.autograd.tokens import at_least_fp32

from .plan import CODE, Incoming, Outgoing
from .transport import Transport


def _pack(parts: Sequence[tuple[Tensor, Sequence[int]]], ranks: int) -> tuple[Tensor, list[int]]:
    """(one flat byte tensor, bytes for each rank): for each rank in turn its share of every tensor, given as rows per rank."""
    pieces = [[piece.contiguous().view(torch.uint8).flatten() for piece in tensor.split(list(rows))] for tensor, rows in parts]
    by_rank = [[column[rank] for column in pieces] for rank in range(ranks)]
    return torch.cat([piece for row in by_rank for piece in row]), [sum(len(piece) for piece in row) for row in by_rank]


def _sizes(kinds: Sequence[tuple[int, Sequence[int]]], ranks: int) -> list[list[int]]:
    """[rank][tensor] bytes, for tensors given as (bytes of a row, rows per rank)."""
    return [[width * rows[rank] for width, rows in kinds] for rank in range(ranks)]


def _unpack(flat: Tensor, kinds: Sequence[tuple[torch.dtype, tuple[int, ...], Sequence[int]]], ranks: int) -> list[Tensor]:
    """The inverse of `_pack`: the tensors of (dtype, shape of a row, rows per rank)."""
    sizes = _sizes([(_row_bytes(dtype, shape), rows) for dtype, shape, rows in kinds], ranks)
    pieces = flat.split([size for row in sizes for size in row])
    # A concatenation is a copy that starts at an address which fits its dtype.
    return [torch.cat(pieces[place :: len(kinds)]).view(dtype).view(-1, *shape) for place, (dtype, shape, _) in enumerate(kinds)]


def _row_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * (shape[0] if shape else 1)


class Journey:
    """One pass through the experts of all ranks: what goes, what comes, in which dtypes, and what is under way."""

    def __init__(self, going: Outgoing, coming: Incoming, x_TD: Tensor, gate_TK: Tensor, transport: Transport, layer: int) -> None:
        self.going, self.coming, self.transport, self.layer = going, coming, transport, layer
        self.x_shape, self.x_dtype = x_TD.shape, x_TD.dtype
        self.gate_shape, self.gate_dtype = gate_TK.shape, gate_TK.dtype
        self.needs_dx = x_TD.requires_grad
        self.under_way: Callable[[], Tensor] | None = None

    def start(
        self, what: str, parts: Sequence[tuple[Tensor, Sequence[int]]], kinds: Sequence[tuple[int, Sequence[int]]]
    ) -> Callable[[], Tensor]:
        """Send tensors, of which `kinds` will come."""
        ranks = self.transport.ranks
        sent, send = _pack(parts, ranks)
        receive = [sum(row) for row in _sizes(kinds, ranks)]
        return self.transport.all_to_all(sent, send, receive, f"{what} in layer {self.layer}")

    def arrive(self, kinds: Sequence[tuple[torch.dtype, tuple[int, ...], Sequence[int]]]) -> list[Tensor]:
        """Wait for what is under way, and take it apart."""
        if self.under_way is None:
            raise RuntimeError("nothing is under way")
        flat, self.under_way = self.under_way(), None
        return _unpack(flat, kinds, self.transport.ranks)

    def sum_by_token(self, rows_QD: Tensor) -> Tensor:
        """Rows that came back for `going.token_Q` added up: [T, D] in the dtype of x. No token is twice in the block of a rank."""
        total_TD = rows_QD.new_zeros(self.x_shape, dtype=torch.promote_types(self.x_dtype, torch.float32))
        blocks = zip(self.going.token_Q.split(self.going.crossings), rows_QD.split(self.going.crossings), strict=True)
        for token, rows in blocks:
            total_TD.index_add_(0, token, at_least_fp32(rows))
        return total_TD.to(self.x_dtype)


class _Send(torch.autograd.Function):
    """Starts the journey and returns a ticket: a scalar that carries the gradient's path, and no value."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gate_TK: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        going, coming = journey.going, journey.coming
        gate_N = gate_TK[going.token_N, going.slot_N]
        parts = (x_TD[going.token_Q], going.crossings), (gate_N, going.assignments), (going.code_N, going.assignments)
        width = _row_bytes(x_TD.dtype, (x_TD.shape[1],))
        kinds = (width, coming.crossings), (gate_TK.dtype.itemsize + CODE.itemsize, coming.assignments)
        journey.under_way = journey.start("dispatch", parts, kinds)
        return x_TD.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, Tensor, None]:
        journey: Journey = ctx.journey
        going = journey.going
        kinds = [(journey.gate_dtype, (), going.assignments)]
        if journey.needs_dx:
            kinds = [(journey.x_dtype, (journey.x_shape[1],), going.crossings), *kinds]
        *dx_rows, dgate_N = journey.arrive(kinds)
        # An expert whose width is cut answers from several ranks; parts of a gradient add up.
        dgate_TK = dgate_N.new_zeros(journey.gate_shape).index_put((going.token_N, going.slot_N), dgate_N, accumulate=True)
        return journey.sum_by_token(dx_rows[0]) if dx_rows else None, dgate_TK, None


class _Receive(torch.autograd.Function):
    """Waits for what the ticket stands for: (rows [Q, D], gate [N], code [N]) of all ranks, in their order."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, journey: Journey) -> tuple[Tensor, Tensor, Tensor]:
        ctx.journey, coming = journey, journey.coming
        rows_QD, gate_N, code_N = journey.arrive(
            [
                (journey.x_dtype, (journey.x_shape[1],), coming.crossings),
                (journey.gate_dtype, (), coming.assignments),
                (CODE, (), coming.assignments),
            ]
        )
        ctx.mark_non_differentiable(*([code_N] if journey.needs_dx else [rows_QD, code_N]))
        return rows_QD, gate_N, code_N

    @staticmethod
    def backward(ctx: Any, drows_QD: Tensor, dgate_N: Tensor, _: Any) -> tuple[Tensor, None]:
        journey: Journey = ctx.journey
        going, coming = journey.going, journey.coming
        parts, kinds = [(dgate_N, coming.assignments)], [(journey.gate_dtype.itemsize, going.assignments)]
        if journey.needs_dx:
            parts = [(drows_QD, coming.crossings), *parts]
            kinds = [(_row_bytes(journey.x_dtype, (journey.x_shape[1],)), going.crossings), *kinds]
        journey.under_way = journey.start("dispatch's gradient", parts, kinds)
        return dgate_N.new_zeros(()), None


class _Combine(torch.autograd.Function):
    """Sends each partial sum back where its token came from, and adds them up there: partial [Q, D] → y [T, D]."""

    @staticmethod
    def forward(ctx: Any, partial_QD: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        width = _row_bytes(journey.x_dtype, (journey.x_shape[1],))
        journey.under_way = journey.start("combine", [(partial_QD, journey.coming.crossings)], [(width, journey.going.crossings)])
        (back_QD,) = journey.arrive([(journey.x_dtype, (journey.x_shape[1],), journey.going.crossings)])
        return journey.sum_by_token(back_QD)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None]:
        journey: Journey = ctx.journey
        width = _row_bytes(journey.x_dtype, (journey.x_shape[1],))
        parts = [(dy_TD[journey.going.token_Q], journey.going.crossings)]
        journey.under_way = journey.start("combine's gradient", parts, [(width, journey.coming.crossings)])
        (dpartial_QD,) = journey.arrive([(journey.x_dtype, (journey.x_shape[1],), journey.coming.crossings)])
        return dpartial_QD, None


def send(x_TD: Tensor, gate_TK: Tensor, journey: Journey) -> Tensor:
    """Start the journey of a pass: its ticket."""
    return _Send.apply(x_TD, gate_TK, journey)  # type: ignore[no-any-return]


def receive(ticket: Tensor, journey: Journey) -> tuple[Tensor, Tensor, Tensor]:
    """(rows [Q, D], gate [N], code [N]) that came to this rank."""
    return _Receive.apply(ticket, journey)  # type: ignore[no-any-return]


def combine(partial_QD: Tensor, journey: Journey) -> Tensor:
    """y [T, D] from the partial sums [Q, D] of all ranks."""
    return _Combine.apply(partial_QD, journey)  # type: ignore[no-any-return]
