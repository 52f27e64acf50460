"""Expert parallelism equals one process: outputs, losses, every gradient, the norm, the next step, checkpoints; its traffic is counted."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import distributed_worker
import numpy as np
import pytest
import torch
import torch.distributed as dist
from configs import CONFIGS, VOCABULARY, random_params
from conftest import REPOSITORY
from distributed_worker import Task, all_state, counted_traffic, ep_mesh, layer_step, place_in, stepped
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh

from optimized import MoE as FastMoE
from optimized.comparison import rounded_to
from optimized.expert_parallel import (
    Placement,
    clip_grad_norm_,
    exchange,
    full_state_dict,
    gradients,
    layer,
    load_full_state_dict,
    load_sharded,
    parallelize,
    save_sharded,
    sync_gradients,
)
from optimized.expert_parallel.faults import DISAGREEMENTS, disagree
from optimized.expert_parallel.ranks import Ended, run_ranks
from reference import MoEConfig, cost, moe_forward, presets
from reference.autograd import MoE
from reference.proof.cases import CASES, Inputs, draw
from reference.proof.equal import Tolerance, assert_equal, rms

INTEGERS = ("expert", "keep", "load")
FLOAT64_LIMIT = 1e-12


REFUSED = ("expert-dropout",)
"""Layers that `parallelize` does not take; what it says has a test of its own."""
SPREAD = {name: config for name, config in CONFIGS.items() if name not in REFUSED}
CLASSES: dict[str, Callable[..., torch.nn.Module]] = {"reference": MoE, "fast": partial(FastMoE, backend="torch")}


def trained_task(config: MoEConfig, dtype: str, spread: str, tokens: int = 41) -> Task:
    """A layer with its own router in training, on tokens in eight groups with some padding; noise comes from a recorded routing."""
    rng = np.random.default_rng(3)
    params = {
        name: array if array.dtype.kind == "i" else np.asarray(array, np.float64) for name, array in random_params(config, rng).items()
    }
    x_TD, dy_TD = rng.standard_normal((2, tokens, config.d_model))
    pad_mask = rng.random(tokens) < 0.1
    groups = np.arange(tokens) * 8 // max(tokens, 1)
    arguments: dict[str, Any] = {"group_ids": groups, "pad_mask": pad_mask, "token_ids": rng.integers(0, VOCABULARY, tokens)}
    recorded = moe_forward(x_TD, params, config, training=True, rng=rng, **arguments)[0].routing
    inputs = rounded_to(Inputs(config, x_TD, dy_TD, params, recorded, pad_mask), dtype)
    if dtype != "float64":
        recorded = moe_forward(inputs.x, inputs.params, config, training=True, rng=rng, **arguments)[0].routing
    # Without noise the layer decides by itself, and has to decide alike everywhere.
    replay = recorded if recorded.draws or dtype != "float64" else None
    return Task(inputs, groups, arguments["token_ids"], spread, True, replay)


def widened(config: MoEConfig) -> MoEConfig:
    """The same router with wider experts: an error statistic needs more than a handful of elements."""
    return dataclasses.replace(config, d_model=24, experts=dataclasses.replace(config.experts, width=16))


def case_task(name: str, dtype: str, spread: str) -> Task:
    """A case of the proof with the routing that it gives, in evaluation."""
    inputs = rounded_to(draw(next(case for case in CASES if case.name == name)), dtype)
    groups = np.arange(len(inputs.x)) * 8 // max(len(inputs.x), 1)
    return Task(inputs, groups, np.zeros_like(groups), spread, False, inputs.routing)


def compare(found: dict[str, np.ndarray], single: Callable[[str], dict[str, np.ndarray]], dtype: str) -> None:
    """AssertionError unless `found` equals one process: to rounding in float64, by the policy of the proof in other dtypes."""
    truth = single("float64")
    for name in INTEGERS:
        np.testing.assert_array_equal(found[name], truth[name], err_msg=name)
    if dtype == "float64":
        for name, expected in truth.items():
            error = np.abs(found[name] * 1.0 - expected).max(initial=0)
            assert error <= FLOAT64_LIMIT * max(1.0, rms(expected)), f"{name}: {error:.3g}"
        return
    eager, tolerance = single(dtype), Tolerance(dtype)
    # The RMS bound is one of many elements; a correctly rounded scalar can break it.
    scalars = [name for name in truth if not truth[name].ndim]
    for name in scalars:
        bound = tolerance.max_bound(abs(eager[name] - truth[name]), abs(truth[name]))
        assert abs(found[name] - truth[name]) <= bound, f"{name}: {found[name]} instead of {truth[name]}, bound {bound:.3g}"
    names = [name for name in truth if name not in (*INTEGERS, *scalars)]
    assert_equal({n: found[n] for n in names}, {n: truth[n] for n in names}, {n: eager[n] for n in names}, dtype)


Check = tuple[str, int, Callable[[], None]]


def layer_check(task: Callable[[], Task], dtype: str, class_name: str, ranks: int, mesh: DeviceMesh | None = None) -> None:
    """Run a task on a mesh (None: that of `ranks`) and on one process, and compare on the group's first rank."""
    mesh, given = mesh or ep_mesh(ranks), task()
    found = layer_step(given, dtype, CLASSES[class_name], mesh)
    if place_in(mesh) == 0:
        compare(found, lambda kind: layer_step(given, kind, MoE, None), dtype)


