"""The C kernel: equal on every instruction set, independent of its threads, and never behind the weights it has packed."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from optimized import MoE, backends, native_backend, operators, proofs
from optimized.contracts import CONTRACTS
from optimized.native import packing
from optimized.native.build import FLAGS, cpu_features, library_path
from optimized.native.library import Library, load
from reference import experts as numpy_experts
from reference.autograd.layer import Routing
from reference.config import ExpertsConfig, GatingConfig, MoEConfig
from reference.proof.cases import get

PROMISE = CONTRACTS["optimized.native_backend.apply_experts"]
DTYPES = [torch.float32, torch.bfloat16]
CPU = torch.device("cpu")
SMALL = MoEConfig(40, gating=GatingConfig(top_k=2), experts=ExpertsConfig(5, 24))
# Several panels of either width, several chunks of rows, an odd width.
LARGE = MoEConfig(141, gating=GatingConfig(top_k=3), experts=ExpertsConfig(6, 75, bias=True))

# Gradients that are written past the caches, and too few rows an expert to pack anything.
MANY = MoEConfig(128, gating=GatingConfig(top_k=2), experts=ExpertsConfig(128, 144))
# Sums longer than a part of a panel and than what is added up at once, for about two tiles of rows an expert.
DEEP = MoEConfig(700, gating=GatingConfig(top_k=1), experts=ExpertsConfig(4, 290))

# A gradient that is written past the caches, one panel wide, whose 2F rows end with ten after the last whole chunk.
NARROW = MoEConfig(64, gating=GatingConfig(top_k=1), experts=ExpertsConfig(176, 197))

# What each build says of itself; the flags only take instructions away from the machine the tests run on.
VARIANTS = {
    "plain": (("-DMOEBIUS_PLAIN", "-march=native"), "plain", ()),
    "sse2": (("-march=x86-64",), "plain", ("sse2",)),
    "avx2": (("-march=x86-64-v3",), "avx2", ("avx2", "fma")),
    "avx512": (("-march=x86-64-v4",), "avx512", ("avx512f", "avx512bw", "avx512vl", "avx512dq")),
    "avx512+bf16": (("-march=x86-64-v4", "-mavx512bf16"), "avx512+bf16", ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16")),
}
VARIANT_CASES = (
    "no-tokens",
    "few-tokens",
    "many-tokens",
    "empty-experts",
    "off-tile-widths",
    "wide",
    "drops",
    "relu",
    "gelu-bias",
    "swiglu-bias",
)

if backends.why_not("native", CPU, torch.float32, SMALL):
    pytest.skip("needs tool: cc", allow_module_level=True)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    """The backend runs on the library built for one instruction set."""
    flags, says, needs = VARIANTS[request.param]
    features = set(cpu_features().split())
    if not features.issuperset(needs):
        pytest.skip(f"this processor lacks {', '.join(set(needs) - features)}")
    library = Library(library_path((*FLAGS, *flags)))
    assert library.instruction_set == says
    monkeypatch.setattr(native_backend, "load", lambda: library)
    return library


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets PyTorch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", PROMISE.dtypes)
def test_every_instruction_set_keeps_the_contract(variant: Library, dtype: str, request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["variant"] == "sse2" and dtype == "float32":
        # SSE2 rounds a product before it adds it. Eager PyTorch on such a machine would too, but the yardstick of this one does not.
        pytest.skip("judged against the other builds")
    for name in VARIANT_CASES:
        assert proofs.prove(PROMISE, get(name), dtype), name


def layer(config: MoEConfig, dtype: torch.dtype = torch.float32) -> MoE:
    moe = MoE(config, backend="native", dtype=dtype)
    with torch.no_grad():
        for name, tensor in moe.tensors().items():
            if name.endswith("bias"):
                tensor.normal_(0, 0.3)
    return moe


def results(moe: MoE, x: Tensor, routing: Routing) -> dict[str, Tensor]:
    """Output and all gradients of the experts, with a cotangent that is always the same."""
    x = x.detach().requires_grad_()
    gate = routing.gate.detach().requires_grad_()
    weights = {name: tensor for name, tensor in moe.named_parameters() if name.startswith("experts.")}
    y = moe.apply_experts(x, routing._replace(gate=gate))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    names, leaves = zip(*{"dx": x, "dgate": gate, **weights}.items(), strict=True)
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, leaves, dy), strict=True))}


def drawn(config: MoEConfig, tokens: int, dtype: torch.dtype, *, skewed: bool = False) -> tuple[Tensor, Routing]:
    """Tokens, and a routing with a tenth of the assignments dropped; skewed: the first expert is in every choice."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, config.d_model, generator=generator).to(dtype)
    scores = torch.rand(tokens, config.experts.count, generator=generator)
    if skewed:
        scores[:, 0] = 2
    gate, expert = scores.topk(config.gating.top_k)
    keep = torch.rand(gate.shape, generator=generator) > 0.1
    return x, Routing(expert, gate.masked_fill(~keep, 0), keep, gate, gate, gate, gate, {})


