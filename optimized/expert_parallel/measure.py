"""Step times and traffic of one expert-parallel layer at several numbers of ranks: `python -m optimized.expert_parallel.measure`.

All ranks share this machine's cores, so times say what the exchange costs here, and nothing about machines with a core or a GPU per rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from reference import BalanceConfig, ExpertsConfig, GatingConfig, MoEConfig
from reference.cost import all_to_all_volume

from ..benchmarks import machine
from ..layer import MoE
from .gradients import clip_grad_norm_, optimizer_groups, sync_gradients
from .layer import groups_of, parallelize
from .placement import Placement
from .ranks import run_ranks

CONFIG = MoEConfig(
    256, gating=GatingConfig(top_k=8), experts=ExpertsConfig(64, 128, shared=1), balance=BalanceConfig((("expert_balance", 0.01),))
)
WARMUP, DEADLINE = 2, 300.0


def _step(moe: torch.nn.Module, optimizer: torch.optim.Optimizer, x_TD: torch.Tensor) -> Any:
    optimizer.zero_grad()
    y_TD, aux = moe(x_TD)
    (y_TD.square().mean() + aux.loss).backward()
    sync_gradients(moe)
    clip_grad_norm_(moe, 1.0)
    optimizer.step()
    return aux.routing


def measure_rank(tokens: int, repeats: int) -> dict[str, Any]:
    """In a rank: `tokens` tokens over all ranks together, `repeats` timed steps; the row of the table, on every rank."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    moe = parallelize(MoE(CONFIG, backend="torch"), init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))["ep"])
    (transport,) = groups_of(moe)
    optimizer = torch.optim.AdamW(optimizer_groups(moe), lr=1e-3)
    x_TD = torch.randn(tokens, CONFIG.d_model)[rank * tokens // ranks : (rank + 1) * tokens // ranks].requires_grad_()
    times, busy = [], []
    for repeat in range(WARMUP + repeats):
        transport.barrier("starting a step")
        sent, began, worked = transport.bytes_sent, time.perf_counter(), time.process_time()
        routing = _step(moe, optimizer, x_TD)
        worked = time.process_time() - worked
        transport.barrier("ending a step")
        if repeat >= WARMUP:
            times.append(time.perf_counter() - began)
            busy.append(worked)
    mine = transport.bytes_sent - sent, routing.expert.numpy(), routing.keep.numpy(), statistics.median(busy)
    everyone = transport.gather_objects(mine, "collecting results")
    expert_TK, keep_TK = (np.concatenate([theirs[part] for theirs in everyone]) for part in (1, 2))
    rank_T = np.repeat(np.arange(ranks), [len(theirs[1]) for theirs in everyone])
    owner_E = np.array(Placement.contiguous(CONFIG.experts.count, ranks).owner)
    volume = all_to_all_volume(expert_TK, keep_TK, rank_T, owner_E, CONFIG.d_model, ranks=ranks, itemsize=4)
    row = {"ranks": ranks, "step_ms": round(1e3 * statistics.median(times), 2), "fastest_ms": round(1e3 * min(times), 2)}
    row |= {"processor_ms": round(1e3 * sum(theirs[3] for theirs in everyone), 2)}
    row |= {"bytes_sent": sum(theirs[0] for theirs in everyone), "bytes_by_formula": volume.total}
    return row | {part: int(getattr(volume, part).sum()) for part in volume._fields}


def measure(sizes: list[int], tokens: int, repeats: int) -> dict[str, Any]:
    """The report: a row for each number of ranks, and where it was taken. Raises RuntimeError where a rank failed."""
    rows, before = [], machine.load_average()
    for ranks in sizes:
        first, *others = run_ranks(ranks, measure_rank, tokens, repeats, deadline=DEADLINE)
        for ended in (first, *others):
            if ended.result is None:
                raise RuntimeError(f"a rank of {ranks} failed: {ended.error or ended.exitcode}")
        rows.append(first.result)
    facts = machine.facts()
    remark = f"all ranks are processes of one thread on the same {facts['cores']} cores: more ranks than cores take turns"
    report = {"config": CONFIG.to_dict(), "tokens": tokens, "dtype": "float32", "repeats": repeats, "remark": remark, "machine": facts}
    return {**report, "load_average": {"before": before, "after": machine.load_average()}, "rows": rows}


def main() -> int:
    """Measure, print the rows as JSON and write them where --json says; 1 where traffic is not what the formula says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    report = measure(given.ranks, given.tokens, given.repeats)
    print(json.dumps(report["rows"], indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(row["bytes_sent"] != row["bytes_by_formula"] for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