def layer_checks() -> dict[str, Callable[[int], None]]:
    """Name → check on that many ranks."""
    checks = {}
    for number, (name, config) in enumerate(SPREAD.items()):
        spread = ("even", "first_empty", "one_full")[number % 3]
        class_name = ("reference", "fast")[number % 2]
        checks[f"{name}, {spread}, {class_name}"] = partial(
            layer_check, partial(trained_task, config, "float64", spread), "float64", class_name
        )
    for name in ("mixtral", "deepseek-v3", "biases", "moe++", "soft"):
        for number, dtype in enumerate(("float32", "bfloat16")):
            task = partial(trained_task, widened(CONFIGS[name]), dtype, "even", 96)
            checks[f"{name}, {dtype}"] = partial(layer_check, task, dtype, ("reference", "fast")[number])
    names = ("no-tokens", "one-token", "prime-experts", "top-all", "one-expert", "one-takes-all", "empty-experts", "padding", "drops")
    for number, name in enumerate(names):
        class_name = ("reference", "fast")[number % 2]
        checks[f"{name}, {class_name}"] = partial(layer_check, partial(case_task, name, "float64", "even"), "float64", class_name)
    for name in ("biases", "moe++", "soft"):
        checks[f"{name}, no tokens in training"] = partial(
            layer_check, partial(trained_task, CONFIGS[name], "float64", "even", 0), "float64", "reference"
        )
    return checks


def run_checks(checks: dict[str, Callable[[int], None]], sizes: tuple[int, ...]) -> list[str]:
    """In a rank: all checks on all sizes; what failed here. Where several groups fit, each does its share of the checks."""
    failures = []
    for ranks in sizes:
        mesh, share, shares = ep_mesh(ranks), dist.get_rank() // ranks, dist.get_world_size() // ranks
        assert mesh.size() == ranks
        for number, (name, check) in enumerate(checks.items()):
            if number % shares == share:
                try:
                    check(ranks)
                except AssertionError as error:
                    failures.append(f"{ranks} ranks, {name}: {error}")
        dist.barrier()
    return failures


def assert_good(ended: list[Ended]) -> None:
    assert not [rank.trace for rank in ended if rank.error], ended[0].trace
    assert [rank.exitcode for rank in ended] == [0] * len(ended)
    assert not [failure for rank in ended for failure in rank.result]


def all_checks(sizes: tuple[int, ...]) -> list[str]:
    """In a rank: everything that needs no process group of its own."""
    return run_checks({"traffic": traffic_check, "disagreement": disagreement_check, "teeth": teeth_check} | layer_checks(), sizes)


