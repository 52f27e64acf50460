"""The tracks: every implementation of the layer that exists here, behind one function, so that a table can run all of them.

A track is a row of `TRACKS`. What is added later registers itself; nothing that loops over the tracks is edited.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from reference import MoEConfig, Routing, moe_backward, moe_forward
from reference.autograd import MoE, params_from_numpy, routing_to_numpy
from reference.config import require
from reference.proof.cases import Inputs

from . import backends
from .layer import MoE as FastMoE

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
TRUTH, YARDSTICK = "reference", "reference.autograd"


class Conditions(NamedTuple):
    """How a pass is run, beside its inputs: arguments of `moe_forward` and of `MoE`; `rng` draws where no replay holds the draws."""

    training: bool = False
    group_ids: NDArray[np.int64] | None = None
    replay: Routing | None = None
    token_ids: NDArray[np.int64] | None = None


class Outcome(NamedTuple):
    """outputs: "y", "dx", "loss" and every parameter's gradient by name, as `reference.proof.parity.layer_truth`; the routing as arrays."""

    outputs: dict[str, NDArray]
    routing: Routing


Step = Callable[[], Callable[[], Outcome]]


def _can_run(config: MoEConfig, dtype: str) -> None:
    return None


@dataclass(frozen=True)
class Track:
    """One implementation of the layer.

    name         what tables call it
    prepare      (inputs, dtype, conditions) → step. `step()` is one forward and backward pass and nothing else, which can be timed; it
                 returns a function that reads the outcome as NumPy arrays
    unavailable  (config, dtype) → why it cannot run this layer here, or None
    dtypes       in which it computes
    moe_class    the layer as a module, (config, device=, dtype=) → module, where it is one that a language model can be built from
    timed        False where other processes do the work, whose time this one's clock does not see
    """

    name: str
    prepare: Callable[[Inputs, str, Conditions], Step]
    unavailable: Callable[[MoEConfig, str], str | None] = _can_run
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    moe_class: Callable[..., nn.Module] | None = None
    timed: bool = True

    def run(self, inputs: Inputs, dtype: str, conditions: Conditions = Conditions()) -> Outcome:  # noqa: B008 (a NamedTuple is immutable)
        """The outcome of one pass. Raises ValueError for a dtype in which the track does not compute."""
        require(dtype in self.dtypes, f"dtype is {dtype!r}; the track {self.name} computes in {', '.join(self.dtypes)}")
        return self.prepare(inputs, dtype, conditions)()()

    def module(self) -> Callable[..., nn.Module]:
        """Its `moe_class`. Raises ValueError where it has none."""
        require(self.moe_class is not None, f"the track {self.name} is no module that a model can be built from")
        return self.moe_class  # type: ignore[return-value]

    def reason_against(self, config: MoEConfig, dtype: str) -> str | None:
        """Why the track cannot do this layer in this dtype here, or None."""
        if dtype not in self.dtypes:
            return f"computes in {', '.join(self.dtypes)}"
        return self.unavailable(config, dtype)


TRACKS: dict[str, Track] = {}


def register(track: Track) -> Track:
    """Add a track. Raises ValueError where the name is taken."""
    require(track.name not in TRACKS, f"a track is already called {track.name!r}")
    TRACKS[track.name] = track
    return track


def select(names: str | None) -> list[Track]:
    """The tracks of a comma-separated list (None: all). Raises ValueError for an unknown name."""
    if names is None:
        return list(TRACKS.values())
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    require(bool(chosen), f"tracks is {names!r}; known: {', '.join(TRACKS)}")
    for name in chosen:
        require(name in TRACKS, f"there is no track {name!r}; known: {', '.join(TRACKS)}")
    return [TRACKS[name] for name in chosen]


