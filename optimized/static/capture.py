"""What the real launchers would launch: they run on tensors without memory, under a driver that notes every launch and starts none."""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false
# A launch is replaced while launchers run, and the layout of biases is known at run time alone.

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from reference import presets
from reference.config import MoEConfig, require

from ..kernels import is_interpreting, launch
from ..kernels.blocks import Blocks, using
from .targets import TARGETS

MODELS = {
    "Mixtral-8x7B": "mixtral-8x7b", "DeepSeekMoE-16B": "deepseek-moe-16b", "Qwen3-30B-A3B": "qwen3-30b-a3b", "OLMoE-1B-7B": "olmoe-1b-7b",
    "gpt-oss-20b": "gpt-oss-20b", "DeepSeek-V3": "deepseek-v3",
}  # fmt: skip
TOKENS = 4096
DTYPES: dict[str, tuple[torch.dtype, str]] = {
    "bfloat16": (torch.bfloat16, "high"), "float16": (torch.float16, "high"), "tf32": (torch.float32, "high"),
    "float32": (torch.float32, "highest"),
}  # fmt: skip
# Launches of one kernel in one pass, in the order in which they come.
ROLES = {
    "route_kernel": ("route",), "histogram_kernel": ("histogram",), "scan_kernel": ("scan",), "scatter_kernel": ("scatter",),
    "project_up_kernel": ("up",), "expert_product_kernel": ("down", "rows' gradient"), "combine_kernel": ("combine", "input's gradient"),
    "restore_kernel": ("restore",), "activation_gradient_kernel": ("activation's gradient",),
    "weight_gradient_kernel": ("up's gradient", "down's gradient"), "route_backward_kernel": ("router's gradient",),
}  # fmt: skip
TILED = {"up": "up", "down": "product", "rows' gradient": "product", "activation's gradient": "activation",
         "up's gradient": "weight", "down's gradient": "weight"}  # fmt: skip


class Launch(NamedTuple):
    """One launch as Triton specialised it: what `triton.compile` needs, the grid, and the role of the kernel in its pass."""

    function: JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any
    grid: tuple[int, ...]
    role: str = ""

    @property
    def kernel(self) -> str:
        """Name of the kernel."""
        return self.function.__name__

    def constant(self, name: str) -> Any:
        """The value of a compile-time argument, or None."""
        return self.constants.get((self.function.arg_names.index(name),))

    def describe(self) -> str:
        """Everything that the specialisation depends on but the source, in words that stay when the source is edited."""
        named = {self.function.arg_names[place[0]]: getattr(value, "__name__", value) for place, value in self.constants.items()}
        aligned = sorted(self.function.arg_names[place[0]] for place, kinds in self.attributes.items() if kinds)
        warps = f"{self.options.num_warps} warps, {self.options.num_stages} stages"
        return f"{self.kernel}; {dict(sorted(self.signature.items()))}; {sorted(map(str, named.items()))}; {aligned}; {warps}"

    def identity(self) -> str:
        """`describe` in eight hexadecimal digits."""
        return hashlib.sha256(self.describe().encode()).hexdigest()[:8]


class _Driver:
    """As much of a driver as a launch asks for before it is compiled. The device is the target's name: caches are kept apart by it."""

    def __init__(self, name: str) -> None:
        self.name = name
        target = TARGETS[name]
        self.target = GPUTarget(target.backend, target.arch, target.lanes)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: Any = None) -> int:
        return 0


@contextlib.contextmanager
def noted(name: str) -> Iterator[list[Launch]]:
    """Inside the block launches for the target `name` are noted instead of compiled and started. Raises ValueError in the interpreter."""
    require(name in TARGETS, f"target is {name!r}; known: {', '.join(TARGETS)}")
    require(not is_interpreting(), "TRITON_INTERPRET is set, so that kernels are interpreted and not compiled; unset it")
    launches: list[Launch] = []
    stock_run, stock_compile, before = JITFunction.run, JITFunction._do_compile, driver._active
    grids: list[tuple[int, ...]] = []

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        grids.append(tuple(grid))
        return stock_run(self, *arguments, grid=grid, warmup=warmup, **named)

    def note(self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, warmup: Any) -> None:
        launches.append(Launch(self, signature, constants, attributes, options, grids[-1]))

    JITFunction.run, JITFunction._do_compile = run, note
    driver.set_active(_Driver(name))  # type: ignore[arg-type]
    try:
        yield launches
    finally:
        JITFunction.run, JITFunction._do_compile = stock_run, stock_compile
        driver._active = before


def passes(config: MoEConfig, dtype: torch.dtype, tokens: int = TOKENS) -> Iterator[str]:
    """Runs the launchers of one layer on tensors without memory; yields "forward", "backward" and "inference" when each is through."""
    experts, gating, width = config.experts, config.gating, config.d_model
    rows = (2 if experts.activation in ("swiglu", "geglu", "clamped_swiglu") else 1) * experts.width
    meta: Any = {"device": "meta"}
    up, down = (torch.empty(experts.count, *shape, dtype=dtype, **meta) for shape in ((rows, width), (width, experts.width)))
    biases = [torch.empty(experts.count, size, dtype=dtype, **meta) if experts.bias else None for size in (rows, width)]
    x, logits = torch.empty(tokens, width, dtype=dtype, **meta), torch.empty(tokens, experts.count, **meta)
    correction = torch.empty(experts.count, **meta) if gating.correction_bias else None
    real, keep = torch.empty(tokens, dtype=torch.bool, **meta), torch.empty(tokens, gating.top_k, dtype=torch.bool, **meta)
    function, activation = config.scores.function, experts.activation
    scores, expert, gate, _ = launch.route(logits, correction, real, function, gating)
    _, pre, order, bounds = launch.experts_forward(x, expert, gate, keep, up, down, *biases, activation, True)
    yield "forward"
    gradients = launch.experts_backward(x, x, gate, up, down, *biases, pre, order, bounds, activation, True)
    launch.route_backward(scores, gradients[1], scores, expert, function, gating)
    yield "backward"
    launch.experts_forward(x, expert, gate, keep, up, down, *biases, activation, False)
    yield "inference"


def launches(target: str, model: str, dtype: str, **blocks: Blocks) -> dict[str, list[Launch]]:
    """The launches of each pass ("forward", "backward", "inference") of a model's layer; blocks: rows that replace the tables'."""
    require(model in MODELS, f"model is {model!r}; known: {', '.join(MODELS)}")
    require(dtype in DTYPES, f"dtype is {dtype!r}; known: {', '.join(DTYPES)}")
    kind, precision = DTYPES[dtype]
    before, found, done = torch.get_float32_matmul_precision(), {}, 0
    torch.set_float32_matmul_precision(precision)
    try:
        with using(**blocks), noted(target) as seen:
            for name in passes(presets.get(MODELS[model]), kind):
                found[name], done = _named(name, seen[done:]), len(seen)
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def _named(name: str, noted_launches: list[Launch]) -> list[Launch]:
    """Launches with their roles: in the backward a product of rows and a combination come for the second time."""
    seen: dict[str, int] = {}
    named = []
    for one in noted_launches:
        roles = ROLES[one.kernel]
        place = seen.get(one.kernel, 0)
        seen[one.kernel] = place + 1
        shared = one.kernel in ("expert_product_kernel", "combine_kernel")
        named.append(one._replace(role=roles[name == "backward"] if shared else roles[place]))
    return named