def fast_checks() -> list[str]:
    """The same, every layer on two ranks and a part of them on one and on four."""
    special = {"traffic": traffic_check, "disagreement": disagreement_check, "teeth": teeth_check}
    layers = layer_checks()
    failures = run_checks(special | layers, (2,))
    failures += run_checks(special | dict(list(layers.items())[::3]), (4,))
    return failures + run_checks(dict(list(layers.items())[::4]), (1,))


def teeth_check(ranks: int) -> None:
    """The comparison rejects what goes wrong in published code: on every mutation one rank's part is taken for the whole."""
    mesh = ep_mesh(ranks)

    def gradient_of_the_sum(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None

    def no_gate_gradient(ctx: Any, *cotangents: Any) -> tuple[torch.Tensor, None]:
        return receive_backward(ctx, cotangents[0], torch.zeros_like(cotangents[1]), None)

    def no_row_gradient(ctx: Any, *cotangents: Any) -> tuple[torch.Tensor, None]:
        return receive_backward(ctx, torch.zeros_like(cotangents[0]), cotangents[1], None)

    receive_backward = exchange._Receive.backward
    mutations: dict[str, tuple[Any, ...]] = {
        "losses and load of one rank": (layer.Ranks, "total", lambda self, tensor: tensor),
        "experts' gradient of the sum": (layer._MeanGradient, "backward", staticmethod(gradient_of_the_sum)),
        "norm of one rank": (gradients, "_over_mesh", lambda square, key, transport: square),
        "no gradient for gates of other ranks": (exchange._Receive, "backward", staticmethod(no_gate_gradient)),
        "router's gradient of one rank": (distributed_worker, "sync_gradients", lambda module: None),
        "moe++: no answer of experts without a network": (layer.ExpertParallel, "_with_own", lambda self, y_TD, *_: y_TD),
        "soft: no gradient for slots of other ranks": (exchange._Receive, "backward", staticmethod(no_row_gradient)),
    }
    for name, mutation in mutations.items() if ranks == 2 else ():
        config, _, _ = name.rpartition(": ")
        task = trained_task(CONFIGS[config or "biases"], "float64", "even")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*mutation)
            found = layer_step(task, "float64", MoE, mesh)
        if mesh.get_local_rank() == 0:
            try:
                compare(found, lambda kind, given=task: layer_step(given, kind, MoE, None), "float64")
            except AssertionError:
                continue
            raise AssertionError(f"not noticed: {name}")


def traffic_check(ranks: int) -> None:
    """Bytes of every all-to-all equal the formula, and the formula is the least that the routing allows."""
    mesh = ep_mesh(ranks)
    for name in ("token-major", "moe++", "soft"):
        for dtype, itemsize, gate_itemsize in (("float64", 8, 8), ("float32", 4, 4), ("bfloat16", 2, 4)):
            task = trained_task(CONFIGS[name], dtype, "first_empty")
            with counted_traffic() as calls:
                outputs = layer_step(task, dtype, MoE, mesh)
            travelling = slots_of(task, ranks) if name == "soft" else (outputs["expert"], outputs["keep"], task.rank_of_token(ranks))
            check_traffic(calls, *travelling, CONFIGS[name], itemsize, gate_itemsize, mesh)


