"""The counting sort, the tables of tiles and the reconstruction in the backward, each against NumPy, exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from kernel_checks import DEVICE

from optimized.kernels import blocks, launch
from reference.dispatch import dispatch_forward
from reference.proof.cases import CASES, Case, draw


def given(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    routing = draw(case).routing
    return torch.from_numpy(routing.expert).to(DEVICE), torch.from_numpy(routing.keep).to(DEVICE)


def expected_tiles(bounds: np.ndarray, end: int, height: int) -> tuple[int, list[tuple[int, int]]]:
    """(tiles of experts, all tiles as (bucket, first row)), the last bucket being the dropped assignments."""
    edges = [*bounds.tolist(), end]
    tiles = [(bucket, row) for bucket in range(len(edges) - 1) for row in range(edges[bucket], edges[bucket + 1], height)]
    return sum(bucket < len(bounds) - 1 for bucket, _ in tiles), tiles


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sort_and_tiles(case: Case) -> None:
    expert_TK, keep_TK = given(case)
    heights = (16, 32)
    schedule = launch.sort_by_expert(expert_TK, keep_TK, case.E, *heights)
    order, place, bounds = (tensor.cpu().numpy() for tensor in (schedule.order, schedule.place, schedule.bounds))
    _, cache = dispatch_forward(np.zeros((case.T, 1)), expert_TK.cpu().numpy(), keep_TK.cpu().numpy(), case.E)
    kept = len(cache.token_N)
    np.testing.assert_array_equal(bounds, cache.bounds_P)
    np.testing.assert_array_equal(order[:kept], cache.token_N * case.K + cache.slot_N)
    np.testing.assert_array_equal(order[kept:], np.flatnonzero(~keep_TK.cpu().numpy()))
    np.testing.assert_array_equal(place[order], np.arange(case.T * case.K))
    for height in heights:
        live, tiles = expected_tiles(bounds, case.T * case.K, height)
        table = schedule.tiles[height].cpu().numpy()
        assert len(tiles) <= len(table) - 1
        assert table[0].tolist() == [live, len(tiles)]
        assert table[1 : len(tiles) + 1].tolist() == [list(tile) for tile in tiles]


@pytest.mark.parametrize("name", ["no-tokens", "one-token", "drops", "prime-experts", "many-tokens"])
def test_restored_schedule(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    expert_TK, keep_TK = given(case)
    first = launch.sort_by_expert(expert_TK, keep_TK, case.E, 32)
    again = launch.restore_schedule(first.order, first.bounds, 32, 64)
    assert torch.equal(again.place, first.place)
    bounds = first.bounds.cpu().numpy()
    for height, table in again.tiles.items():
        live, tiles = expected_tiles(bounds, int(bounds[-1]), height)
        assert table[0].tolist() == [live, live]
        assert table[1 : live + 1].tolist() == [list(tile) for tile in tiles]


def test_many_blocks_of_few_assignments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and chunks far smaller than the batch: the prefix runs through many of both."""
    monkeypatch.setattr(launch, "sort_block", lambda buckets: 16)
    monkeypatch.setattr(launch, "scan_chunk", lambda buckets: 4)
    expert_TK = torch.randint(0, 5, (120, 2), device=DEVICE)
    schedule = launch.sort_by_expert(expert_TK, torch.ones_like(expert_TK, dtype=torch.bool), 5, 16)
    assert torch.equal(schedule.order.long(), torch.sort(expert_TK.flatten(), stable=True).indices)


def test_an_id_that_names_no_expert_is_a_dropped_assignment() -> None:
    expert_TK = torch.tensor([[0, 5], [-1, 2], [2**40, 1], [2, -(2**40)]], device=DEVICE)
    schedule = launch.sort_by_expert(expert_TK, torch.ones_like(expert_TK, dtype=torch.bool), 3, 16)
    assert schedule.bounds.tolist() == [0, 1, 2, 4]
    assert schedule.order.tolist() == [0, 5, 3, 6, 1, 2, 4, 7]


def test_inputs_may_have_any_strides_and_integer_dtype() -> None:
    expert_TK = torch.randint(0, 4, (3, 50), device=DEVICE, dtype=torch.int32).T
    keep_TK = torch.ones(50, 1, dtype=torch.bool, device=DEVICE).expand(50, 3)
    schedule = launch.sort_by_expert(expert_TK, keep_TK, 4, 16)
    assert torch.equal(schedule.order.long(), torch.sort(expert_TK.flatten(), stable=True).indices)


@pytest.mark.parametrize("experts", [1, 7, 64, 300])
def test_the_bound_on_the_number_of_tiles_holds_for_the_worst_load(experts: int) -> None:
    for assignments in (0, 1, 15, 16, 17, 1000):
        rows = np.zeros(experts + 1, np.int64)
        rows[: min(assignments, experts + 1)] = 1
        rows[0] += assignments - rows.sum()
        assert np.ceil(rows / 16).sum() <= launch.most_tiles(assignments, experts, 16)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="2049 experts; the sort counts at most 2048"):
        launch.sort_by_expert(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool), 2049, 16)
    with pytest.raises(ValueError, match="do not fit into 32-bit places"):
        expert_TK = torch.zeros(1, 1, dtype=torch.int64).expand(2**30, 4)
        launch._check_size(expert_TK.numel(), 4)


def test_counters_stay_within_their_budget() -> None:
    for experts in (1, 8, 64, 127, 256, 511, 2048):
        buckets = blocks.power_of_2(experts + 1, 16)
        assert blocks.sort_block(buckets) * buckets <= max(blocks.COUNTERS, 16 * buckets)
