"""The yardstick that does not depend on luck: plain PyTorch in the target dtype, with the model width summed in several orders.

The error of one run is one draw. Where a gradient hangs on a few rounded numbers (a token alone with an expert), that draw is now and
then almost 0, and twice almost 0 refuses a correct track whose own draw is an ordinary one. Renumbering the D axis leaves the function as
it is and only changes the order of its sums, so the largest error over some numberings is what plain PyTorch can be expected to make.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from reference import Routing
from reference.proof.cases import Inputs
from reference.proof.equal import Outputs

from .tracks import TRACKS, YARDSTICK, Conditions

ORDERS = 8

# Which axis of each parameter is the model width D; every leaf has to be named, because one left out would be an error and not an order.
D_AXIS: Mapping[str, int | None] = {
    "weight": -1, "bias": None, "correction_bias": None, "gate_up_proj": -1, "up_proj": -1, "down_proj": -2,
    "gate_up_proj_bias": None, "up_proj_bias": None, "down_proj_bias": -1, "gate": -1, "gate_bias": None,
    "noise_weight": -1, "residual_weight": None, "expert_scale": None, "scale": None, "hash_table": None, "penalty": None,
    "constant": -1, "constant_gate": -1,
}  # fmt: skip

VALUES: Mapping[str, int | None] = {
    "y": -1, "dx": -1, "dgate": None, "loss": None, "logits": None, "scores": None, "gate": None,
}  # fmt: skip


def _renumbered(array: NDArray, name: str, order_D: NDArray[np.int64]) -> NDArray:
    axis = D_AXIS[name.rpartition(".")[2]] if "." in name else VALUES[name]
    return array if axis is None else np.take(array, order_D, axis)


def _routing(routing: Routing, order_D: NDArray[np.int64]) -> Routing:
    draws = {name: drawn[:, order_D] if name == "jitter" else drawn for name, drawn in routing.draws.items()}
    return dataclasses.replace(routing, draws=draws)


def farthest(
    run: Callable[[Inputs, NDArray[np.int64]], Outputs], inputs: Inputs, truth: Outputs, orders: int = ORDERS
) -> dict[str, NDArray]:
    """Of each element, the value farthest from the truth over several numberings of D: the given one, then random ones, always the same.

    run(turned, order_D) computes the outputs of inputs whose x, dy and parameters are renumbered by order_D.
    """
    rng, width = np.random.default_rng(0), inputs.config.d_model
    worst: dict[str, NDArray] = {}
    for order_D in (np.arange(width), *(rng.permutation(width) for _ in range(orders - 1))):
        params = {name: _renumbered(array, name, order_D) for name, array in inputs.params.items()}
        turned = dataclasses.replace(inputs, x=inputs.x[:, order_D], dy=inputs.dy[:, order_D], params=params)
        for name, array in run(turned, order_D).items():
            back = _renumbered(array, name, np.argsort(order_D))
            value = worst.get(name, truth[name])
            worst[name] = np.where(np.abs(back - truth[name]) >= np.abs(value - truth[name]), back, value)
    return worst


def eager_outputs(inputs: Inputs, truth: Outputs, dtype: str, conditions: Conditions, *, orders: int = ORDERS) -> dict[str, NDArray]:
    """`eager` of the whole layer for `reference.proof.equal.compare`."""

    def run(turned: Inputs, order_D: NDArray[np.int64]) -> Outputs:
        replay = None if conditions.replay is None else _routing(conditions.replay, order_D)
        return TRACKS[YARDSTICK].run(turned, dtype, conditions._replace(replay=replay)).outputs

    return farthest(run, inputs, truth, orders)