def slots_of(task: Task, ranks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(expert, keep, rank) of Soft MoE's slots, which travel as tokens do: C for each expert and each group, on the group's rank."""
    experts, slots = task.inputs.config.experts.count, task.inputs.config.gating.slots
    groups, first_T = np.unique(task.groups, return_index=True)
    expert_N1 = np.tile(np.arange(experts).repeat(slots), len(groups))[:, None]
    return expert_N1, np.ones_like(expert_N1, bool), task.rank_of_token(ranks)[first_T].repeat(experts * slots)


def check_traffic(
    calls: list[tuple[int, ...]], expert_TK: np.ndarray, keep_TK: np.ndarray, rank_T: np.ndarray,
    config: MoEConfig, itemsize: int, gate_itemsize: int, mesh: DeviceMesh,
) -> None:  # fmt: skip
    """AssertionError unless this rank has sent what the formula says, and the formula says the least number of rows."""
    ranks, rank = mesh.size(), mesh.get_local_rank()
    owner_E = np.array(Placement.contiguous(config.experts.networks, ranks).owner)
    volume = cost.all_to_all_volume(
        expert_TK, keep_TK, rank_T, owner_E, config.d_model, ranks=ranks, itemsize=itemsize, gate_itemsize=gate_itemsize
    )
    sent = [[size if other != rank else 0 for other, size in enumerate(call)] for call in calls]
    expected = [volume.dispatch, volume.combine, volume.combine_gradient, volume.dispatch_gradient]
    assert sent == [part[rank].tolist() for part in expected], f"{itemsize} bytes: {sent}"
    chosen = [(t, expert_TK[t, k]) for t, k in zip(*np.nonzero(keep_TK), strict=True)]
    crossings = {(t, owner_E[expert]) for t, expert in chosen if expert < config.experts.networks}
    least = sum(owner != rank_T[t] for t, owner in crossings) * config.d_model * itemsize
    assert volume.combine.sum() == volume.combine_gradient.sum() == least


def disagreement_check(ranks: int) -> None:
    """Where ranks differ, every one of them raises an error that says in what, and none is left waiting."""
    if ranks == dist.get_world_size() > 1:  # once is enough; on one rank nobody can disagree
        for name, seen in disagree().items():
            assert "disagree" in seen and DISAGREEMENTS[name] in seen, f"{name}: {seen}"


def test_layers_on_1_2_and_4_ranks_equal_one_process() -> None:
    assert_good(run_ranks(4, fast_checks, deadline=240))


@pytest.mark.slow
def test_every_layer_on_1_and_4_ranks_equals_one_process() -> None:
    assert_good(run_ranks(4, all_checks, (4, 1), deadline=600))


@pytest.mark.slow
def test_every_layer_on_8_ranks_equals_one_process() -> None:
    assert_good(run_ranks(8, all_checks, (8,), deadline=600))


def preset_checks(sizes: tuple[int, ...]) -> list[str]:
    """In one of four ranks: every published model's layer, without an exception."""
    checks = {}
    for number, name in enumerate(presets.names()):
        task = partial(trained_task, presets.tiny(name), "float64", ("even", "first_empty", "one_full")[number % 3])
        checks[name] = partial(layer_check, task, "float64", "fast")
    return run_checks(checks, sizes)


def test_every_preset_on_2_ranks_equals_one_process() -> None:
    assert_good(run_ranks(4, preset_checks, (2,), deadline=240))


@pytest.mark.slow
def test_every_preset_on_4_ranks_and_on_1_equals_one_process() -> None:
    assert_good(run_ranks(4, preset_checks, (4, 1), deadline=600))


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], limit: float) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        error = np.abs(found[name] - array).max(initial=0)
        assert error <= limit * max(1.0, rms(array)), f"{name}: {error:.3g}"


def checkpoint_checks(folder: str, name: str) -> list[str]:
    """In one of four ranks: write on 4 ranks, read on 4, 2 and 1 and without ranks; and back."""
    failures, config = [], CONFIGS[name]
    moe, optimizer = stepped(config, ep_mesh(4), 1, 2)
    expected = all_state(moe, optimizer)
    path = save_sharded(Path(folder, "step-2"), moe, optimizer, step=2)
    for ranks in (4, 2, 1, None):
        other, other_optimizer = stepped(config, None if ranks is None else ep_mesh(ranks), 2, 1)
        extra = load_sharded(path, other, other_optimizer, step=0)
        found = all_state(other, other_optimizer)
        wrong = [name for name in expected if not torch.equal(found[name], expected[name])] + [f"step {extra}"] * (extra != {"step": 2})
        failures += [f"{ranks} ranks: {name}" for name in wrong]
    safetensors = Path(folder, f"{dist.get_rank()}.safetensors")
    save_file(full_state_dict(moe), safetensors)
    alone = MoE(config)
    alone.load_state_dict(load_file(safetensors))
    again, _ = stepped(config, ep_mesh(2), 3, 0)
    load_full_state_dict(again, load_file(safetensors))
    for name, tensor in full_state_dict(again).items():
        failures += [f"safetensors: {name}"] * (
            not torch.equal(tensor, expected[name]) or not torch.equal(alone.state_dict()[name], tensor)
        )
    failures += _refusals(path, moe, optimizer)
    return failures


