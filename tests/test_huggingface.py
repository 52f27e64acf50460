"""The fast path inside transformers: every experts class that is installed, against its own eager code, and whole models around them."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import itertools
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import needs_tool
from torch import nn

from optimized import huggingface
from optimized.experts import ACTIVATIONS
from reference.proof.equal import assert_equal
from reference.proof.teeth import assert_teeth, tensor_mutations

needs_tool("transformers")

import transformers  # noqa: E402
import transformers.models  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation  # noqa: E402

TOKENS, SLOTS, EXPERTS = 33, 2, 8
SIZES = {"hidden_size": 64, "moe_hidden_size": 64} | dict.fromkeys(
    ("moe_intermediate_size", "intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size"), 32
)  # fmt: skip
COUNTS = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS)
# One of each kind: layouts, biases, gates, norms, and the best-known models.
QUICK = (
    "mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "glm4_moe", "granitemoe",  # the plain kind
    "gpt_oss", "aria", "nemotron_h", "gemma4", "deepseek_v4", "muse_spark",  # the other kinds
)  # fmt: skip


def zoo() -> Iterator[tuple[str, str, str]]:
    """(model, module, class) of every experts class that the installed transformers dispatches, read from its source."""
    (root,) = transformers.models.__path__
    for model in sorted(module.name for module in pkgutil.iter_modules([root]) if module.ispkg):
        for path in sorted(Path(root, model).glob("modeling_*.py")):
            for found in re.finditer(r"@use_experts_implementation[^\n]*\nclass (\w+)", path.read_text(encoding="utf-8")):
                yield model, path.stem, found[1]


ZOO = list(zoo())


def configs(model: str, experts_class: type) -> list[type]:
    """The config classes that the experts may be built from: the annotated one, then those of texts, then the others."""
    module = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    found = {v for v in vars(module).values() if inspect.isclass(v) and issubclass(v, transformers.PretrainedConfig)}
    annotated = re.search(r"config: (\w+)", inspect.getsource(experts_class))
    wanted = annotated[1] if annotated else ""
    return sorted(found, key=lambda v: (v.__name__ != wanted, v.__module__ != module.__name__, "Text" not in v.__name__, v.__name__))


def build(model: str, module: str, name: str) -> nn.Module:
    """A small experts module of the zoo with random weights, in transformers' eager mode."""
    experts_class = getattr(importlib.import_module(f"transformers.models.{model}.{module}"), name)
    errors = []
    for config_class, arguments in itertools.product(configs(model, experts_class), ({}, {"intermediate_size": 32})):
        try:
            config = config_class()
            for key, value in (SIZES | COUNTS | {"num_experts_per_tok": SLOTS}).items():
                if hasattr(config, key):
                    with contextlib.suppress(Exception):  # a field that is no number keeps its default
                        setattr(config, key, value)
            config._experts_implementation = "eager"
            experts = experts_class(config, **arguments)
        except Exception as error:  # another config class of the same model fits
            errors.append(f"{config_class.__name__}: {error!r}")
            continue
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in experts.parameters():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
        return experts
    pytest.fail(f"{name} cannot be built: {errors}")


def inputs(d_model: int, experts: int, dtype: torch.dtype, *, sentinels: bool = False) -> tuple[torch.Tensor, ...]:
    """(x, expert ids, gates, dy) with values of `dtype`; the last expert gets no token."""
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, TOKENS, d_model, generator=generator).to(dtype)
    expert = torch.stack([torch.randperm(experts - 1, generator=generator)[:SLOTS] for _ in range(TOKENS)])
    gate = (torch.rand(TOKENS, SLOTS, generator=generator) + 0.1).to(dtype)
    if sentinels:
        away = torch.rand(TOKENS, SLOTS, generator=generator) < 0.4
        expert, gate = expert.masked_fill(away, experts), gate.masked_fill(away, 0)
    return x, expert, gate, dy


def run(module: nn.Module, implementation: str, kind: torch.dtype, given: tuple[torch.Tensor, ...]) -> dict[str, np.ndarray]:
    """Output and all gradients of a copy of the module, computed in `kind`."""
    module = copy.deepcopy(module).to(kind)
    module.config._experts_implementation = implementation
    x, expert, gate, dy = given
    x, gate = x.to(kind, copy=True).requires_grad_(), gate.to(kind, copy=True).requires_grad_()
    y = module(x, expert, gate)
    y.backward(dy.to(kind))
    norms = {name: tensor for name, tensor in module.named_parameters() if name not in huggingface.WEIGHTS}
    stacks = {f"experts.{name}": tensor for name, tensor in module.named_parameters() if name in huggingface.WEIGHTS}
    gradients = {"dx": x.grad, "dgate": gate.grad} | {name: tensor.grad for name, tensor in (norms | stacks).items()}
    return {name: tensor.detach().double().numpy() for name, tensor in ({"y": y} | gradients).items()}