def assert_identical(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, expected in wanted.items():
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("config", [LARGE, MANY, DEEP], ids=["large", "many", "deep"])
def test_instruction_sets_agree(
    variant: Library, config: MoEConfig, dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = layer(config, dtype)
    x, routing = drawn(config, 100, dtype)
    found = results(moe, x, routing)
    monkeypatch.setattr(native_backend, "load", load)
    for name, wanted in results(moe, x, routing).items():
        error = (found[name].double() - wanted.double()).square().mean().sqrt() / wanted.double().square().mean().sqrt()
        assert error <= limit, (name, error)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])  # bf16: both round the hidden layer
@pytest.mark.parametrize("config, tokens, skewed", [(MANY, 100, False), (MANY, 100, True), (NARROW, 30_000, False)])
def test_many_experts_agree_with_the_torch_backend(dtype: torch.dtype, limit: float, config: MoEConfig, tokens: int, skewed: bool) -> None:
    native = layer(config, dtype)
    stock = MoE(config, backend="torch", dtype=dtype)
    stock.load_state_dict(native.state_dict())
    x, routing = drawn(config, tokens, dtype, skewed=skewed)
    found = results(native, x, routing)
    for name, wanted in results(stock, x, routing).items():
        error = (found[name].double() - wanted.double()).square().mean().sqrt() / wanted.double().square().mean().sqrt()
        assert error <= limit, (name, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "config, tokens, skewed", [(LARGE, 1, False), (LARGE, 7, False), (LARGE, 300, False), (LARGE, 300, True), (MANY, 100, True)]
)
def test_results_do_not_depend_on_the_number_of_threads(
    config: MoEConfig, tokens: int, skewed: bool, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    moe = layer(config, dtype)
    x, routing = drawn(config, tokens, dtype, skewed=skewed)
    threads(1)
    alone = results(moe, x, routing)
    assert alone["y"].any() and alone["experts.down_proj"].any()
    for count in (2, 3, 16):
        threads(count)
        assert_identical(results(moe, x, routing), alone)


def test_a_forked_child_has_a_team_of_its_own(threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEBIUS_PACK", "0")  # filling a buffer of that size with NaN would ask OpenMP, whose threads do not survive a fork
    moe = layer(LARGE)
    x, routing = drawn(LARGE, 100, torch.float32)
    threads(2)
    with torch.no_grad():
        wanted = moe.apply_experts(x, routing)
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # a child that waits for threads it does not have must not hang the test
            os._exit(0 if all(torch.equal(moe.apply_experts(x, routing), wanted) for _ in range(3)) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(moe.apply_experts(x, routing), wanted)


def test_python_threads_at_once_disturb_nobody(threads: Callable[[int], None]) -> None:
    threads(2)
    work = [(layer(LARGE), *drawn(LARGE, tokens, torch.float32)) for tokens in (1, 50, 200, 300)]
    wanted = [results(*arguments) for arguments in work]
    failures: list[BaseException] = []

    def repeat(arguments: tuple[MoE, Tensor, Routing], expected: dict[str, Tensor]) -> None:
        try:
            for _ in range(10):
                assert_identical(results(*arguments), expected)
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=repeat, args=pair) for pair in zip(work, wanted, strict=True)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not failures


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_spoils_no_other(variant: Library, value: float, dtype: torch.dtype) -> None:
    moe = layer(LARGE, dtype)
    x, routing = drawn(LARGE, 20, dtype)
    routing = routing._replace(keep=torch.ones_like(routing.keep))
    wanted = results(moe, x, routing)
    x[6] = value
    found = results(moe, x, routing)
    others = torch.arange(20) != 6
    assert torch.equal(found["y"][others], wanted["y"][others]) and torch.equal(found["dx"][others], wanted["dx"][others])
    assert not found["y"][6].isfinite().any()
    untouched = [e for e in range(LARGE.experts.count) if e not in routing.expert[6]]
    assert torch.equal(found["experts.gate_up_proj"][untouched], wanted["experts.gate_up_proj"][untouched])


def test_an_id_that_names_no_expert_is_a_dropped_assignment() -> None:
    moe = layer(SMALL)
    x, routing = drawn(SMALL, 9, torch.float32)
    routing = routing._replace(keep=torch.ones_like(routing.keep))
    wrong, dropped = routing.expert.clone(), routing.keep.clone()
    wrong[2, 0], wrong[5, 1], wrong[6, 1] = -1, SMALL.experts.count, 2**40
    dropped[2, 0] = dropped[5, 1] = dropped[6, 1] = False
    assert_identical(results(moe, x, routing._replace(expert=wrong)), results(moe, x, routing._replace(keep=dropped)))


@pytest.mark.parametrize("name", numpy_experts.ACTIVATIONS)
def test_activations_over_their_whole_range(variant: Library, name: str) -> None:
    """A network of width 1 whose weights are 1 is the activation alone."""
    activation = numpy_experts.ACTIVATIONS[name]
    pre = torch.linspace(-40, 40, 20001)
    weights = torch.ones(1, 2 if activation.gated else 1, 1)
    u = pre.double().numpy()[:, None].repeat(weights.shape[1], 1)
    truth, cache = activation.forward(u)
    slope = activation.backward(np.ones_like(truth), cache).sum(1)
    x = pre[:, None].requires_grad_()
    expert = torch.zeros(len(pre), 1, dtype=torch.int64)
    y = native_backend.OPERATOR(x, expert, torch.ones(len(pre), 1), expert == 0, weights, torch.ones(1, 1, 1), None, None, name, True)[0]
    y.sum().backward()
    for found, wanted in ((y.detach()[:, 0], truth[:, 0]), (x.grad[:, 0], slope)):
        error = np.abs(found.double().numpy() - wanted)
        assert (error <= 1e-6 * np.abs(wanted) + 2e-7).all(), (name, pre[int(error.argmax())], error.max())


CHANGES: dict[str, Callable[[torch.nn.Parameter], object]] = {
    "in place": lambda weight: weight.mul_(0.5),
    "through .data": lambda weight: weight.data.mul_(0.5),
    "through NumPy": lambda weight: np.multiply(weight.detach().numpy(), 0.5, out=weight.detach().numpy()),
    "new storage": lambda weight: setattr(weight, "data", weight.detach() * 0.5),
}


@pytest.mark.parametrize("name", ["experts.gate_up_proj", "experts.down_proj"])
@pytest.mark.parametrize("change", CHANGES)
def test_packed_weights_follow_the_parameters(name: str, change: str) -> None:
    moe = layer(SMALL)
    x, routing = drawn(SMALL, 30, torch.float32)
    with torch.no_grad():
        first = [moe.apply_experts(x, routing) for _ in range(3)]
        entry = packing.entry_of(moe.get_parameter("experts.gate_up_proj"))
        assert entry is not None and entry.packed is not None
        assert all(torch.equal(y, first[0]) for y in first)
        CHANGES[change](moe.get_parameter(name))
        changed = moe.apply_experts(x, routing)
        fresh = layer(SMALL)
        fresh.load_state_dict(moe.state_dict())
        assert not torch.equal(changed, first[0])
        assert torch.equal(changed, fresh.apply_experts(x, routing))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [SMALL, LARGE, DEEP])
def test_packed_and_unpacked_weights_give_the_same_bits(config: MoEConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = layer(config, dtype)
    x, routing = drawn(config, 50, dtype)
    with torch.no_grad():
        packed = [moe.apply_experts(x, routing) for _ in range(2)][1]
        weight = moe.get_parameter("experts.gate_up_proj")
        entry = packing.entry_of(weight)
        assert entry is not None and entry.packed is not None
        packing.forget(weight)
        monkeypatch.setenv("MOEBIUS_PACK", "0")
        assert torch.equal(moe.apply_experts(x, routing), packed)
        assert packing.entry_of(weight) is None


def test_packed_weights_go_with_their_parameters_and_with_training() -> None:
    moe = layer(SMALL)
    x, routing = drawn(SMALL, 8, torch.float32)
    before = len(packing._entries)
    with torch.no_grad():
        for _ in range(2):
            moe.apply_experts(x, routing)
    assert len(packing._entries) == before + 1
    moe.apply_experts(x, routing)
    assert len(packing._entries) == before
    with torch.no_grad():
        moe.apply_experts(x, routing)
    assert len(packing._entries) == before + 1
    del moe
    gc.collect()
    assert len(packing._entries) == before


@pytest.mark.parametrize("config", [SMALL, LARGE])
def test_the_operator_is_a_good_citizen(config: MoEConfig) -> None:
    moe = layer(config)
    x, routing = drawn(config, 6, torch.float32)
    weights = [
        moe.get_parameter(f"experts.{name}").detach().requires_grad_() if config.experts.bias or "bias" not in name else None
        for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    ]
    arguments = (x.requires_grad_(), routing.expert, routing.gate.requires_grad_(), routing.keep, *weights, "swiglu", True)
    torch.library.opcheck(native_backend.OPERATOR, arguments)


def test_without_gradients_the_dispatcher_is_passed_by_unless_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = layer(SMALL)
    x, routing = drawn(SMALL, 12, torch.float32)
    direct, seen = [], []

    def count(*arguments: object) -> tuple[Tensor, ...]:
        direct.append(arguments)
        return native_backend.experts_forward(*arguments)  # type: ignore[arg-type]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    monkeypatch.setitem(operators._PLAIN, native_backend.OPERATOR, count)
    with torch.no_grad():
        y = moe.apply_experts(x, routing)
        assert len(direct) == 1
        with Watch():
            assert torch.equal(moe.apply_experts(x, routing), y)
        assert any("native_experts" in name for name in seen)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert moe.apply_experts(mode.from_tensor(x), routing).shape == y.shape
    trained = moe.apply_experts(x, routing)
    assert len(direct) == 1 and trained.requires_grad and torch.equal(trained, y)


def test_compiles_without_a_graph_break() -> None:
    moe = layer(SMALL)
    x, _ = drawn(SMALL, 12, torch.float32)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    wanted, found = (module(x.clone().requires_grad_())[0] for module in (moe, compiled))
    assert torch.equal(found, wanted)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in moe.parameters())


def test_what_it_does_not_run_is_refused_with_a_reason() -> None:
    for dtype in (torch.float64, torch.float16):
        assert "bfloat16" in (backends.why_not("native", CPU, dtype, SMALL) or "")
    assert "cpu" in (backends.why_not("native", torch.device("cuda"), torch.float32, SMALL) or "")
    assert MoE(SMALL).backend == "native"
    assert MoE(SMALL, dtype=torch.float64).backend == "torch"


def test_the_library_says_what_it_is() -> None:
    library = load()
    assert library.instruction_set and Path(library.path).is_file()
    assert set(library.activations) == set(numpy_experts.ACTIVATIONS)