def _refusals(path: Path, moe: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """A checkpoint is never overwritten, one that was cut off is none, and what it left behind does not hinder the next."""
    failures = []
    cut_off = path.with_name("step-3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        try:
            save_sharded(cut_off, moe, optimizer)
            failures.append("a rename that failed was not reported")
        except (OSError, RuntimeError):
            pass
    for words, act in {
        "exists already": lambda: save_sharded(path, moe, optimizer),
        "no whole distributed checkpoint": lambda: load_sharded(cut_off, moe, optimizer),
        "lacks the tensor 'router.weight'": lambda: load_full_state_dict(moe, {}),
    }.items():
        try:
            act()
            failures.append(f"not refused: {words}")
        except ValueError as error:
            failures += [str(error)] * (words not in str(error))
    save_sharded(cut_off, moe, optimizer)
    failures += ["the second attempt left its temporary directory"] * any(entry.name.endswith(".tmp") for entry in path.parent.iterdir())
    return failures


@pytest.mark.parametrize("name", ["deepseek-v3", "moe++"])
def test_checkpoints_fit_any_number_of_ranks(name: str, tmp_path: Path) -> None:
    assert_good(run_ranks(4, checkpoint_checks, str(tmp_path), name, deadline=120))


def test_volume_of_a_routing_worked_out_by_hand() -> None:
    # Tokens 0, 1 on rank 0, token 2 on rank 1; experts 0, 1 on rank 0, 2, 3 on rank 1.
    expert_TK = np.array([[2, 3], [0, 2], [1, 0]])
    keep_TK = np.array([[True, True], [True, False], [True, True]])
    volume = cost.all_to_all_volume(
        expert_TK, keep_TK, np.array([0, 0, 1]), np.array([0, 0, 1, 1]), 16, ranks=2, itemsize=2, gate_itemsize=4
    )
    # Token 0 crosses once with two gates, token 1's second choice was dropped, token 2 crosses once with two gates.
    assert volume.dispatch.tolist() == [[0, 32 + 2 * 8], [32 + 2 * 8, 0]]
    assert volume.combine.tolist() == volume.combine_gradient.tolist() == [[0, 32], [32, 0]]
    assert volume.dispatch_gradient.tolist() == [[0, 32 + 2 * 4], [32 + 2 * 4, 0]]
    assert volume.total == 2 * (48 + 32 + 32 + 40)
    # Were expert 3 without a network, token 0 would cross with one gate, and nothing would change for the others.
    without = cost.all_to_all_volume(expert_TK, keep_TK, np.array([0, 0, 1]), np.array([0, 0, 1]), 16, ranks=2, itemsize=2, gate_itemsize=4)
    assert without.dispatch.tolist() == [[0, 32 + 8], [32 + 2 * 8, 0]] and without.combine.tolist() == volume.combine.tolist()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"keep_TK": np.ones((3, 1), bool)}, r"keep has shape \(3, 1\), expert \(3, 2\)"),
        ({"rank_T": np.zeros(2, int)}, r"rank has shape \(2,\); there are 3 tokens"),
        ({"rank_T": np.array([0, 1, 2])}, "rank names ranks 0 … 2; there are 2"),
        ({"owner_E": np.array([0, -1])}, "owner names ranks -1 … 0; there are 2"),
    ],
)
def test_volume_refuses(changes: dict[str, np.ndarray], words: str) -> None:
    arguments = {
        "expert_TK": np.zeros((3, 2), int),
        "keep_TK": np.ones((3, 2), bool),
        "rank_T": np.zeros(3, int),
        "owner_E": np.zeros(2, int),
    }
    with pytest.raises(ValueError, match=words):
        cost.all_to_all_volume(**(arguments | changes), d_model=4, ranks=2)


