"""Training a language model on bytes: AdamW, a schedule, clipping, accumulation, and one bias update per optimizer step.

Whatever is drawn is a function of (seed, step): the batch from NumPy, noise inside the model from torch. So a run that is cut off anywhere
and resumed from a checkpoint is the same run, bit for bit, on the same machine with the same number of threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..balancing import dead_experts, max_violation
from ..checks import check_flags, is_amount, is_count, known_fields, named_pairs, require
from ..model_config import ModelConfig
from ..text import Corpus, batches, heldout_windows
from .checkpoints import MOMENTS, Checkpoint, checkpoint_files, load, save
from .layer import MoE
from .transformer import LanguageModel, ModelAux, bits_per_byte, cross_entropy

Row = dict[str, Any]
"""A row of the log: numbers and names, ready for JSON."""


def constant(progress: float) -> float:
    """The learning rate as it is, after the warmup."""
    return 1.0


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0: (1 + cos(π · progress)) / 2. Source: Loshchilov & Hutter 2017, eq. 5."""
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "cosine": cosine}
"""What `TrainConfig.schedule` can name: progress in [0, 1] → factor of the learning rate."""

# Name → (dtype of parameters and moments, dtype in which autocast computes products or None).
DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bfloat16": (torch.float32, torch.bfloat16),
}


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    steps, batch, length   optimizer steps; sequences per step; bytes that a sequence predicts
    accumulation           micro-batches that a batch is cut into; gradients and loads are summed over them
    lr, warmup, schedule   peak learning rate; steps of linear warmup; then "cosine" | "constant", down to final_lr · lr
    beta1, beta2, eps, weight_decay   of AdamW; only matrices decay, no norms and no biases
    clip                   largest norm of all gradients together; 0: no clipping
    seed, dtype            "float32" | "float64" | "bfloat16" (parameters in fp32, products in bf16)
    domain_weights         pairs (domain, weight) for drawing sequences; (): all domains equally
    log_every, evaluate_every, heldout   steps between log rows, and between held-out losses of so many windows a domain (0: none)
    checkpoint_every, keep   steps between checkpoints (0: at the end only), and how many stay
    patience               this many steps in a row with NaN or infinite gradients end the run (in a shorter run: all after the first)
    activation_checkpointing   compute blocks again in the backward pass instead of keeping activations
    """

    steps: int = 1000
    batch: int = 16
    length: int = 256
    accumulation: int = 1
    lr: float = 3e-3
    final_lr: float = 0.1
    warmup: int = 50
    schedule: str = "cosine"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    domain_weights: tuple[tuple[str, float], ...] = ()
    log_every: int = 10
    evaluate_every: int = 0
    heldout: int = 8
    checkpoint_every: int = 100
    keep: int = 2
    patience: int = 5
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "domain_weights", named_pairs(self.domain_weights, "domain_weights"))
        for domain, weight in self.domain_weights:
            require(is_amount(weight), f"domain_weights gives {domain!r} the weight {weight!r}; it must be a finite number ≥ 0")
        check_flags(self)
        least = {name: 1 for name in ("steps", "batch", "length", "accumulation", "log_every", "heldout", "keep", "patience")}
        least |= {name: 0 for name in ("warmup", "seed", "evaluate_every", "checkpoint_every")}
        for name, limit in least.items():
            value = getattr(self, name)
            require(is_count(value, limit), f"{name} is {value!r}; it must be an integer ≥ {limit}")
        for name in ("lr", "final_lr", "beta1", "beta2", "eps", "weight_decay", "clip"):
            value = getattr(self, name)
            require(is_amount(value), f"{name} is {value!r}; it must be a finite number ≥ 0")
        for name, limit in (("beta1", "below 1"), ("beta2", "below 1")):
            require(getattr(self, name) < 1, f"{name} is {getattr(self, name)!r}; it must be {limit}")
        require(self.batch % self.accumulation == 0, f"accumulation is {self.accumulation}, which does not divide batch = {self.batch}")
        for name, table in (("schedule", SCHEDULES), ("dtype", DTYPES)):
            value = getattr(self, name)
            require(isinstance(value, str) and value in table, f"{name} is {value!r}; known: {', '.join(table)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, ready for JSON; `from_dict` is its inverse."""
        return {**dataclasses.asdict(self), "domain_weights": [list(pair) for pair in self.domain_weights]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainConfig:
        """The config that `to_dict` wrote. Raises ValueError naming an unknown field."""
        return cls(**known_fields(cls, data))


class TrainResult(NamedTuple):
    """model; log: one row per `log_every` steps, held-out loss and skipped step; record: what `checkpoints.export` writes beside it."""

    model: LanguageModel
    log: list[Row]
    record: dict[str, Any]


class OneProcess:
    """Where a run takes place: here, in this process. A subclass spreads it over several, and replaces what is different there.

    leader: whether this process writes files and shows progress;  path: numbers that its draws depend on beside seed and step
    """

    leader: bool = True
    path: tuple[int, ...] = ()

    def place(self, model: LanguageModel) -> None:
        """Spread a fresh model, before its optimizer is made."""

    def own(self, windows: np.ndarray) -> np.ndarray:
        """This process's sequences of a micro-batch."""
        return windows

    def norm(self, model: nn.Module) -> Tensor:
        """The norm of the whole batch's gradients, once these are complete on every process."""
        return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])

    def clip(self, model: nn.Module, limit: float, norm: Tensor) -> None:
        """Scale the gradients so that `norm`, which is theirs, is at most `limit`."""
        nn.utils.clip_grads_with_norm_(list(model.parameters()), limit, norm)

    def observe(self, means: list[float], kept: dict[int, int], load: dict[int, Tensor]) -> tuple[list[float], dict[int, int]]:
        """(means, kept) of a step over all processes, where these are of one; load is of all already."""
        return means, kept

    def facts(self) -> Row:
        """What a log row says of the last step beside the rest."""
        return {}

    def report(self) -> str:
        """The same for the progress bar."""
        return ""

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor of which this process may hold a part."""
        return tensor

    def part(self, tensor: Tensor, like: Tensor) -> Tensor:
        """The inverse: what this process holds of a tensor that is spread like `like`."""
        return tensor.to(like.device)

    def load(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Read one process's state dict into a model that has been placed."""
        model.load_state_dict(state)

    def write(self, act: Callable[[], object]) -> None:
        """Do on one process what is to be done once."""
        act()


