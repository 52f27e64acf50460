"""The two comparisons that every fast track must pass: the experts for a given routing, and the whole layer.

The caller converts its own tensors: it runs its track and plain PyTorch on `inputs.rounded(…)`, and hands over NumPy arrays under the
names that `experts_truth` and `layer_truth` use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..layer import apply_experts_backward, apply_experts_forward, moe_backward, moe_forward
from .cases import Inputs
from .equal import Outputs, Report, assert_equal
from .teeth import assert_teeth, layer_mutations, tensor_mutations


def experts_truth(
    inputs: Inputs, params: Mapping[str, NDArray] | None = None, gate_TK: NDArray | None = None
) -> dict[str, NDArray[np.float64]]:
    """The second seam in float64, forward and backward: "y", "dx", "dgate", and the gradient of each expert parameter by its name.

    params, gate_TK: other ones than the inputs' (for mutations).
    """
    routing = inputs.routing if gate_TK is None else dataclasses.replace(inputs.routing, gate=gate_TK)
    y_TD, cache = apply_experts_forward(inputs.x, routing, dict(inputs.params if params is None else params), inputs.config)
    dx_TD, dgate_TK, dparams = apply_experts_backward(inputs.dy, cache)
    return {"y": y_TD, "dx": dx_TD, "dgate": dgate_TK, **dparams}


def assert_experts_equal(inputs: Inputs, candidate: Outputs, eager: Outputs, dtype: str) -> list[Report]:
    """`apply_experts` of a fast track equals the reference, output and all gradients, and the assertion has teeth on this case.

    candidate, eager: the tensors of `experts_truth`, computed in `dtype`. Returns the reports; raises AssertionError.
    """
    truth = experts_truth(inputs)

    def assertion(outputs: Outputs) -> list[Report]:
        return assert_equal(outputs, truth, eager, dtype)

    def evaluate(params: Mapping[str, NDArray], gate_TK: NDArray) -> Outputs:
        return experts_truth(inputs, params, gate_TK)

    layers = layer_mutations(evaluate, inputs.params, inputs.routing.expert, inputs.routing.gate)
    assert_teeth(assertion, truth, chain(tensor_mutations(truth, dtype), layers), least=3 if len(inputs.x) else 0)
    return assertion(candidate)


def layer_truth(inputs: Inputs, **arguments: Any) -> dict[str, NDArray[np.float64]]:
    """The whole layer in float64, routing by its own router: "y", "dx", "loss" and every parameter's gradient by name.

    arguments: those of `moe_forward` (training, rng, group_ids, replay); padding is the inputs'. The cotangent of the loss is 1.
    """
    output, cache = moe_forward(inputs.x, inputs.params, inputs.config, pad_mask=inputs.pad_mask, **arguments)
    dx_TD, dparams = moe_backward(inputs.dy, cache)
    return {"y": output.y, "dx": dx_TD, "loss": np.asarray(output.loss), **dparams}


def cancellation_scales(inputs: Inputs, **arguments: Any) -> dict[str, NDArray[np.float64]]:
    """Substitute scales for `layer_truth`: the router's gradients with plain gates, where K = 1 and normalized gates cancel.

    With K = 1 a gate divided by its sum is constantly 1, so the task gives such a router no gradient beyond rounding.
    """
    gating = inputs.config.gating
    if gating.top_k > 1 or gating.normalize == "none":
        return {}
    plain = dataclasses.replace(inputs.config, gating=dataclasses.replace(gating, normalize="none"))
    gradients = layer_truth(dataclasses.replace(inputs, config=plain), **arguments)
    return {name: gradients[name] for name in gradients if name.startswith("router.")}
