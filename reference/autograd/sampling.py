"""Text from a byte model, one byte at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import require
from .transformer import KVCache, LanguageModel

START = b"\n"  # what an empty prompt is replaced by: there is no token for the beginning of a text


def token_probabilities(logits_V: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """The distribution that is sampled from: softmax(logits / temperature), cut to its head and renormalised.

    Shapes: logits [V] → [V] fp64. temperature 0: all weight on the largest logit, ties to the lowest id. top_k: the k most probable stay.
    top_p: the fewest most probable that hold p together stay, the one that crosses p included. With both, top_k cuts first.
    Source: top-p: Holtzman et al. 2020, §3.1; top-k: Fan et al. 2018, §5.1.
    """
    logits_V = logits_V.double()
    if temperature == 0:
        return torch.zeros_like(logits_V).index_fill(0, logits_V.argmax(), 1)
    sorted_V, order_V = torch.softmax((logits_V - logits_V.max()) / temperature, 0).sort(descending=True, stable=True)
    if top_k is not None:
        sorted_V = torch.cat([sorted_V[:top_k], torch.zeros_like(sorted_V[top_k:])])
        sorted_V = sorted_V / sorted_V.sum()
    if top_p is not None:
        before_V = sorted_V.cumsum(0) - sorted_V
        sorted_V = torch.where(before_V < top_p, sorted_V, 0)
    return torch.zeros_like(sorted_V).index_copy(0, order_V, sorted_V / sorted_V.sum())


def _check(model: LanguageModel, count: int, temperature: float, top_k: int | None, top_p: float | None, *, seed: int, window: int) -> None:
    config = model.config
    require(config.vocabulary == 256, f"vocabulary is {config.vocabulary}; sampling bytes needs a byte model, 256")
    require(count >= 0, f"count is {count}; it must be at least 0")
    require(0 <= seed < 2**63, f"seed is {seed}; it must lie between 0 and 2⁶³ − 1")
    require(
        math.isfinite(temperature) and temperature >= 0,
        f"temperature is {temperature}; it must be finite and ≥ 0 (0: the most probable byte)",
    )
    require(top_k is None or 1 <= top_k <= config.vocabulary, f"top_k is {top_k}; it must lie between 1 and {config.vocabulary}")
    require(top_p is None or 0 < top_p <= 1, f"top_p is {top_p}; it must lie in (0, 1]")
    require(window >= 2, f"window is {window}; it must be at least 2")
    limit = config.max_positions
    require(not limit or window <= limit, f"window is {window}, but the model has max_positions = {limit}")


class Reader:
    """Reads bytes and answers what may come next, keeping keys and values of the bytes before.

    When `window` positions are full, the last half of them is read anew: most bytes cost one position only, and no position lies beyond
    what the model was trained on.
    """

    def __init__(self, model: LanguageModel, window: int) -> None:
        self.model, self.window = model, window
        self.seen: list[int] = []
        self.cache = KVCache()

    def read(self, new: list[int]) -> Tensor:
        """The logits_V after the new bytes, of which there is at least one."""
        self.seen += new
        if self.cache.length + len(new) > self.window:
            self.cache, self.seen = KVCache(), self.seen[-(self.window // 2) :]
            new = self.seen
        tokens_BS = torch.tensor([new], device=self.model.embed_tokens.weight.device)
        return self.model(tokens_BS, cache=self.cache)[0][0, -1].cpu()


@torch.no_grad()
def sample(
    model: LanguageModel, prompt: bytes, count: int, *,
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0, window: int = 256,
) -> bytes:  # fmt: skip
    """`count` bytes that go on from `prompt` (which is not repeated), the model in evaluation mode; equal seeds give equal bytes.

    temperature, top_k, top_p   see `token_probabilities`
    window                      positions at most, best the length the model was trained on

    Where expert capacity is limited or experts choose tokens, a byte that comes alone is routed without the bytes before it.
    Raises: ValueError for a value outside its range, and for a model whose tokens are no bytes.
    """
    _check(model, count, temperature, top_k, top_p, seed=seed, window=window)
    training = model.training
    model.eval()
    rng, out = torch.Generator().manual_seed(seed), bytearray()
    reader, new = Reader(model, window), list(prompt or START)[-window:]
    try:
        for _ in range(count):
            logits_V = reader.read(new)
            new = [int(torch.multinomial(token_probabilities(logits_V, temperature, top_k, top_p), 1, generator=rng))]
            out += bytes(new)
    finally:  # whoever interrupts a long text may go on training
        model.train(training)
    return bytes(out)