def turned(module: nn.Module, name: str, tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """A parameter (or what has its shape) with the model width renumbered."""
    axes = {"down_proj": 1, "gate_up_proj": 2, "up_proj": 2}
    axis = None if name.endswith("up_proj_bias") else 3 - axes[name] if module.is_transposed and name in axes else axes.get(name, -1)
    return tensor if axis is None else tensor.index_select(axis, order)


def yardstick(module: nn.Module, kind: torch.dtype, given: tuple[torch.Tensor, ...], truth: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers' eager code in `kind`, each element as far from the truth as it gets when the model width is summed in other orders.

    One order's error is one draw, and where an expert has a token or two it is now and then almost 0; see `optimized.yardstick`.
    """
    x, expert, gate, dy = given
    worst = dict(truth)
    for number in range(8):
        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(number)) if number else torch.arange(x.shape[1])
        renumbered = copy.deepcopy(module)
        with torch.no_grad():
            for name, tensor in renumbered.named_parameters():
                tensor.copy_(turned(module, name, tensor.clone(), order))
        for name, array in run(renumbered, "eager", kind, (x[:, order], expert, gate, dy[:, order])).items():
            known = torch.from_numpy(array)
            back = known if name == "dgate" else turned(module, name.removeprefix("experts."), known, torch.argsort(order))
            farther = np.abs(back.numpy() - truth[name]) >= np.abs(worst[name] - truth[name])
            worst[name] = np.where(farther, back.numpy(), worst[name])
    return worst


def _eager_forward(module: nn.Module) -> Callable:
    return inspect.unwrap(type(module).forward)


def check(module: nn.Module, dtype: str = "float32", *, sentinels: bool = False) -> None:
    """The policy of `reference.proof` with transformers' code in float64 as the truth and its eager code in `dtype` as the yardstick."""
    kind = getattr(torch, dtype)
    module = module.to(kind)
    up = getattr(module, huggingface._names(module)[0])
    given = inputs(up.shape[1] if module.is_transposed else up.shape[2], len(up), kind, sentinels=sentinels)
    # Eager code that casts to float32 is no truth; there transformers' batched products are, which compute in the dtype they are given.
    truth = run(module, "batched_mm" if ".float()" in inspect.getsource(_eager_forward(module)) else "eager", torch.float64, given)
    eager = yardstick(module, kind, given, truth)

    def assertion(outputs: dict[str, np.ndarray]) -> None:
        assert_equal(outputs, truth, eager, dtype)

    assertion(run(module, "moebius", kind, given))
    assert_teeth(assertion, truth, tensor_mutations(truth, dtype))


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    huggingface.register("moebius")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs in transformers' eager code.*")
        yield


def test_registering_twice_is_harmless_and_takes_no_other_name() -> None:
    huggingface.register("moebius")
    assert ALL_EXPERTS_FUNCTIONS["moebius"] is huggingface.run_experts
    for name in ("eager", "grouped_mm"):
        with pytest.raises(ValueError, match=name):
            huggingface.register(name)


def test_the_zoo_is_found() -> None:
    assert {model for model, *_ in ZOO} >= set(QUICK) and len(ZOO) > 50


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", QUICK)
def test_output_and_gradients(model: str, dtype: str) -> None:
    check(build(*next(row for row in ZOO if row[0] == model)), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("row", ZOO, ids=[name for *_, name in ZOO])
def test_whole_zoo(row: tuple[str, str, str]) -> None:
    """No class may fall back: the warning that a fallback gives is an error here."""
    check(build(*row))


@pytest.mark.parametrize("model", ["mixtral", "muse_spark", "aria"])
def test_ids_of_no_expert_add_nothing(model: str) -> None:
    """What expert parallelism gives to a rank: assignments of other ranks have the id E and the gate 0."""
    experts = build(*next(row for row in ZOO if row[0] == model))
    experts._is_expert_parallel = True
    check(experts, sentinels=True)


def explained(module: nn.Module) -> huggingface.Explanation:
    (line,) = huggingface.explain(module)
    return line


@pytest.mark.parametrize(
    "model, note", [("mixtral", ""), ("gpt_oss", r"\(in, out\)"), ("gemma4", "its own"), ("muse_spark", "norm")]
)  # fmt: skip
def test_explain_says_what_is_not_fused(model: str, note: str) -> None:
    line = explained(build(*next(row for row in ZOO if row[0] == model)))
    assert line.backend is not None and re.search(note, line.note) and (note or not line.note)


class Stacked(nn.Module):
    """The plain kind of experts, to be spoiled in one way."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 32, 24) * 0.2)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, 24, 16) * 0.2)
        self.act_fn = config.act_fn

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden_states)
        for slot in range(top_k_index.shape[1]):
            for e in range(self.num_experts):
                own = top_k_index[:, slot] == e
                hidden = self._apply_gate(nn.functional.linear(hidden_states[own], self.gate_up_proj[e]))
                out[own] += nn.functional.linear(hidden, self.down_proj[e]) * top_k_weights[own, slot, None]
        return out


class Louder(Stacked):
    """Its own forward is not what the flags say."""

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return 1.01 * super().forward(hidden_states, top_k_index, top_k_weights)


class WithScale(Stacked):
    """One parameter more than the fast path knows."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return self.scale * super().forward(hidden_states, top_k_index, top_k_weights)


def dispatched(experts_class: type[nn.Module], act_fn: Callable = nn.functional.silu, **flags: bool) -> nn.Module:
    """An instance of a copy of the class, as transformers' decorator makes it."""
    decorated = use_experts_implementation(type(experts_class.__name__, (experts_class,), {"forward": experts_class.forward}), **flags)
    return decorated(SimpleNamespace(_experts_implementation="eager", act_fn=act_fn))


class Learnt(nn.Module):
    """An activation with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def forward(self, pre: torch.Tensor) -> torch.Tensor:
        return torch.where(pre > 0, pre, self.slope * pre)


FALLBACKS = {
    "its own forward computes something else": lambda: dispatched(Louder),
    "a parameter scale, which the fast path would not train": lambda: dispatched(WithScale),
    r"a parameter act_fn.slope, which the fast path would not train": lambda: dispatched(Stacked, Learnt()),
    r"no experts as its flags say": lambda: dispatched(Stacked, has_bias=True),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_what_does_not_fit_falls_back_with_its_reason(reason: str) -> None:
    module = FALLBACKS[reason]()
    line = explained(module)
    assert line.backend is None and re.search(reason, line.note) and "falls back" in str(line)
    given = inputs(24, EXPERTS, torch.float32)
    huggingface._warned.clear()
    with pytest.warns(UserWarning, match=reason):
        found = run(module, "moebius", torch.float32, given)
    for name, expected in run(module, "eager", torch.float32, given).items():
        np.testing.assert_array_equal(found[name], expected)


def test_the_plain_kind_is_fused() -> None:
    check(dispatched(Stacked))


def test_weights_that_are_all_zero_are_not_believed_in() -> None:
    """A module is often called before its weights are loaded; nothing may be learnt from 0 = 0."""
    module = dispatched(Louder)
    saved = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.zero_()
    assert explained(module).backend is not None
    module.load_state_dict(saved)
    assert explained(module).backend is None


@pytest.mark.parametrize("limit", [0.5, 7.0, 100.0, 3000.0])
def test_a_clamp_is_not_taken_for_swiglu(limit: float) -> None:
    module = dispatched(Stacked)
    assert huggingface._recognise(module, 64) == "swiglu"
    module._apply_gate = lambda pre: nn.functional.silu(pre.chunk(2, -1)[0].clamp(max=limit)) * pre.chunk(2, -1)[1]
    assert huggingface._recognise(module, 64) is None


def test_every_known_activation_is_recognised_and_nothing_close_to_it() -> None:
    gated = {"swiglu": nn.functional.silu, "geglu": nn.functional.gelu}
    for name, act_fn in gated.items():
        assert huggingface._recognise(dispatched(Stacked, act_fn), 64) == name
    for act_fn in (
        lambda pre: nn.functional.gelu(pre, approximate="tanh"),
        lambda pre: pre * torch.sigmoid(1.702 * pre),
        nn.functional.relu,
    ):
        assert huggingface._recognise(dispatched(Stacked, act_fn), 64) is None
    assert huggingface._recognise(dispatched(Stacked, nn.functional.relu, has_gate=False), 64) == "relu"
    swapped = dispatched(Stacked)
    swapped._apply_gate = lambda pre: nn.functional.silu(pre[..., 1::2]) * pre[..., ::2]
    assert huggingface._recognise(swapped, 64) is None
    swapped.is_concatenated = False
    assert huggingface._recognise(swapped, 64) is None
    swapped._apply_gate = lambda pre: nn.functional.silu(pre[..., ::2]) * pre[..., 1::2]
    assert huggingface._recognise(swapped, 64) == "swiglu"
    assert set(gated) < set(ACTIVATIONS)


def language_model(name: str, chosen: int = 2) -> transformers.PreTrainedModel:
    """A tiny causal language model."""
    common = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_experts_per_tok=chosen, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, head_dim=8,
    )  # fmt: skip
    own = {
        "Mixtral": dict(num_local_experts=8), "Qwen3Moe": dict(num_experts=8, moe_intermediate_size=24),
        "GptOss": dict(num_local_experts=8, layer_types=["full_attention"] * 2),
    }[name]  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**common, **own)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim > 1:
                tensor.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_generate_gives_the_same_greedy_tokens(name: str) -> None:
    model = language_model(name)
    prompt = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    arguments = dict(max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(prompt))
    model.set_experts_implementation("eager")
    expected = model.generate(prompt, **arguments)
    model.set_experts_implementation("moebius")
    assert all(line.backend for line in huggingface.explain(model))
    assert torch.equal(model.generate(prompt, **arguments), expected)
    assert len(expected[:, 9:].unique()) > 8  # not one token over and over


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_logits_in_bfloat16_are_as_good_as_eager(name: str) -> None:
    """With every expert chosen, so that no near-tie of the router decides."""
    exact = language_model(name, chosen=8).double()
    model = copy.deepcopy(exact).bfloat16()
    exact = copy.deepcopy(model).double()
    ids = torch.randint(3, 97, (2, 16), generator=torch.Generator().manual_seed(0))
    errors = {}
    with torch.no_grad():
        exact.set_experts_implementation("eager")
        truth = exact(ids).logits
        for implementation in ("eager", "moebius"):
            model.set_experts_implementation(implementation)
            errors[implementation] = float((model(ids).logits.double() - truth).norm() / truth.norm())
    assert 0 < errors["moebius"] <= 1.5 * errors["eager"]


def loss_gradients(model: transformers.PreTrainedModel, implementation: str, *, checkpointing: bool) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).train()
    model.set_experts_implementation(implementation)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(3, 97, (2, 16), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}


@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
def test_gradient_checkpointing(name: str) -> None:
    model = language_model(name)
    expected = loss_gradients(model, "eager", checkpointing=False)
    for checkpointing in (False, True):
        found = loss_gradients(model, "moebius", checkpointing=checkpointing)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-8, key


def test_autocast_computes_in_its_dtype() -> None:
    module = build(*next(row for row in ZOO if row[0] == "mixtral"))
    module.config._experts_implementation = "moebius"
    x, expert, gate, _ = inputs(64, EXPERTS, torch.float32)
    exact = module(x, expert, gate)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = module(x, expert, gate)
    assert rounded.dtype == x.dtype
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize("name, whole", [("mixtral", True), ("gpt_oss", False), ("nemotron_h", True)])
def test_compiles(name: str, whole: bool) -> None:
    """Without a graph break where the activation is recognised and no columns alternate."""
    module = build(*next(row for row in ZOO if row[0] == name))
    module.config._experts_implementation = "moebius"
    x, expert, gate, _ = inputs(64, EXPERTS, torch.float32)
    expected = module(x, expert, gate)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=whole, backend="aot_eager")
    leaf = x.detach().clone().requires_grad_()
    found = compiled(leaf, expert, gate)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert leaf.grad is not None and all(parameter.grad is not None for parameter in module.parameters())


def test_a_compiled_program_is_not_used_for_other_experts() -> None:
    """Its plan is a constant of the program, which another module of the same class and sizes may not share."""
    first = build(*next(row for row in ZOO if row[0] == "mixtral"))
    first.config._experts_implementation = "moebius"
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    second.act_fn = nn.GELU()
    x, expert, gate, _ = inputs(64, EXPERTS, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda module: module(x, expert, gate), fullgraph=True, backend="aot_eager")
    outputs = [compiled(module) for module in (first, second, third, first)]
    for module, output in zip((first, second, third, first), outputs, strict=True):
        assert torch.equal(output, module(x, expert, gate))
    assert not torch.equal(outputs[0], outputs[1])


def test_a_model_without_experts_has_nothing_to_explain() -> None:
    with pytest.raises(ValueError, match="Linear holds no experts module"):
        huggingface.explain(nn.Linear(2, 2))
