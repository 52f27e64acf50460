"""Expert parallelism on `torch.distributed`: the experts of every MoE spread over ranks, equal to one process.

    # before the optimizer is made, for
    # experts' parameters become DTensors
    parallelize(model, mesh["ep"])
    groups = optimizer_groups(model)
    optimizer = torch.optim.AdamW(groups)
    ...
    (task_loss + aux.loss).backward()
    sync_gradients(model)
    clip_grad_norm_(model, 1.0)
    optimizer.step()

The objective is the mean over ranks of each rank's loss, as in data parallelism: a rank adds `aux.loss`, which is that of the whole batch
on every rank, to the mean over its own tokens (times R·T_rank / T where the ranks' tokens differ in number). After `sync_gradients`
every gradient is that of the mean, so it equals one process that saw all tokens.
All ranks make the same calls in the same order, backward passes included, also a rank without tokens.

Together with: a second mesh dimension that cuts each expert, `mesh["ep", "etp"]`; replicas, `data=mesh["dp"]`, by themselves or under
FSDP2 or DistributedDataParallel; accumulation; activation checkpointing; `torch.compile` of what is around the layers (a layer itself is
no graph, for it raises where ranks disagree, and `fullgraph=True` says so). Layers that `limits` does not list are refused.
Start with `torchrun`, whose store outlives a rank, so that every other rank can name the one that was lost.
"""

from .checkpoints import full_state_dict, load_full_state_dict, load_sharded, save_sharded
from .gradients import clip_grad_norm_, optimizer_groups, sync_gradients
from .layer import parallelize
from .placement import Placement
from .transport import DisagreementError, RankLostError

__all__ = [
    "DisagreementError", "Placement", "RankLostError", "clip_grad_norm_", "full_state_dict", "load_full_state_dict", "load_sharded",
    "optimizer_groups", "parallelize", "save_sharded", "sync_gradients",
]  # fmt: skip
