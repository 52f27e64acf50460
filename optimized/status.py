"""The status table: for every preset, how far its recipe, its autograd layer and its transformers block are from the NumPy layer.

All of it is float64 on the preset's tiny layer, so that an error is a mistake or a rounding in the last digits. Errors are relative to
the truth's RMS, stacked weights expert by expert, and the worst of all tensors and seeds; a choice that differs is an infinite error.
`write` keeps the numbers in `docs/results/status.json` and prints `docs/status.md` from them.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reference import chained_backward, cost, init_params, moe_backward, moe_forward, presets
from reference.architectures import RECIPES
from reference.architectures import run as run_recipe
from reference.config import MoEConfig
from reference.layer import BUFFERS
from reference.proof.equal import STACKED_PREFIX, Report, compare

from . import oracles

SEEDS = (0, 1, 2)
BOUNDS = {"recipe": 1e-12, "autograd": 1e-11, "transformers": 1e-11}
PACKAGES = ("numpy", "torch", "transformers")


class Errors(NamedTuple):
    """The largest RMS error and the largest error of an element over some tensors, relative to each truth's RMS."""

    rms: float
    max: float


class Pass(NamedTuple):
    """Inputs of one pass: x and the cotangent dy [T, D], parameters, each token's group and id, which tokens are padding, and the logits
    of a layer before, where the router reads them."""

    x_TD: np.ndarray
    dy_TD: np.ndarray
    params: dict[str, np.ndarray]
    group_T: np.ndarray
    pad_T: np.ndarray
    id_T: np.ndarray
    previous_TE: np.ndarray | None = None

    def facts(self) -> dict[str, np.ndarray]:
        """What `moe_forward` is told about the tokens."""
        known = {"group_ids": self.group_T, "pad_mask": self.pad_T, "token_ids": self.id_T}
        return known if self.previous_TE is None else {**known, "previous_logits": self.previous_TE}


def random_bias(config: MoEConfig, rng: np.random.Generator) -> np.ndarray:
    """A correction bias that changes choices, mostly negative, in its fp32: [E]."""
    return (rng.normal(0, 0.3, config.experts.count) - 0.5).astype(np.float32)


def draw(config: MoEConfig, seed: int, *, tokens: int = 60, groups: int = 3, padded: float = 0.15) -> Pass:
    """Random inputs for a layer: `groups` interleaved groups, a share of padding, and nothing that starts at 0 left there."""
    rng = np.random.default_rng(seed)
    x_TD, dy_TD = rng.standard_normal((2, tokens, config.d_model))
    params = init_params(config, rng)
    for name in params:
        if name.endswith(("bias", "noise_weight", "residual_weight", "scale")):
            params[name] = random_bias(config, rng) if name in BUFFERS else params[name] + rng.normal(0, 0.3, params[name].shape)
    group_T, pad_T = rng.integers(0, groups, tokens), rng.random(tokens) < padded
    id_T = rng.integers(0, max(config.gating.vocabulary, 1), tokens)
    previous_TE = rng.standard_normal((tokens, config.experts.count)) if config.scores.residual else None
    return Pass(x_TD, dy_TD, params, group_T, pad_T, id_T, previous_TE)


class _Recorded:
    """Stands where a NumPy generator stands and hands out numbers that another track has drawn, in the order of drawing."""

    def __init__(self, draws: Iterable[np.ndarray]) -> None:
        self.remaining = list(draws)

    def random(self, shape: tuple[int, ...]) -> np.ndarray:
        numbers = self.remaining.pop(0)
        assert numbers.shape == shape, f"the track drew numbers of shape {numbers.shape} where the reference draws {shape}"
        return numbers


def _errors(reports: Iterable[Report]) -> Errors:
    reports = list(reports)
    return Errors(max(report.rms_error for report in reports), max(report.max_error for report in reports))


def _measure(candidate: Mapping[str, Any], truth: Mapping[str, Any]) -> Errors:
    # The truth is its own yardstick here: only the errors are read, and judged by BOUNDS.
    assert candidate.keys() == truth.keys(), f"compared {sorted(candidate)} with {sorted(truth)}"
    return _errors(compare(key, candidate[key], truth[key], truth[key], "float64", stacked=key.startswith(STACKED_PREFIX)) for key in truth)


def recipe_errors(name: str, config: MoEConfig, inputs: Pass) -> Errors:
    """The recipe of preset `name` against the layer in training, under the layer's own noise: y and every loss."""
    given: dict[str, Any] = inputs.facts()
    output, _ = moe_forward(inputs.x_TD, inputs.params, config, training=True, rng=np.random.default_rng(0), **given)
    y_TD, losses = run_recipe(name, inputs.x_TD, inputs.params, config, draws=output.routing.draws, **given)
    return _measure({"y": y_TD, **losses}, {"y": output.y, **output.losses})


