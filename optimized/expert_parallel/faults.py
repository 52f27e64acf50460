"""What every rank sees when one of them dies, hangs or does something else: `python -m optimized.expert_parallel.faults --json FILE`.

A fault is put in by replacing a function of the rank that commits it; the others run what everybody runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from reference import BalanceConfig, ExpertsConfig, GatingConfig, MoEConfig
from reference.autograd import MoE

from . import layer
from .gradients import sync_gradients
from .layer import parallelize
from .plan import Outgoing, outgoing
from .ranks import Ended, run_ranks
from .transport import DisagreementError, RankLostError, Transport

RANKS, TIMEOUT, START_SECONDS = 3, 5.0, 120.0
CONFIG = MoEConfig(
    6,
    gating=GatingConfig(top_k=3),
    experts=ExpertsConfig(7, 3, shared=2),
    balance=BalanceConfig((("expert_balance", 0.001), ("sequence_balance", 0.01))),
)


def leave() -> None:
    """End at once, as after a fatal error of a library."""
    os._exit(3)


def kill() -> None:
    """End as the kernel ends a process that used too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """Do nothing any more."""
    time.sleep(600)


def fail() -> None:
    """An error of the program's own."""
    raise ArithmeticError("the culprit's own error")


ENDS: dict[str, Callable[[], None]] = {"kill": kill, "hang": hang, "leave": leave, "fail": fail}

STAGES = {
    "beginning": ("beginning a pass", False),
    "losses": ("adding up loads and losses", False),
    "counts": ("agreeing on counts", False),
    "dispatch": ("dispatch in", False),
    "after dispatch started": ("dispatch in", True),
    "combine": ("combine in", False),
    "backward": ("combine's gradient", False),
    "backward, last": ("dispatch's gradient", True),
    "gradients": ("averaging gradients", False),
}
"""Name → what the collective is called at which the culprit ends, and whether it takes part in it first."""