@pytest.mark.parametrize(
    "experts, ranks, counts", [(8, 4, [2, 2, 2, 2]), (7, 4, [2, 2, 2, 1]), (5, 4, [2, 2, 1, 0]), (3, 8, [1, 1, 1] + [0] * 5)]
)
def test_contiguous_placement_is_that_of_a_chunked_stack(experts: int, ranks: int, counts: list[int]) -> None:
    placement = Placement.contiguous(experts, ranks)
    assert [len(placement.local(rank)) for rank in range(ranks)] == counts
    assert [list(chunk) for chunk in torch.arange(experts).chunk(ranks)] == [
        list(placement.local(rank)) for rank in range(ranks) if counts[rank]
    ]


def test_places_of_a_scattered_placement() -> None:
    owner_E, place_E = Placement((1, 0, 1, 0, 1), 3).tables
    assert owner_E.tolist() == [1, 0, 1, 0, 1] and place_E.tolist() == [0, 0, 1, 1, 2]


def test_placement_refuses_a_rank_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="expert 1 is placed on rank 2; there are 2 ranks"):
        Placement((0, 2), 2)
    with pytest.raises(ValueError, match="ranks is 0"):
        Placement.contiguous(4, 0)


def scattered_check() -> list[str]:
    """The dispatcher asks only the placement where experts are: scattered ones give the same output."""
    moe, mesh = MoE(CONFIGS["token-major"], dtype=torch.float64).eval(), ep_mesh(2)
    for parameter in moe.parameters():
        dist.broadcast(parameter.data, 0)
    torch.manual_seed(dist.get_rank())
    x_TD = torch.randn(9, 6, dtype=torch.float64)
    expected = moe(x_TD)[0]
    spread = copy.deepcopy(moe)
    parallelize(spread, mesh)
    owner = tuple((0, 1, 1, 0, 1, 0, 0, 1))
    spread.parallel.placement = Placement(owner, 2)
    own = list(spread.parallel.placement.local(mesh.get_local_rank()))
    with torch.no_grad():
        for name, stack in spread.get_submodule("experts").named_parameters():
            stack.to_local().copy_(moe.get_parameter(f"experts.{name}")[own])
    return [] if torch.allclose(spread(x_TD)[0], expected, rtol=1e-13, atol=1e-13) else ["another output"]


@pytest.mark.slow
def test_any_placement_gives_the_same_output() -> None:
    assert_good(run_ranks(2, scattered_check, deadline=60))


class OneRank:
    """A mesh of a single rank, as far as arguments are checked before anything is sent."""

    ndim = 3


@pytest.mark.parametrize("module, mesh, words", [
    (torch.nn.Linear(2, 2), None, "Linear holds no MoE"),
    (MoE(CONFIGS["mixtral"]), OneRank(), r"mesh has 3 dimensions; take one of them, as in mesh\['ep'\], or two"),
])  # fmt: skip
def test_parallelize_refuses(module: torch.nn.Module, mesh: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parallelize(module, mesh)


def test_functions_for_parallel_modules_refuse_others() -> None:
    for function in (sync_gradients, lambda module: clip_grad_norm_(module, 1.0)):
        with pytest.raises(ValueError, match="MoE holds no expert-parallel layer: call parallelize first"):
            function(MoE(CONFIGS["mixtral"]))


@pytest.mark.slow
def test_measurement_counts_what_the_formula_says(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "optimized.expert_parallel.measure", "--ranks", "1", "2", "--tokens", "48", "--repeats", "1"]
    subprocess.run([*command, "--json", str(tmp_path / "report.json")], check=True, timeout=300, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    alone, pair = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert alone["bytes_sent"] == 0 < pair["bytes_sent"] == pair["bytes_by_formula"]
    assert pair["step_ms"] > 0