def autograd_errors(config: MoEConfig, inputs: Pass, *, training: bool = True) -> tuple[Errors, Errors]:
    """(forward, gradient) of `reference.autograd.MoE` against the layer and its hand-derived backward.

    Forward: y, the losses, and the routing, whose choices must be equal; gradients of ⟨y, dy⟩ + loss. The reference gets the random
    numbers that torch drew, and decides by itself.
    """
    import torch

    from reference.autograd import MoE, params_from_numpy, routing_to_numpy

    moe = MoE(config, dtype=torch.float64).train(training)
    moe.load_state_dict(params_from_numpy(inputs.params))
    x = torch.tensor(inputs.x_TD, requires_grad=True)
    given = {name: torch.tensor(array, requires_grad=array.dtype.kind == "f") for name, array in inputs.facts().items()}
    y, aux = moe(x, **given)
    (y.mul(torch.tensor(inputs.dy_TD)).sum() + aux.loss).backward()
    routing = routing_to_numpy(aux.routing)

    output, cache = moe_forward(
        inputs.x_TD, inputs.params, config, training=training,
        rng=_Recorded(routing.draws.values()), **inputs.facts(),  # type: ignore[arg-type]
    )  # fmt: skip
    dx_TD, dprevious_TE, dparams = chained_backward(inputs.dy_TD, cache)
    fields = ("expert", "gate", "keep", "load", "importance", "logits", "scores")
    forward = _measure(
        {
            "y": y.detach().numpy(),
            **{key: loss.item() for key, loss in aux.losses.items()},
            **{key: getattr(routing, key) for key in fields},
        },
        {"y": output.y, **output.losses, **{key: getattr(output.routing, key) for key in fields}},
    )
    gradients = {key: np.zeros(weight.shape) if weight.grad is None else weight.grad.numpy() for key, weight in moe.named_parameters()}
    read = {"dx": (x, dx_TD)} | ({} if dprevious_TE is None else {"dprevious": (given["previous_logits"], dprevious_TE)})
    gradients |= {key: tensor.grad.numpy() for key, (tensor, _) in read.items() if tensor.grad is not None}
    return forward, _measure(gradients, {key: truth for key, (_, truth) in read.items()} | dparams)


def transformers_errors(
    name: str, config: MoEConfig, seed: int, *, sequences: int = 3, length: int = 20, native_router: bool = False
) -> tuple[Errors, Errors]:
    """(forward, gradient) of the layer in evaluation against the block of transformers, each of whose sequences is a group.

    Choices are compared by what they lead to: transformers leaves the order of a token's experts open.
    Raises: as `oracles.build` does.
    """
    rng = np.random.default_rng(seed)
    x_BSD, dy_BSD = rng.standard_normal((2, sequences, length, config.d_model))
    bias = random_bias(config, rng) if config.gating.correction_bias else None
    block = oracles.run(name, config, x_BSD, dy_BSD, seed=seed, correction_bias=bias, native_router=native_router)
    x_TD, dy_TD = (array.reshape(-1, config.d_model) for array in (x_BSD, dy_BSD))
    output, cache = moe_forward(x_TD, block.params, config, group_ids=np.repeat(np.arange(sequences), length))
    dx_TD, dparams = moe_backward(dy_TD, cache)
    return _measure({"y": block.y}, {"y": output.y}), _measure(block.gradients, {"dx": dx_TD, **dparams})


def _worst(errors: Iterable[Errors]) -> dict[str, float]:
    rms, largest = zip(*errors, strict=True)
    return {"rms": max(rms), "max": max(largest)}


def row(name: str) -> dict[str, Any]:
    """One preset: its errors on SEEDS in each comparison (None where transformers has no block), and its published size in parameters."""
    config, parameters = presets.tiny(name), cost.sum_parameters(cost.model_parameters(presets.model(name)))
    drawn = [draw(config, seed) for seed in SEEDS]
    recipe = [recipe_errors(name, config, inputs) for inputs in drawn]
    autograd = [autograd_errors(config, inputs, training=training) for inputs in drawn for training in (True, False)]
    blocks = [transformers_errors(name, config, seed) for seed in SEEDS] if name in oracles.ORACLES else []
    return {
        "preset": name,
        "parameters": parameters._asdict(),
        "recipe": {"forward": _worst(recipe)},
        "autograd": {"forward": _worst(f for f, _ in autograd), "gradient": _worst(g for _, g in autograd)},
        "transformers": {"forward": _worst(f for f, _ in blocks), "gradient": _worst(g for _, g in blocks)} if blocks else None,
    }


def measure(progress: Callable[[str], None] = lambda name: None) -> dict[str, Any]:
    """Every preset's row, the bounds, and what it was measured with; `progress` hears each preset's name before its turn.

    Raises ModuleNotFoundError that names the extra where transformers is missing.
    """
    rows = []
    for name in presets.names():
        progress(name)
        rows.append(row(name))
    versions = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    return {"bounds": BOUNDS, "seeds": list(SEEDS), "versions": versions, "rows": rows}


