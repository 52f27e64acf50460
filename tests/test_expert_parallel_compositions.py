"""Expert parallelism together with what else a training run uses: cut experts, replicas, accumulation, recomputation, compilation."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from configs import CONFIGS
from distributed_worker import all_state, counted_traffic, layer_step, lm_steps, place_in, stepped
from test_expert_parallel import (
    REFUSED,
    SPREAD,
    assert_good,
    assert_same,
    case_task,
    compare,
    layer_check,
    trained_task,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from optimized.expert_parallel import (
    Placement,
    full_state_dict,
    layer,
    load_full_state_dict,
    load_sharded,
    parallelize,
    save_sharded,
)
from optimized.expert_parallel.layer import NO_GRAPH
from optimized.expert_parallel.limits import FIELDS, check_supported
from optimized.expert_parallel.plan import outgoing
from optimized.expert_parallel.ranks import run_ranks
from reference import ExpertsConfig, MoEConfig, cost, presets
from reference.autograd import MoE

CUT = (
    "moe++", "soft", "mixtral", "deepseek-v3", "biases", "swiglu-biases", "gpt-oss", "llama4",
    "gated-inputs", "shared-softmax", "relu2", "all-chosen",
)  # fmt: skip


def divisible(config: MoEConfig) -> MoEConfig:
    """The same layer with widths that four ranks divide."""
    return dataclasses.replace(config, d_model=8, experts=dataclasses.replace(config.experts, width=12))


def cut_mesh(ep: int, etp: int) -> DeviceMesh:
    """The dimensions "ep" and "etp" of a mesh over four processes."""
    return init_device_mesh("cpu", (4 // (ep * etp), ep, etp), mesh_dim_names=("dp", "ep", "etp"))["ep", "etp"]


def cut_checks(names: tuple[str, ...], shapes: tuple[tuple[int, int], ...]) -> list[str]:
    """In one of four ranks: layers whose experts are cut equal one process."""
    failures = []
    for ep, etp in shapes:
        mesh = cut_mesh(ep, etp)
        checks = {}
        for number, name in enumerate(names):
            task = partial(trained_task, divisible(CONFIGS[name]), "float64", ("even", "first_empty", "one_full")[number % 3])
            checks[name] = partial(layer_check, task, "float64", ("fast", "reference")[number % 2])
        for number, name in enumerate(("no-tokens", "empty-experts", "one-takes-all", "drops")):
            checks[name] = partial(layer_check, partial(case_task, name, "float64", "even"), "float64", ("fast", "reference")[number % 2])
        for dtype in ("float32", "bfloat16"):
            wide = dataclasses.replace(CONFIGS["biases"], d_model=24, experts=dataclasses.replace(CONFIGS["biases"].experts, width=16))
            checks[dtype] = partial(layer_check, partial(trained_task, wide, dtype, "even", 96), dtype, "fast")
        checks |= {"traffic": cut_traffic} | ({"teeth": cut_teeth} if etp > 1 else {})
        for name, check in checks.items():
            try:
                check(ep * etp, mesh)
            except AssertionError as error:
                failures.append(f"{ep} × {etp}, {name}: {error}")
    return failures


def cut_traffic(ranks: int, mesh: DeviceMesh) -> None:
    """A token goes to every part of its expert: the traffic is that of a layer with so many more experts and choices."""
    parts, task = mesh.size(1), trained_task(divisible(CONFIGS["token-major"]), "float32", "first_empty")
    with counted_traffic() as calls:
        outputs = layer_step(task, "float32", MoE, mesh)
    home_E = np.array(Placement.contiguous(task.inputs.config.experts.count, ranks // parts).owner)
    expert_TK = (outputs["expert"][:, :, None] * parts + np.arange(parts)).reshape(len(outputs["expert"]), -1)
    owner_E = (home_E[:, None] * parts + np.arange(parts)).flatten()
    keep_TK = outputs["keep"].repeat(parts, 1)
    volume = cost.all_to_all_volume(expert_TK, keep_TK, task.rank_of_token(ranks), owner_E, 8, ranks=ranks, itemsize=4)
    rank = place_in(mesh)
    sent = [[size if other != rank else 0 for other, size in enumerate(call)] for call in calls]
    assert sent == [part[rank].tolist() for part in (volume.dispatch, volume.combine, volume.combine_gradient, volume.dispatch_gradient)]


def cut_without_halves(stack: torch.Tensor, name: str, config: ExpertsConfig, part: int, parts: int) -> torch.Tensor:
    """What a plain Shard(1) of gate_up_proj would give a rank: only gate rows, or only up rows."""
    return stack.chunk(parts, 2 if name == "down_proj" else 1)[part]


def cut_teeth(ranks: int, mesh: DeviceMesh) -> None:
    """A bias that every part adds, and halves that are cut as one, are noticed."""
    task = trained_task(divisible(CONFIGS["swiglu-biases"]), "float64", "even")
    mutations: dict[str, Any] = {
        "a bias added by every part": ("padded_bias", lambda local, d_model, part, parts: local.repeat(1, parts)),
        "gate and up rows cut as one": ("cut", cut_without_halves),
    }
    for name, (function, mutation) in mutations.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer, function, mutation)
            found = layer_step(task, "float64", MoE, mesh)
        if place_in(mesh) == 0:
            with pytest.raises(AssertionError):
                compare(found, lambda kind: layer_step(task, kind, MoE, None), "float64")
                pytest.fail(f"not noticed: {name}", pytrace=False)


def test_cut_experts_equal_one_process() -> None:
    assert_good(run_ranks(4, cut_checks, ("biases", "deepseek-v3", "llama4", "swiglu-biases"), ((2, 2),), deadline=120))


@pytest.mark.slow
def test_cut_experts_equal_one_process_on_every_mesh() -> None:
    assert_good(run_ranks(4, cut_checks, CUT, ((2, 2), (1, 2), (1, 4), (4, 1)), deadline=400))


def cut_checkpoint_checks(folder: str) -> list[str]:
    """In one of four ranks: write where experts are cut, read where they are not, and back; and safetensors' plain state."""
    shapes: dict[str, DeviceMesh | None] = {"2 × 2": cut_mesh(2, 2), "1 × 4": cut_mesh(1, 4), "2": cut_mesh(2, 2)["ep"], "one": None}
    config = divisible(CONFIGS["swiglu-biases"])
    failures = []
    for name, mesh in shapes.items():
        if mesh is None:
            continue
        moe, optimizer = stepped(config, mesh, 1, 2)
        expected = all_state(moe, optimizer)
        path = save_sharded(Path(folder, name.replace(" ", "")), moe, optimizer, step=2)
        for other, other_mesh in shapes.items():
            target, target_optimizer = stepped(config, other_mesh, 2, 1)
            extra = load_sharded(path, target, target_optimizer, step=0)
            found = all_state(target, target_optimizer)
            failures += [f"{name} to {other}: {key}" for key in expected if not torch.equal(found[key], expected[key])]
            failures += [f"{name} to {other}: {extra}"] * (extra != {"step": 2})
        again, _ = stepped(config, mesh, 3, 0)
        load_full_state_dict(again, full_state_dict(moe))
        failures += [f"{name}: {k} by plain state" for k, t in full_state_dict(again).items() if not torch.equal(t, expected[k])]
    return failures


