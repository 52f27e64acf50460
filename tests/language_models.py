"""Small language models, a small corpus and a short run for the tests of training, checkpoints and sampling."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import torch
from configs import CONFIGS

from reference import AttentionConfig, ModelConfig, MoEConfig
from reference.autograd.training import TrainConfig
from reference.autograd.transformer import LanguageModel
from reference.text import Corpus

ATTENTION = AttentionConfig(heads=4, kv_heads=2, head_dim=4)
RUN = TrainConfig(steps=12, batch=4, length=16, lr=0.02, warmup=3, log_every=1, checkpoint_every=2, evaluate_every=6, heldout=3)


def model_config(moe: MoEConfig | str = "deepseek-v3", **changes: object) -> ModelConfig:
    """Three layers around the layer `moe` (or the one of that name in CONFIGS), the first of them dense."""
    moe = CONFIGS[moe] if isinstance(moe, str) else moe
    return replace(ModelConfig("tiny", moe, layers=3, attention=ATTENTION, dense_width=10, first_dense=1), **changes)  # type: ignore[arg-type]


NOISY = model_config("gshard")
"""Random second choices and drops in training: what a resumed run must repeat."""


def tiny_corpus(seed: int = 0) -> Corpus:
    """Two domains of bytes that are easy to tell apart and to predict."""
    rng = np.random.default_rng(seed)
    sums = "".join(f"{a}+{b}={a + b}\n" for a, b in rng.integers(0, 50, (800, 2)))
    words = " ".join(rng.choice(["expert", "router", "token", "gate", "load"], 1600))
    parts = {name: np.frombuffer(text.encode(), np.uint8) for name, text in (("sums", sums), ("words", words))}
    train, heldout = {n: b[:-1500] for n, b in parts.items()}, {n: b[-1500:] for n, b in parts.items()}
    names = {name: ("document",) for name in parts}
    return Corpus(tuple(parts), *map(MappingProxyType, (train, heldout, names, names)))


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> LanguageModel:
    """A model whose biases and norms are not the neutral ones it starts from."""
    torch.manual_seed(seed)
    model = LanguageModel(config, dtype=dtype)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1 or name.endswith("bias"):
                tensor.add_(0.3 * torch.randn_like(tensor))
    return model


def random_bytes(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, length]."""
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))
