"""One process of `moebius train --nproc N`, as torchrun starts it: `python -m optimized.expert_parallel.worker SETTINGS`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.elastic.multiprocessing.errors import record

from reference.autograd.checkpoints import export, write_atomically
from reference.autograd.training import TrainConfig, heldout_bits, train
from reference.autograd.transformer import LanguageModel
from reference.model_config import ModelConfig

from ..comparison import plain
from ..tour import open_corpus
from ..tracks import select
from .checkpoints import full_state_dict, on_rank_0
from .training import Processes

TIMEOUT = timedelta(minutes=10)
# To meet is a matter of seconds; where it fails, torchrun starts everybody again.
JOIN_TIMEOUT = timedelta(seconds=60)


def end_with_parent(interval: float = 1.0) -> None:
    """End this process at most `interval` seconds after the one that started it: nobody else would, where that was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(interval)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run(settings: dict[str, Any]) -> None:
    """Train; rank 0 writes the model, and beside the settings what the command prints."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))["ep"]
    model_config, train_config = ModelConfig.from_dict(settings["model"]), TrainConfig.from_dict(settings["train"])
    processes, out = Processes(mesh), Path(settings["out"])
    (track,) = select(settings["track"])
    corpus, _ = open_corpus()
    resume = settings["resume"] or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    moe_class: Any = track.moe_class
    result = train(model_config, train_config, corpus, moe_class=moe_class, out=out, resume=resume, processes=processes)
    state = full_state_dict(result.model)

    def finish() -> None:
        model = LanguageModel(model_config, moe_class=moe_class, dtype=result.model.norm.weight.dtype)
        model.load_state_dict(state)
        path = export(out / "model.safetensors", model, record=result.record)
        bits = heldout_bits(model.eval(), corpus, train_config.length, train_config.heldout, train_config.batch)
        data = {"model": str(path), "heldout": bits, **result.record, "model_config": model_config.to_dict(), "ranks": processes.summary()}
        write_atomically(Path(settings["result"]), json.dumps(plain(data)).encode())

    on_rank_0(finish, processes.transport, "writing the model")


@record
def main() -> None:
    """Join the group that torchrun describes in the environment, and train."""
    end_with_parent()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    host, port, attempt = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"))
    # The store outlives a restart: without a name of its own an attempt could read addresses of processes that are gone.
    agents = dist.TCPStore(host, int(port), is_master=False, timeout=JOIN_TIMEOUT)  # pyright: ignore[reportPrivateImportUsage]
    store = dist.PrefixStore(f"attempt-{attempt}", agents)  # pyright: ignore[reportPrivateImportUsage]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=JOIN_TIMEOUT)
    _set_pg_timeout(TIMEOUT)
    try:
        run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    finally:
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Threads of the network that end after the interpreter abort the process, although all is done and written.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
