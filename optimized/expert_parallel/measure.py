"""Step times and traffic of one expert-parallel layer at several numbers of ranks: `python -m optimized.expert_parallel.measure`.

All ranks share this machine's cores, so times say what the exchange costs here, and nothing about machines with a core or a GPU per rank.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

from reference import BalanceConfig, ExpertsConfig, GatingConfig, MoEConfig
from reference.cost import all_to_all_volume

from ..layer import MoE
from .gradients import clip_grad_norm_, optimizer_groups, sync_gradients
from .layer import groups_of, parallelize
from .placement import Placement

CONFIG = MoEConfig(
    256, gating=GatingConfig(top_k=8), experts=ExpertsConfig(64, 128, shared=1), balance=BalanceConfig((("expert_balance", 0.01),))
)
WARMUP = 2


def _step(moe: torch.nn.Module, optimizer: torch.optim.Optimizer, x_TD: torch.Tensor) -> Any:
    optimizer.zero_grad()
    y_TD, aux = moe(x_TD)
    (y_TD.square().mean() + aux.loss).backward()
    sync_gradients(moe)
    clip_grad_norm_(moe, 1.0)
    optimizer.step()
    return aux.routing


def measure_rank(rank: int, ranks: int, port: int, tokens: int, repeats: int, out: str) -> None:
    """What one rank does: `tokens` tokens over all ranks together, `repeats` timed steps; rank 0 writes the row to `out`."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(minutes=2))
    torch.manual_seed(0)
    moe = parallelize(MoE(CONFIG, backend="torch"), init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))["ep"])
    (transport,) = groups_of(moe)
    optimizer = torch.optim.AdamW(optimizer_groups(moe), lr=1e-3)
    x_TD = torch.randn(tokens, CONFIG.d_model)[rank * tokens // ranks : (rank + 1) * tokens // ranks].requires_grad_()
    times = []
    for repeat in range(WARMUP + repeats):
        transport.barrier("starting a step")
        sent, began = transport.bytes_sent, time.perf_counter()
        routing = _step(moe, optimizer, x_TD)
        transport.barrier("ending a step")
        times += [time.perf_counter() - began] if repeat >= WARMUP else []
    everyone = transport.gather_objects((transport.bytes_sent - sent, routing.expert.numpy(), routing.keep.numpy()), "collecting results")
    if rank == 0:
        expert_TK, keep_TK = (np.concatenate([theirs[part] for theirs in everyone]) for part in (1, 2))
        rank_T = np.repeat(np.arange(ranks), [len(theirs[1]) for theirs in everyone])
        owner_E = np.array(Placement.contiguous(CONFIG.experts.count, ranks).owner)
        volume = all_to_all_volume(expert_TK, keep_TK, rank_T, owner_E, CONFIG.d_model, ranks=ranks, itemsize=4)
        row = {"ranks": ranks, "step_ms": round(1e3 * statistics.median(times), 2), "fastest_ms": round(1e3 * min(times), 2)}
        row |= {"bytes_sent": sum(theirs[0] for theirs in everyone), "bytes_by_formula": volume.total}
        row |= {part: int(getattr(volume, part).sum()) for part in volume._fields}
        Path(out).write_text(json.dumps(row), encoding="utf-8")
    transport.barrier("leaving")
    dist.destroy_process_group()


def main() -> int:
    """Measure, print the rows as JSON and write them where --json says; 1 where traffic is not what the formula says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for ranks in given.ranks:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "row.json")
            spawn(measure_rank, (ranks, port, given.tokens, given.repeats, str(out)), nprocs=ranks)
            rows.append(json.loads(out.read_text(encoding="utf-8")))
    busy = {"cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 2)}
    report = {"tokens": given.tokens, "dtype": "float32", **busy, "config": CONFIG.to_dict(), "rows": rows}
    text = json.dumps(report, indent=1)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")
    return int(any(row["bytes_sent"] != row["bytes_by_formula"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
