"""Checkpoints that survive a kill at any moment: one safetensors file each, configs and log as JSON in its metadata, never pickle.

A file appears under its name only by a rename after all its bytes are on disk, so whatever has the name is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import MoEConfig, require
from ..model_config import ModelConfig
from .conversion import params_to_numpy
from .layer import MoE
from .transformer import LanguageModel

VERSION = 1
METADATA = "moebius"
SUFFIX = ".safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
TRAINING, MODEL = "training", "model"
FIELDS = {
    TRAINING: {"version", "kind", "step", "model_config", "train_config", "fingerprint", "log"},
    MODEL: {"version", "kind", "model_config"},
}


@dataclass(frozen=True)
class Checkpoint:
    """All state of a training run after `step` steps.

    model         state dict, buffers included
    optimizer     "exp_avg.NAME", "exp_avg_sq.NAME" and "step.NAME" for every parameter NAME (AdamW)
    train_config  as a plain dict
    fingerprint   of the corpus
    log           rows so far

    There is no random state: every draw of a run is a function of (seed, step).
    """

    step: int
    model_config: ModelConfig
    train_config: dict[str, Any]
    fingerprint: str
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    log: list[dict[str, Any]] = field(default_factory=list)


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that at every moment the path holds the old file or the whole new one, also after a power cut.

    Raises what the file system raises; then the old file is as it was and the temporary one is gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    if os.name == "posix":  # elsewhere a directory cannot be opened; the rename is still atomic
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _encode(tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> bytes:
    from safetensors.torch import save as to_bytes  # here, so that what reads and writes no files needs no safetensors

    # One metadata entry: safetensors writes several in random order, and equal checkpoints should be equal files.
    text = json.dumps({"version": VERSION, **metadata}, allow_nan=False, sort_keys=True)
    return to_bytes({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, {METADATA: text})


def checkpoint_files(directory: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a directory, oldest first; [] where there are none."""
    return sorted(Path(directory).glob(f"step-*{SUFFIX}"), key=lambda path: (len(path.name), path.name))


def save(directory: str | os.PathLike[str], checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write `directory/step-….safetensors`, then delete all but the newest `keep` checkpoints and what killed saves left behind.

    Returns: the file's path. Raises: ValueError for keep < 1 or a log with NaN; OSError, with the earlier checkpoints as they were.
    """
    require(keep >= 1, f"keep is {keep}; at least 1 checkpoint must stay")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": tensor for name, tensor in checkpoint.model.items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in checkpoint.optimizer.items()}
    metadata = {"kind": TRAINING, "model_config": checkpoint.model_config.to_dict()}
    metadata |= {name: getattr(checkpoint, name) for name in ("step", "train_config", "fingerprint", "log")}
    path = directory / f"step-{checkpoint.step:08d}{SUFFIX}"
    write_atomically(path, _encode(tensors, metadata))
    for old in checkpoint_files(directory)[:-keep]:
        old.unlink(missing_ok=True)
    for left_behind in directory.glob(f".step-*{SUFFIX}.*.tmp"):
        left_behind.unlink(missing_ok=True)
    return path


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(metadata, tensors) of a file that `save` or `export` wrote."""
    from safetensors import SafetensorError, safe_open

    require(path.is_file(), f"{path} does not exist or is no file")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA)
            # Copies: what safetensors returns is a view of the file, which may be replaced or deleted while the tensors live.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
    require(text is not None, f"{path} is a safetensors file without {METADATA!r} metadata: it was not written here")
    try:
        metadata = json.loads(text or "")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has metadata that is no JSON: {error}") from error
    _check_metadata(metadata, path)
    return metadata, tensors


def _check_metadata(metadata: Any, path: Path) -> None:
    require(isinstance(metadata, dict), f"{path} has metadata that is no mapping: {metadata!r:.80}")
    require(metadata.get("version") == VERSION, f"{path} has version {metadata.get('version')!r}; this code reads version {VERSION}")
    kind = metadata.get("kind")
    require(isinstance(kind, str) and kind in FIELDS, f"{path} is of kind {kind!r}; known: {', '.join(FIELDS)}")
    for name in sorted(FIELDS[kind] - metadata.keys()):
        raise ValueError(f"{path} lacks the field {name!r}")
    for name in sorted(metadata.keys() - FIELDS[kind]):
        raise ValueError(f"{path} has the unknown field {name!r}")
    if kind == TRAINING:
        step, log = metadata["step"], metadata["log"]
        require(isinstance(step, int) and step >= 0, f"{path} has step {step!r}; it must be an integer ≥ 0")
        require(isinstance(log, list) and all(isinstance(row, dict) for row in log), f"{path} has a log that is no list of rows")


def _model_config(metadata: dict[str, Any], path: Path) -> ModelConfig:
    try:
        return ModelConfig.from_dict(metadata["model_config"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} has a model_config that cannot be read: {error}") from error


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: object, *, dtypes: bool = True) -> None:
    """ValueError naming the first tensor that `found` lacks, has in another shape (or dtype), or has beyond `wanted`."""
    for name, tensor in wanted.items():
        require(name in found, f"{where} lacks the tensor {name!r}")
        shape, expected = tuple(found[name].shape), tuple(tensor.shape)
        require(shape == expected, f"{where} has {name!r} of shape {shape}; its config needs {expected}")
        require(
            not dtypes or found[name].dtype == tensor.dtype, f"{where} has {name!r} of dtype {found[name].dtype}; needed: {tensor.dtype}"
        )
    for name in found:
        require(name in wanted, f"{where} has the unknown tensor {name!r}")