def ep_mesh() -> DeviceMesh:
    """All ranks, as the dimension of the experts."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))["ep"]


def step_with_fault(culprit: int, stage: str, end: str, late: int | None = None, delay: float = 0.0) -> str:
    """In a rank: a good step, then one in which the culprit ends, and the rank `late` comes so many seconds after the others."""
    torch.manual_seed(0)
    moe = parallelize(MoE(CONFIG), ep_mesh())

    def step() -> None:
        y_TD, aux = moe(torch.randn(64, 6))
        (y_TD.sum() + aux.loss).backward()
        sync_gradients(moe)

    step()
    if dist.get_rank() == culprit:
        _arm(*STAGES[stage], ENDS[end])
    began = time.monotonic()
    try:
        if dist.get_rank() == late:
            time.sleep(delay)
        step()
    except RankLostError as error:
        raise RankLostError(f"{error}; after {time.monotonic() - began:.1f} s") from error
    return "no error"


def _arm(called: str, takes_part: bool, end: Callable[[], None]) -> None:
    """Let this process end at the next collective of that name."""
    for method in ("gather", "sum_", "all_to_all"):
        original = getattr(Transport, method)

        def faulty(self: Transport, *given: Any, original: Callable[..., Any] = original) -> Any:
            if not any(isinstance(one, str) and one.startswith(called) for one in given):
                return original(self, *given)
            if takes_part:
                original(self, *given)
            return end()

        setattr(Transport, method, faulty)


def run_fault(culprit: int, stage: str, end: str, *more: Any, rank_0_holds_store: bool = False) -> list[Ended]:
    """How every rank ended after one fault."""
    return run_ranks(
        RANKS, step_with_fault, culprit, stage, end, *more,
        deadline=START_SECONDS + 3 * TIMEOUT, timeout=TIMEOUT, hanging=(culprit,) if end == "hang" else (),
        rank_0_holds_store=rank_0_holds_store,
    )  # fmt: skip


@contextlib.contextmanager
def _replaced(change: Callable[[Outgoing], Outgoing]) -> Iterator[None]:
    with mock.patch.object(layer, "outgoing", lambda *given: change(outgoing(*given))):
        yield


def _more_than_held(going: Outgoing) -> Outgoing:
    return going._replace(crossings=[going.crossings[0] + 1, *going.crossings[1:]])


def _impossible(going: Outgoing) -> Outgoing:
    counts = [[row[0] + 9, row[1] - 9, *row[2:]] for row in (going.crossings, going.assignments)]
    return going._replace(crossings=counts[0], assignments=counts[1])


class Disagreements:
    """One way for each thing that ranks must have alike: methods in which the last rank does it otherwise. Called on all ranks."""

    def __init__(self) -> None:
        self.mesh = ep_mesh()
        self.odd = self.mesh.get_local_rank() == self.mesh.size() - 1
        self.x_TD = torch.ones(3, CONFIG.d_model, dtype=torch.float64)

    def _fresh(self, **changes: Any) -> MoE:
        torch.manual_seed(0)
        return MoE(dataclasses.replace(CONFIG, **changes), dtype=torch.float64)

    def _parallel(self) -> nn.Module:
        return parallelize(self._fresh(), self.mesh)

    def layers(self) -> None:
        """One layer more."""
        parallelize(nn.ModuleList([self._fresh()] * 1 + [self._fresh()] * self.odd), self.mesh)

    def config(self) -> None:
        """Another loss."""
        parallelize(self._fresh(balance=BalanceConfig((("router_z", 0.1),))) if self.odd else self._fresh(), self.mesh)

    def weights(self) -> None:
        """One other number in one expert."""
        moe = self._fresh()
        with torch.no_grad():
            moe.get_parameter("experts.down_proj")[1, 0, 0] += self.odd
        parallelize(moe, self.mesh)

    def mode(self) -> None:
        """Evaluation instead of training."""
        self._parallel().train(not self.odd)(self.x_TD)

    def gradient(self) -> None:
        """A pass without gradients."""
        with torch.set_grad_enabled(not self.odd):
            self._parallel()(self.x_TD)

    def dtype(self) -> None:
        """Another dtype."""
        kind = torch.float32 if self.odd else torch.float64
        self._parallel().to(kind)(self.x_TD.to(kind))

    def router(self) -> None:
        """A router that has drifted apart after the start."""
        moe = self._parallel()
        moe(self.x_TD)
        with torch.no_grad():
            moe.get_parameter("router.weight")[0, 0] += self.odd
        moe(self.x_TD)

    def calls(self) -> None:
        """One pass more than the others."""
        moe: Any = self._parallel().eval()
        moe.parallel.calls += self.odd
        moe(self.x_TD)

    def sum_of_counts(self) -> None:
        """Announces a token more than it holds."""
        with _replaced(_more_than_held) if self.odd else contextlib.nullcontext():
            self._parallel().eval()(self.x_TD)

    def counts(self) -> None:
        """Announces what no routing can have."""
        with _replaced(_impossible) if self.odd else contextlib.nullcontext():
            self._parallel().eval()(self.x_TD)


DISAGREEMENTS = {
    "layers": "the layers", "config": "the config, balance", "weights": "experts.down_proj", "mode": "training mode",
    "gradient": "whether gradients are on", "dtype": "the dtype of x", "router": "the parameters that every rank holds",
    "calls": "how often it has run", "sum_of_counts": "tokens to send, but announces", "counts": "are possible with top_k",
}  # fmt: skip
"""Method of `Disagreements` → words of the error that every rank must raise."""


def disagree() -> dict[str, str]:
    """In a rank: every disagreement in turn, and what was raised here; they leave the group usable."""
    faults, seen = Disagreements(), {}
    for name in DISAGREEMENTS:
        try:
            getattr(faults, name)()
            seen[name] = "no error"
        except DisagreementError as error:
            seen[name] = str(error)
    return seen


# Fault → (culprit, stage, end, store held by rank 0): what the committed table shows.
MATRIX = {
    **{f"rank 2, {end}, {stage}": (2, stage, end, False) for stage in STAGES for end in ("kill", "hang")},
    **{f"rank 2, {end}, dispatch": (2, "dispatch", end, False) for end in ("leave", "fail")},
    **{f"rank 0, {end}, dispatch": (0, "dispatch", end, False) for end in ("kill", "hang")},
    **{f"rank 0, {end}, dispatch, store in rank 0": (0, "dispatch", end, True) for end in ("kill", "hang")},
}


WHO = (" ended or hangs", ", which held the store of the process group, ended")


def lost_rank_row(culprit: int, stage: str, end: str, rank_0_holds_store: bool) -> dict[str, Any]:
    """One fault and what every other rank saw. named: whether all of them name the culprit, and the store where it went with it."""
    ended = run_fault(culprit, stage, end, rank_0_holds_store=rank_0_holds_store)
    others = {rank: one for rank, one in enumerate(ended) if rank != culprit}
    saw = {rank: one.error or f"nothing (exit code {one.exitcode})" for rank, one in others.items()}
    after = [float(text.rpartition("after ")[2].removesuffix(" s")) for text in saw.values() if "; after " in text]
    return {
        "culprit": culprit, "stage": stage, "end": end, "store": "rank 0" if rank_0_holds_store else "outside the ranks",
        "named": all(any(f"rank {culprit}{words}" in text for words in WHO) for text in saw.values()),
        "seconds": max(after, default=None),
        "saw": {str(rank): text.partition(": ")[2].rpartition("; after ")[0] for rank, text in saw.items()},
    }  # fmt: skip


def disagreement_rows() -> list[dict[str, Any]]:
    """Every disagreement and what each rank saw."""
    ended = run_ranks(RANKS, disagree, deadline=START_SECONDS, timeout=TIMEOUT * 4)
    for one in ended:
        if one.result is None:
            raise RuntimeError(f"a rank did not survive a disagreement: {one.error}")
    rows = []
    for name, words in DISAGREEMENTS.items():
        saw = {str(rank): one.result[name] for rank, one in enumerate(ended)}
        how = " ".join((getattr(Disagreements, name).__doc__ or "").split())
        rows.append({"what": name, "how": how, "named": all(words in text for text in saw.values()), "saw": saw})
    return rows


def main() -> int:
    """Commit every fault, print what the ranks saw and write it where --json says; 1 where a rank did not name the cause."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    lost = []
    for name, fault in MATRIX.items():
        lost.append(lost_rank_row(*fault))
        print(f"{name}: named {lost[-1]['named']}, {lost[-1]['seconds']} s", flush=True)
    disagreements = disagreement_rows()
    for row in disagreements:
        print(f"{row['what']}: named {row['named']}")
    report = {"ranks": RANKS, "timeout_s": TIMEOUT, "torch": torch.__version__, "lost": lost, "disagreements": disagreements}
    if given.json is not None:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(not all(row["named"] for row in [*lost, *disagreements]))


if __name__ == "__main__":
    sys.exit(main())