@pytest.mark.slow
def test_checkpoints_of_cut_experts(tmp_path: Path) -> None:
    assert_good(run_ranks(4, cut_checkpoint_checks, str(tmp_path), deadline=120))


COMPOSITIONS: dict[str, dict[str, Any]] = {
    "accumulation and activation checkpointing": {"shape": (1, 4), "accumulation": 2, "checkpointing": True},
    "data parallelism": {"shape": (2, 2)},
    "FSDP2": {"shape": (2, 2), "fsdp": True},
    "DDP": {"shape": (2, 2), "ddp": True},
    "DDP and accumulation": {"shape": (1, 4), "ddp": True, "accumulation": 2},
    "torch.compile": {"shape": (1, 4), "compiled": "aot_eager"},
    "torch.compile and activation checkpointing": {"shape": (2, 2), "compiled": "aot_eager", "checkpointing": True, "accumulation": 2},
    "cut experts": {"shape": (1, 2, 2), "accumulation": 2, "checkpointing": True},
    "cut experts and data parallelism": {"shape": (2, 1, 2)},
    "cut experts and FSDP2": {"shape": (2, 1, 2), "fsdp": True},
    "cut experts and DDP": {"shape": (2, 1, 2), "ddp": True},
    "experts without a network, data parallelism and accumulation": {"shape": (2, 2), "preset": "moe-plus-plus-7b", "accumulation": 2},
    "experts without a network and FSDP2": {"shape": (2, 2), "preset": "moe-plus-plus-7b", "fsdp": True},
    "experts without a network and DDP": {"shape": (2, 2), "preset": "moe-plus-plus-7b", "ddp": True},
    "cut experts and slots": {"shape": (1, 2, 2), "preset": "soft-moe-b16-128"},
}


