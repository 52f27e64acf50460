"""A model of one's own, from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reference.model_config import ModelConfig


def read_config(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """(model, fields of TrainConfig) of a JSON file {"model": …, "train": …}."""
    from reference.config import require
    from reference.model_config import ModelConfig

    require(path.is_file(), f"--config is {path}, which is no file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--config is {path}, which is no JSON that can be read: {error}") from error
    require(isinstance(data, dict) and "model" in data, f'{path} must hold {{"model": …, "train": …}}, the second optional')
    for key in data:
        require(key in ("model", "train"), f"{path} has the unknown field {key!r}; known: model, train")
    try:
        return ModelConfig.from_dict(data["model"]), dict(data.get("train", {}))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} holds a model that cannot be read: {error}") from error