class Run(NamedTuple):
    """What a run carries from step to step."""

    model: LanguageModel
    optimizer: torch.optim.AdamW
    config: TrainConfig
    corpus: Corpus
    fingerprint: str
    log: list[Row]
    processes: OneProcess = OneProcess()


class StepResult(NamedTuple):
    """What one step of the optimizer did.

    loss, ce     means over micro-batches: the objective, and the cross-entropy in it
    load, kept   assignments by MoE layer, before the drop and after it
    norm         of all gradients together
    skipped      why, if the step was
    """

    loss: float
    ce: float
    load: dict[int, Tensor]
    kept: dict[int, int]
    norm: float
    skipped: str | None


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step number `step` (from 0): linear warmup, then the schedule from lr down to final_lr · lr."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * (config.final_lr + (1 - config.final_lr) * SCHEDULES[config.schedule](progress))


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay acts on a parameter: on matrices and stacks of them, not on norms and biases (stacked biases are a matrix)."""
    return parameter.ndim >= 2 and not name.endswith("bias")


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over two groups, with and without decay, of each kind of tensor: the fused step refuses plain and distributed ones together.

    Gradients start as zeros, so that every parameter has moments from step 1.
    """
    members: dict[tuple[bool, Any], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            members.setdefault((not decays(name, parameter), getattr(parameter, "device_mesh", None)), []).append(parameter)
    ordered = sorted(members.items(), key=lambda item: item[0][0])
    groups = [{"params": own, "weight_decay": 0.0 if free else config.weight_decay} for (free, _), own in ordered]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def batch_of_step(corpus: Corpus, config: TrainConfig, step: int) -> np.ndarray:
    """The windows [batch, length + 1] of step number `step`: a function of (seed, step) and the text."""
    rng = np.random.default_rng([config.seed, step])
    weights = dict(config.domain_weights) or None
    return next(batches(corpus.train, rng, config.batch, config.length + 1, weights))[0]


@contextlib.contextmanager
def _seeded(seed: int, *path: int) -> Iterator[None]:
    """torch's generators as a function of the numbers given; the caller's are put back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.SeedSequence([seed, *path]).generate_state(1, np.uint64)[0] >> 1))
        yield


def _autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    products = DTYPES[config.dtype][1]
    return contextlib.nullcontext() if products is None else torch.autocast(device.type, products)


def forward_backward(model: LanguageModel, windows: np.ndarray, config: TrainConfig) -> tuple[float, float, ModelAux]:
    """One micro-batch of windows [B, S + 1]: adds its share of the gradients and returns (loss, cross-entropy, aux)."""
    device = model.embed_tokens.weight.device
    tokens = torch.from_numpy(windows).to(device)
    with _autocast(config, device):
        logits_BSV, aux = model(tokens[:, :-1])
    ce = cross_entropy(logits_BSV, tokens[:, 1:])
    loss = ce + aux.loss
    (loss / config.accumulation).backward()
    return loss.item(), ce.item(), aux


def optimizer_step(run: Run, step: int, windows: np.ndarray) -> StepResult:
    """One step on one batch; skipped as a whole, bias update included, where a gradient is NaN or infinite."""
    model, config = run.model.train(), run.config
    for parameter in model.parameters():  # not the optimizer's own, which refuses plain and distributed tensors together
        if parameter.grad is not None:
            parameter.grad.zero_()
    losses, load, kept = [], {}, {}
    for number, micro in enumerate(np.split(windows, config.accumulation)):
        with _seeded(config.seed, step, number, *run.processes.path):
            loss, ce, aux = forward_backward(model, run.processes.own(micro), config)
        losses.append((loss, ce))
        for layer, routing in aux.routing.items():
            load[layer] = load.get(layer, 0) + routing.load
            kept[layer] = kept.get(layer, 0) + int(routing.keep.sum())
    norm = run.processes.norm(model)
    skipped = None if math.isfinite(norm.item()) else f"the gradients' norm is {norm.item()}"
    if skipped is None:
        if config.clip:
            run.processes.clip(model, config.clip, norm)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        run.optimizer.step()
        model.update_bias(load)
        model.update_penalty(load, windows[:, 1:].size)
    (loss, ce), kept = run.processes.observe(np.mean(losses, axis=0).tolist(), kept, load)
    return StepResult(loss, ce, load, kept, norm.item(), skipped)


@torch.no_grad()
def heldout_bits(model: LanguageModel, corpus: Corpus, length: int, count: int, batch: int) -> dict[str, float]:
    """Bits per byte on `count` held-out windows of each domain, in evaluation mode; the model's mode is put back."""
    training, device = model.training, model.embed_tokens.weight.device
    model.eval()
    bits = {}
    for domain in corpus.domains:
        parts = np.array_split(heldout_windows(corpus, domain, length + 1, count), math.ceil(count / batch))
        windows = [torch.from_numpy(part).to(device) for part in parts]
        nats = [cross_entropy(model(w[:, :-1])[0], w[:, 1:]).item() * len(w) for w in windows]
        bits[domain] = bits_per_byte(sum(nats) / count)
    model.train(training)
    return bits


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _evaluates(config: TrainConfig, step: int) -> bool:
    return config.evaluate_every > 0 and (step % config.evaluate_every == 0 or step == config.steps)


def _row(run: Run, step: int, result: StepResult, speed: float) -> Row:
    """The log row after `step` steps. JSON has no NaN: what is not finite is None."""
    loads = {layer: load.cpu().numpy() for layer, load in result.load.items()}
    picked, kept = sum(int(load.sum()) for load in loads.values()), sum(result.kept.values())
    row: Row = {"step": step, "loss": _finite(result.loss), "ce": _finite(result.ce), "lr": learning_rate(run.config, step - 1)}
    row |= {"grad_norm": _finite(result.norm), "tokens_per_second": round(speed, 1)}
    row["max_vio"] = {str(layer): max_violation(load) for layer, load in loads.items()}
    row |= {"dead_experts": sum(map(dead_experts, loads.values())), "drop_rate": 1 - kept / picked if picked else 0.0}
    row |= run.processes.facts()
    if result.skipped:
        row["skipped"] = result.skipped
    if _evaluates(run.config, step):
        config = run.config
        row["heldout"] = heldout_bits(run.model, run.corpus, config.length, config.heldout, max(config.batch // config.accumulation, 1))
    return row


def _check_patience(log: list[Row], step: int, patience: int) -> None:
    skipped = {row["step"] for row in log if "skipped" in row}
    if all(earlier in skipped for earlier in range(step - patience + 1, step + 1)):
        raise FloatingPointError(
            f"steps {step - patience + 1} to {step} all had NaN or infinite gradients ({log[-1]['skipped']}); lower lr or start from an "
            "earlier checkpoint"
        )


def _state(run: Run, step: int) -> Checkpoint:
    names: dict[Tensor, str] = {p: name for name, p in run.model.named_parameters()}
    whole = run.processes.whole
    moments = {f"{moment}.{names[p]}": whole(state[moment]) for p, state in run.optimizer.state.items() for moment in MOMENTS}
    model = {name: whole(tensor) for name, tensor in run.model.state_dict().items()}
    return Checkpoint(step, run.model.config, run.config.to_dict(), run.fingerprint, model, moments, run.log)


FREE_FIELDS = frozenset({"checkpoint_every", "keep"})  # they change what is stored and nothing that is computed


def _restore(run: Run, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's state into a fresh run."""
    run.processes.load(run.model, checkpoint.model)
    for name, parameter in run.model.named_parameters():
        moments = {moment: checkpoint.optimizer[f"{moment}.{name}"] for moment in MOMENTS}
        run.optimizer.state[parameter] = {moment: run.processes.part(tensor, parameter) for moment, tensor in moments.items()}
    run.log.extend(checkpoint.log)


def _check_text(model_config: ModelConfig, config: TrainConfig, corpus: Corpus) -> None:
    """What would fail later fails now: the first batch and the held-out windows exist."""
    require(model_config.vocabulary >= 256, f"vocabulary is {model_config.vocabulary}; the corpus is bytes, so it must be ≥ 256")
    batch_of_step(corpus, config, 0)
    for domain in corpus.domains if config.evaluate_every else ():
        heldout_windows(corpus, domain, config.length + 1, config.heldout)


def _check_same(model_config: ModelConfig, config: TrainConfig, corpus: Corpus, checkpoint: Checkpoint) -> None:
    ours, theirs = config.to_dict(), TrainConfig.from_dict(checkpoint.train_config).to_dict()
    differing = [(name, theirs[name], ours[name]) for name in ours if name not in FREE_FIELDS and theirs[name] != ours[name]]
    mine, other = model_config.to_dict(), checkpoint.model_config.to_dict()
    differing += [(name, other[name], mine[name]) for name in mine if other[name] != mine[name]]
    fingerprint = corpus.fingerprint()
    differing += [("corpus", checkpoint.fingerprint, fingerprint)] if checkpoint.fingerprint != fingerprint else []
    for name, before, now in differing:
        raise ValueError(f"the checkpoint was written with {name} = {before!r}, but this run has {now!r}")


def start_from(
    model_config: ModelConfig, train_config: TrainConfig, corpus: Corpus, out: str | os.PathLike[str] | None, resume: bool
) -> Checkpoint | None:
    """Where a run with these arguments of `train` would start: the newest checkpoint in `out`, or None for the beginning.

    Raises ValueError for text that the configs do not fit, or checkpoints of another run.
    """
    _check_text(model_config, train_config, corpus)
    if out is None or not checkpoint_files(out):
        return None
    require(resume, f"{out} holds the checkpoints of an earlier run and resume is False: resume it or choose another directory")
    checkpoint = load(out)
    _check_same(model_config, train_config, corpus, checkpoint)
    return checkpoint


def _progress_bar(enabled: bool) -> Progress:
    columns = (
        TextColumn("{task.fields[report]}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, disable=not enabled)


def _report(result: StepResult, speed: float, more: str) -> str:
    violation = max((max_violation(load.cpu().numpy()) for load in result.load.values()), default=0.0)
    return f"loss {result.loss:.3f}  {speed:,.0f} tokens/s  MaxVio {violation:.2f}{more}"


def train(
    model_config: ModelConfig, train_config: TrainConfig, corpus: Corpus, *,
    moe_class: Callable[..., nn.Module] = MoE, out: str | os.PathLike[str] | None = None, resume: bool = True,
    progress: bool = True, callback: Callable[[Row, LanguageModel], None] | None = None, device: torch.device | str | None = None,
    processes: OneProcess = OneProcess(),  # noqa: B008 (it has no state)
) -> TrainResult:  # fmt: skip
    """Train a language model on `corpus.train`.

    moe_class  the class of its MoE layers;  device: where (None: torch's default)
    out        directory for checkpoints; with resume, a run found there goes on from its newest one
    callback   called with every log row and the model
    processes  over which the run is spread; all of them call this function with the same arguments
    Same configs and text: the same parameters, moments and log, bit for bit, tokens_per_second aside, with or without interruptions.
    Raises: ValueError for text that the configs do not fit, or checkpoints of another run; FloatingPointError after `patience` steps in a
    row with NaN or infinite gradients.
    """
    checkpoint = start_from(model_config, train_config, corpus, out, resume)
    with _seeded(train_config.seed):
        model = LanguageModel(model_config, moe_class=moe_class, device=device, dtype=DTYPES[train_config.dtype][0])
    model.activation_checkpointing = train_config.activation_checkpointing
    processes.place(model)
    run = Run(model, make_optimizer(model, train_config), train_config, corpus, corpus.fingerprint(), [], processes)
    if out is not None:
        processes.write(partial(os.makedirs, out, exist_ok=True))  # a path that cannot be fails now, not after hours
    first = 0 if checkpoint is None else checkpoint.step
    if checkpoint is not None:
        _restore(run, checkpoint)
    del checkpoint  # its tensors are no longer needed
    with _progress_bar(progress and processes.leader) as bar:
        task = bar.add_task("train", total=train_config.steps, completed=first, report="")
        for step in range(first + 1, train_config.steps + 1):
            began = time.perf_counter()
            result = optimizer_step(run, step - 1, batch_of_step(corpus, train_config, step - 1))
            speed = train_config.batch * train_config.length / (time.perf_counter() - began)
            due = step % train_config.log_every == 0 or step == train_config.steps or _evaluates(train_config, step)
            if due or result.skipped:
                run.log.append(_row(run, step, result, speed))
                if callback is not None:
                    callback(run.log[-1], model)
            if result.skipped:
                _check_patience(run.log, step, min(train_config.patience, max(train_config.steps - 1, 1)))
            if out is not None and (
                step == train_config.steps or (train_config.checkpoint_every and step % train_config.checkpoint_every == 0)
            ):
                processes.write(partial(save, out, _state(run, step), keep=train_config.keep))
            bar.update(task, completed=step, report=_report(result, speed, processes.report()))
    record = {"train_config": train_config.to_dict(), "fingerprint": run.fingerprint, "step": train_config.steps, "log": run.log}
    return TrainResult(model.eval(), run.log, record)