def fastest(config: MoEConfig, dtype: str) -> Track:
    """The track of the best backend that runs this layer on a CPU in this dtype; the yardstick where none does."""
    try:
        name = f"optimized {backends.resolve(backends.AUTO, torch.device('cpu'), DTYPES[dtype], config).name}"
    except ValueError:
        return TRACKS[YARDSTICK]
    return TRACKS[name] if dtype in TRACKS[name].dtypes else TRACKS[YARDSTICK]


def _prepare_numpy(inputs: Inputs, dtype: str, conditions: Conditions) -> Step:
    def step() -> Callable[[], Outcome]:
        output, cache = moe_forward(inputs.x, inputs.params, inputs.config, pad_mask=inputs.pad_mask, **conditions._asdict())
        dx_TD, dparams = moe_backward(inputs.dy, cache)
        return lambda: Outcome({"y": output.y, "dx": dx_TD, "loss": np.asarray(output.loss), **dparams}, output.routing)

    return step


def module_track(
    name: str, moe_class: Callable[..., nn.Module], *, device: str = "cpu", dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    unavailable: Callable[[MoEConfig, str], str | None] = _can_run,
) -> Track:  # fmt: skip
    """The track of a module with the constructor, the call, the parameters and the aux of `reference.autograd.MoE`."""

    def prepare(inputs: Inputs, dtype: str, conditions: Conditions) -> Step:
        kind = DTYPES[dtype]
        moe = moe_class(inputs.config, device=device, dtype=kind)
        moe.load_state_dict(params_from_numpy(inputs.params, dtype=kind))
        moe.train(conditions.training)
        x_TD, dy_TD = (torch.from_numpy(array).to(device, kind) for array in (inputs.x, inputs.dy))
        x_TD.requires_grad_()
        arguments: dict[str, Any] = {"replay": conditions.replay}
        for fact in ("group_ids", "token_ids"):
            if (array := getattr(conditions, fact)) is not None:
                arguments[fact] = torch.from_numpy(array).to(device)
        if inputs.pad_mask.any():
            arguments["pad_mask"] = torch.from_numpy(inputs.pad_mask).to(device)

        def step() -> Callable[[], Outcome]:
            moe.zero_grad(set_to_none=True)
            x_TD.grad = None
            y_TD, aux = moe(x_TD, **arguments)
            roots, cotangents = [y_TD], [dy_TD]
            if aux.loss.requires_grad:
                roots, cotangents = [*roots, aux.loss], [*cotangents, torch.ones_like(aux.loss)]
            torch.autograd.backward(roots, cotangents)
            return lambda: _read(moe, x_TD, y_TD, aux)

        return step

    return Track(name, prepare, unavailable, dtypes, moe_class)


def _read(moe: nn.Module, x_TD: torch.Tensor, y_TD: torch.Tensor, aux: Any) -> Outcome:
    gradients = {"dx": x_TD, **dict(moe.named_parameters())}
    # A parameter that no token reached has no gradient at all, which means 0.
    outputs = {name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for name, tensor in gradients.items()}
    outputs = {"y": y_TD, "dx": outputs.pop("dx"), "loss": aux.loss, **outputs}
    return Outcome({name: tensor.detach().double().cpu().numpy() for name, tensor in outputs.items()}, routing_to_numpy(aux.routing))


def _backend_track(name: str) -> Track:
    backend = backends.BACKENDS[name]
    device = "cuda" if "cuda" in backend.devices and torch.cuda.is_available() else "cpu"
    return module_track(
        f"optimized {name}",
        partial(FastMoE, backend=name),
        device=device,
        dtypes=tuple(n for n in ("float32", "bfloat16") if not backend.dtypes or DTYPES[n] in backend.dtypes),
        unavailable=lambda config, dtype: backends.why_not(name, torch.device(device), DTYPES[dtype], config),
    )


register(Track(TRUTH, _prepare_numpy, dtypes=("float64",)))
register(module_track(YARDSTICK, MoE, dtypes=("float64", "float32", "bfloat16")))
for backend_name in backends.names():
    register(_backend_track(backend_name))

from .expert_parallel import track as _  # noqa: E402, F401 (a track that registers itself needs what is above)