def composition_checks(names: tuple[str, ...]) -> list[str]:
    """In one of four ranks: a language model after two steps, in every composition."""
    windows = np.random.default_rng(0).integers(0, 256, (2, 8, 13))
    failures = []
    for name in names:
        options = dict(COMPOSITIONS[name])
        shape, config = options.pop("shape"), presets.model(options.pop("preset", "deepseek-v3"), tiny=True)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "ep", "etp")[: len(shape)])
        expected = lm_steps(config, windows, None, accumulation=options.get("accumulation", 1))
        try:
            assert_same(lm_steps(config, windows, mesh, **options), expected, 1e-10)
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    return failures


@pytest.mark.slow
@pytest.mark.parametrize("some", [tuple(COMPOSITIONS)[:5], tuple(COMPOSITIONS)[5:7], tuple(COMPOSITIONS)[7:]], ids=["dp", "compile", "cut"])
def test_language_model_equals_one_process_in_every_composition(some: tuple[str, ...]) -> None:
    assert_good(run_ranks(4, composition_checks, some, deadline=400))


def whole_graph() -> str:
    """In a rank: what `fullgraph=True` says of a parallel layer."""
    moe = parallelize(MoE(CONFIGS["mixtral"]), cut_mesh(2, 2)["ep"])
    try:
        torch.compile(moe, fullgraph=True, backend="eager")(torch.ones(3, 6))
    except Exception as error:
        return str(error)
    return "no error"


@pytest.mark.slow
def test_one_graph_of_everything_is_refused_with_the_reason() -> None:
    for rank in run_ranks(4, whole_graph, deadline=120):
        assert NO_GRAPH in rank.result, rank


def test_a_token_goes_to_every_part_of_its_experts() -> None:
    going = outgoing(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[True, True], [True, False]]), Placement((0, 0, 1), 2, parts=2))
    assert going.crossings == [2, 2, 0, 0] and going.assignments == [3, 3, 0, 0]
    assert going.token_Q.tolist() == [0, 1, 0, 1] and going.token_N.tolist() == [0, 0, 1, 0, 0, 1]
    assert going.code_N.tolist() == [1, 2, 3, 1, 2, 3]
    assert Placement((0, 0, 1), 2, parts=2).local(3) == (2,) and Placement((0, 0, 1), 2, parts=2).ranks == 4


@dataclasses.dataclass(frozen=True)
class StrangeExperts(ExpertsConfig):
    """A config of a later version, with a field that expert parallelism has not heard of."""

    weightless: int = 0


def test_settings_that_nobody_thought_through_are_refused() -> None:
    config = CONFIGS["mixtral"]
    strange = dataclasses.replace(config)
    object.__setattr__(strange, "experts", StrangeExperts(8, 4))
    with pytest.raises(ValueError, match=r"knows no experts\.width"):
        check_supported(strange, "mlp")
    grown = dict(FIELDS) | {StrangeExperts: FIELDS[ExpertsConfig]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optimized.expert_parallel.limits.FIELDS", grown)
        check_supported(strange, "mlp")
        object.__setattr__(strange, "experts", StrangeExperts(8, 4, weightless=2))
        with pytest.raises(ValueError, match=r"knows no experts\.weightless, and the layer mlp has 2; known: count, width"):
            check_supported(strange, "mlp")
    other = dataclasses.replace(config)
    object.__setattr__(other, "gating", dataclasses.replace(config.gating))
    object.__setattr__(other.gating, "choice", "nearest")
    with pytest.raises(ValueError, match=r"the layer mlp has gating\.choice 'nearest'; supported: top_k"):
        check_supported(other, "mlp")


@pytest.mark.parametrize("config, parts, words", [
    (CONFIGS["mixtral"], 3, "experts.width is 4 in the layer mlp, which 3 ranks"),
    (dataclasses.replace(CONFIGS["biases"], experts=dataclasses.replace(CONFIGS["biases"].experts, width=4)), 4, "d_model is 5"),
])  # fmt: skip
def test_a_width_that_cannot_be_cut_is_refused(config: MoEConfig, parts: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_supported(config, "mlp", parts)


def test_what_is_refused_is_refused_by_parallelize_with_the_reason() -> None:
    for name in REFUSED:
        with pytest.raises(ValueError, match=r"expert parallelism knows no experts\.dropout, and the layer MoE has 0\.4"):
            parallelize(MoE(CONFIGS[name]), cast(Any, SimpleNamespace(ndim=1)))
    for config in (*SPREAD.values(), *map(presets.tiny, presets.names())):
        check_supported(config, "mlp")