def broken(results: Mapping[str, Any]) -> list[str]:
    """The comparisons that exceed their bound, in words; an empty list is what the exit code 0 stands for."""
    found = []
    for entry in results["rows"]:
        for track, bound in results["bounds"].items():
            for direction, errors in (entry[track] or {}).items():
                # `not ≤` also finds a NaN.
                if not errors["max"] <= bound:
                    found.append(f"{entry['preset']}: layer and {track} differ in {direction} by {errors['max']:.1e}, bound {bound:.0e}")
    return found


def _cell(entry: Mapping[str, Any], track: str, *directions: str) -> str:
    """The largest error of each direction, or a dash."""
    found = entry[track]
    return " / ".join(f"{found[direction]['max']:.0e}" if found[direction]["max"] else "0" for direction in directions) if found else "—"


def _billions(count: int) -> str:
    return f"{count / 1e9:,.1f}" if count >= 1e8 else f"{count / 1e9:.1g}"


def _power(bound: float) -> str:
    """A power of ten, written so that no line ends inside it."""
    return "10" + str(round(math.log10(bound))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _preset(entry: Mapping[str, Any]) -> str:
    """The name as a link to the page of its recipe."""
    page = RECIPES[entry["preset"]].__module__.rpartition(".")[2]
    return f"[`{entry['preset']}`](architectures/{page}.md)"


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "Preset": _preset,
    "Recipe": lambda entry: _cell(entry, "recipe", "forward"),
    "Autograd": lambda entry: _cell(entry, "autograd", "forward", "gradient"),
    "transformers": lambda entry: _cell(entry, "transformers", "forward", "gradient"),
    "Total,\N{NO-BREAK SPACE}10⁹": lambda entry: _billions(entry["parameters"]["total"]),
    "Active,\N{NO-BREAK SPACE}10⁹": lambda entry: _billions(entry["parameters"]["active"]),
}

PAGE = """# Status

{presets} models, {oracles} of them compared with `transformers` too: the largest error of all is {worst}, {verdict}.

What is compared is one layer of each model of `reference/presets.py`, at *tiny* size: the router as published, few and narrow experts, and
random weights; no published weights are loaded. The table says how far each independent writing of that layer is from the NumPy layer that
`MoEConfig` drives: the straight-line recipe of its paper, PyTorch with gradients by autograd, and the block of `transformers`, Hugging
Face's library of models, which others wrote. A cell is the largest error, relative to the RMS of the truth, in float64, the
worst of all tensors and of {seeds} seeds; where there are two, forward and then gradients. A dash: there is nothing to compare with.
`results/status.json` has the RMS errors, too.

{{{{ plot status }}}}

A point is a preset; an error of exactly 0 lies at the left edge. The line ends each row at the bound that `make status` holds it to.

{table}

- Bounds on the largest error: {bounds}. A choice, a drop or a load that differs counts as an infinite error: all of this
  is float64, and where rounding is coarser [flips are counted](chapters/equal.md#routing-apart-from-arithmetic).
- Correction biases are random and mostly negative.
- Recipe and autograd are compared in training, with padding, several groups and the same random numbers; autograd in evaluation too.
  The first number of autograd covers the output, the losses and the routing.
- `transformers` is compared in evaluation, on random weights of its own. Its blocks cast the router to float32; for this table the
  cast is to float64. DeepSeekMoE has no block there and is compared with DeepSeek-V2's without its device limit.
- Parameters are those of the whole model at its published size, counted by `reference/cost.py` with embedding and head; the tests
  compare them with the published totals.

Measured with {versions}; `make status` writes this page and `results/status.json` again.
"""


def _worst_of_all(rows: Sequence[Mapping[str, Any]]) -> str:
    """The largest error of any comparison, and whose it is."""
    errors = ((cell["max"], track, entry["preset"]) for entry in rows for track in BOUNDS for cell in (entry[track] or {}).values())
    worst, track, preset = max(errors)
    return f"{worst:.0e} ({track}, `{preset}`)"


def render(results: Mapping[str, Any]) -> str:
    """`results` as the Markdown of docs/status.md."""
    rows, over = results["rows"], broken(results)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    lines += ["| " + " | ".join(cell(entry) for cell in COLUMNS.values()) + " |" for entry in results["rows"]]
    return PAGE.format(
        table="\n".join(lines),
        presets=len(rows),
        oracles=sum(entry["transformers"] is not None for entry in rows),
        worst=_worst_of_all(rows),
        verdict=f"and {len(over)} comparisons exceed their bound" if over else "and no comparison exceeds its bound",
        seeds=len(results["seeds"]),
        bounds=", ".join(f"{track} {_power(bound)}" for track, bound in results["bounds"].items()),
        versions=", ".join(f"{package} {number}" for package, number in results["versions"].items()),
    )


def write(results: Mapping[str, Any], docs: Path) -> tuple[Path, Path]:
    """Write `docs`/status.md and `docs`/results/status.json; returns both paths."""
    page, numbers = docs / "status.md", docs / "results" / "status.json"
    numbers.parent.mkdir(parents=True, exist_ok=True)
    numbers.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page.write_text(render(results), encoding="utf-8")
    return page, numbers