def _wanted(config: ModelConfig, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Shapes and dtypes of a run's state, (model, optimizer), as tensors without storage."""
    model = LanguageModel(config, device="meta", dtype=dtype)
    optimizer = {
        f"{moment}.{name}": torch.empty((), dtype=torch.float32, device="meta") if moment == "step" else weight
        for moment in MOMENTS
        for name, weight in model.named_parameters()
    }
    return dict(model.state_dict()), optimizer


def _dtype(model: Mapping[str, Tensor], path: Path) -> torch.dtype:
    """That of a stored model's parameters."""
    dtype = model.get("norm.weight", torch.empty(0)).dtype
    require(dtype.is_floating_point, f"{path} has 'norm.weight' of dtype {dtype}; parameters must be floating point")
    return dtype


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a file, or the newest one of a directory.

    Raises: ValueError that names what is wrong: no checkpoint, truncated, not safetensors, foreign, a missing or unknown field, a
    missing or unknown tensor, a wrong shape or dtype. All is checked before anything is returned.
    """
    path = Path(path)
    if path.is_dir():
        found = checkpoint_files(path)
        require(bool(found), f"{path} holds no checkpoint (step-*{SUFFIX})")
        path = found[-1]
    metadata, tensors = _read(path)
    require(metadata["kind"] == TRAINING, f"{path} is of kind {metadata['kind']!r}, which has no optimizer state to go on from")
    config = _model_config(metadata, path)
    parts = {prefix: _part(tensors, prefix) for prefix in ("model.", "optimizer.")}
    for name in tensors:
        require(name.startswith(tuple(parts)), f"{path} has the unknown tensor {name!r}")
    wanted_parts = _wanted(config, _dtype(parts["model."], path))
    for (prefix, part), wanted in zip(parts.items(), wanted_parts, strict=True):
        check_tensors(part, wanted, f"{path}, {prefix[:-1]}:")
    rest = {name: metadata[name] for name in ("step", "train_config", "fingerprint", "log")}
    return Checkpoint(model_config=config, model=parts["model."], optimizer=parts["optimizer."], **rest)


def record_text(record: Mapping[str, Any], rows: Sequence[str]) -> str:
    """JSON with one line per field, and per element of the lists named in `rows`, so that a change of it can be read."""
    fields = {name: json.dumps(value, allow_nan=False) for name, value in record.items()}
    for name in (name for name in rows if record.get(name)):
        fields[name] = "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in record[name]) + "\n]"
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {text}" for name, text in fields.items()) + "\n}\n"


def export(
    path: str | os.PathLike[str], model: LanguageModel, *, dtype: torch.dtype = torch.bfloat16, record: Mapping[str, Any] | None = None
) -> Path:
    """Write a model for use: parameters rounded to `dtype`, buffers as they are, the config in the metadata.

    record (how it was trained: train_config, fingerprint, step, log) goes to a `.json` beside the file.
    The correction bias keeps fp32: in bf16 neighbouring biases fall together and the choice of experts changes.
    """
    path = Path(path)
    parameters = dict(model.named_parameters())
    tensors = {name: tensor.to(dtype) if name in parameters else tensor for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    if record is not None:
        write_atomically(path.with_suffix(".json"), record_text(record, ("log",)).encode())
    write_atomically(path, _encode(tensors, {"kind": MODEL, "model_config": model.config.to_dict()}))
    return path


def load_model(
    path: str | os.PathLike[str], *, moe_class: Callable[..., nn.Module] = MoE,
    device: torch.device | str | None = None, dtype: torch.dtype | None = None,
) -> LanguageModel:  # fmt: skip
    """The model of an exported file, of a checkpoint, or of a directory's newest checkpoint, in evaluation mode.

    dtype: that of the parameters (None: as stored). Raises: ValueError as `load`.
    """
    path = Path(path)
    if path.is_dir() or path.name.startswith("step-"):
        checkpoint = load(path)
        config, tensors = checkpoint.model_config, checkpoint.model
    else:
        metadata, tensors = _read(path)
        require(metadata["kind"] == MODEL, f"{path} is of kind {metadata['kind']!r}; a checkpoint's name starts with step-")
        config = _model_config(metadata, path)
        check_tensors(tensors, _wanted(config, _dtype(tensors, path))[0], f"{path}:")
    dtype = tensors["norm.weight"].dtype if dtype is None else dtype
    model = LanguageModel(config, moe_class=moe_class, device=device, dtype=dtype)
    model.load_state_dict(tensors)
    return model.eval()


def moe_parameters(model: LanguageModel, layer: int) -> tuple[MoEConfig, dict[str, np.ndarray]]:
    """(config, params) of one MoE layer for `moe_forward`; bf16 becomes fp32, which is exact.

    Raises: ValueError for a layer without experts.
    """
    layers = model.moe_layers()
    require(layer in layers, f"layer {layer} has no experts; MoE layers: {sorted(layers)}")
    return model.config.layer_moe(layer), params_to_numpy(layers[layer].state_dict())
