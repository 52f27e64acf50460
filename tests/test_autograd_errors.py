"""Bad input to the PyTorch reference: a ValueError that names the value and the limit, checked always or, for values, on demand."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from reference.autograd import MoE, apply_experts, route
from reference.config import BalanceConfig, ExpertsConfig, GatingConfig, MoEConfig, ScoresConfig

CONFIG = MoEConfig(6, gating=GatingConfig(top_k=2), experts=ExpertsConfig(5, 4))
JITTERED = MoEConfig(6, scores=ScoresConfig(noise="jitter", noise_scale=0.1), gating=GatingConfig(top_k=2), experts=ExpertsConfig(5, 4))

HASHED = MoEConfig(6, gating=GatingConfig(top_k=2, choice="hash", vocabulary=9), experts=ExpertsConfig(5, 4))
PENALIZED = MoEConfig(6, experts=ExpertsConfig(5, 4), balance=BalanceConfig((("gate_l1", 1.0),)))


def layer() -> MoE:
    return MoE(CONFIG).eval()


def x(*shape: int, **settings) -> Tensor:
    return torch.randn(*(shape or (2, 7, 6)), **settings)


def routing(moe: MoE):
    return moe(x())[1].routing


def changed_params(name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    params = {**layer().tensors(), name: tensor}
    return {key: value for key, value in params.items() if value is not None}


def replayed(**fields) -> object:
    moe = layer()
    return moe(x(), replay=routing(moe)._replace(**fields))


ALWAYS: dict[str, tuple[Callable[[], object], str]] = {
    "width": (lambda: layer()(x(2, 7, 5)), "x has shape (2, 7, 5); it must be (…, S, 6)"),
    "vector": (lambda: layer()(x(6)), "x has shape (6,); it must be (…, S, 6)"),
    "integer-x": (lambda: layer()(torch.ones(7, 6, dtype=torch.int64)), "x must be a float tensor, got torch.int64"),
    "numpy-x": (lambda: layer()(np.ones((7, 6))), "x must be a float tensor, got float64"),
    "list-x": (lambda: layer()([[0.0] * 6]), "x must be a float tensor, got list"),
    "dtype-of-x": (lambda: layer()(x(dtype=torch.float64)), "router.weight has dtype torch.float32 but x has torch.float64"),
    "pad-shape": (
        lambda: layer()(x(), pad_mask=torch.zeros(14, dtype=torch.bool)),
        "pad_mask has shape (14,); x has tokens of shape (2, 7)",
    ),
    "pad-dtype": (lambda: layer()(x(), pad_mask=torch.zeros(2, 7)), "pad_mask has dtype torch.float32; it must be bool"),
    "pad-list": (lambda: layer()(x(), pad_mask=[False]), "pad_mask must be a tensor, got list"),
    "group-shape": (lambda: layer()(x(), group_ids=torch.zeros(2, dtype=torch.int64)), "group_ids has shape (2,)"),
    "group-dtype": (lambda: layer()(x(), group_ids=torch.zeros(2, 7)), "group_ids has dtype torch.float32; it must be integer"),
    "ids-bool": (lambda: layer()(x(), token_ids=torch.zeros(2, 7, dtype=torch.bool)), "token_ids has dtype torch.bool; it must be integer"),
    "replay-tokens": (lambda: layer()(x(3, 7, 6), replay=routing(layer())), "replay.expert has shape (14, 2); this pass needs (21, 2)"),
    "replay-keep": (lambda: replayed(keep=torch.ones(14, 1, dtype=torch.bool)), "replay.keep has shape (14, 1), replay.expert (14, 2)"),
    "replay-choices": (
        lambda: replayed(expert=torch.zeros(14, 3, dtype=torch.int64)),
        "replay.expert has shape (14, 3); this pass needs (14, 2)",
    ),
    "replay-expert-dtype": (lambda: replayed(expert=torch.zeros(14, 2)), "replay.expert has dtype torch.float32; it must be integer"),
    "replay-keep-dtype": (lambda: replayed(keep=torch.ones(14, 2)), "replay.keep has dtype torch.float32; it must be bool"),
    "hash-ids": (lambda: MoE(HASHED)(x()), "gating.choice is 'hash', which looks token ids up: pass token_ids="),
    "penalty-load": (lambda: MoE(PENALIZED).update_penalty(torch.ones(4), 2), "load has shape (4,); the layer has 5 experts"),
    "replay-load": (lambda: replayed(load=torch.ones(4)), "replay.load has shape (4,); the layer has 5 experts"),
    "replay-draws": (lambda: MoE(JITTERED)(x(), replay=routing(layer())), "replay holds no draws named 'jitter'"),
    "replay-draw-shape": (
        lambda: MoE(JITTERED)(x(), replay=routing(layer())._replace(draws={"jitter": torch.rand(3)})),
        "replay holds draws 'jitter' of shape (3,); this pass needs (14, 6)",
    ),
    "load": (lambda: layer().update_bias(torch.ones(4)), "load has shape (4,); the layer has 5 experts"),
    "config": (lambda: MoE({"d_model": 6}), "config must be a MoEConfig, got {'d_model': 6}"),
    "layer-dtype": (lambda: MoE(CONFIG, dtype=torch.int64), "dtype is torch.int64; parameters must be floating point"),
    "missing": (lambda: route(x(7, 6), changed_params("router.weight", None), CONFIG), "params has no 'router.weight'"),
    "shape": (
        lambda: route(x(7, 6), changed_params("router.weight", x(6, 5)), CONFIG),
        "router.weight has shape (6, 5); this config needs (5, 6)",
    ),
    "expert-shape": (
        lambda: apply_experts(x(14, 6), routing(layer()), changed_params("experts.down_proj", x(5, 4, 6)), CONFIG),
        "experts.down_proj has shape (5, 4, 6); this config needs (5, 6, 4)",
    ),
}  # fmt: skip


def with_value(value: float) -> Tensor:
    tensor = x()
    tensor[1, 2, 3] = value
    return tensor


def padding_kept() -> object:
    moe, pad_mask = layer(), torch.arange(14).reshape(2, 7) == 13
    return moe(x(), pad_mask=pad_mask, replay=routing(moe))


def out_of_range() -> object:
    return replayed(expert=torch.full((14, 2), 5))


ON_DEMAND: dict[str, tuple[Callable[[], object], str]] = {
    "nan": (lambda: layer()(with_value(float("nan"))), "x holds NaN or infinity, in tokens [9]"),
    "infinity": (lambda: layer()(with_value(float("-inf"))), "x holds NaN or infinity, in tokens [9]"),
    "parameter": (lambda: route(x(7, 6), changed_params("router.weight", x(5, 6) / 0), CONFIG), "router.weight holds NaN or infinity"),
    "replay-padding": (padding_kept, "replay keeps assignments of padding, in tokens [13]"),
    "hash-id": (
        lambda: MoE(HASHED)(x(), token_ids=torch.full((2, 7), 9)),
        "token_ids has ids 9 … 9; router.hash_table has 9 rows",
    ),
    "replay-id": (out_of_range, "replay.expert has ids 5 … 5; the layer has 5 experts"),
}


@pytest.mark.parametrize("name", ALWAYS)
def test_shapes_and_dtypes_are_always_checked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEBIUS_CHECK", raising=False)
    act, message = ALWAYS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        act()


@pytest.mark.parametrize("name", ON_DEMAND)
def test_values_are_checked_on_demand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEBIUS_CHECK", "1")
    act, message = ON_DEMAND[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        act()


@pytest.mark.parametrize("name", ["nan", "infinity", "parameter"])
def test_values_are_not_checked_otherwise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEBIUS_CHECK", raising=False)
    ON_DEMAND[name][0]()


def test_an_id_of_no_expert_is_left_to_pytorch_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEBIUS_CHECK", raising=False)
    with pytest.raises(RuntimeError, match="out of bounds"):
        out_of_range()


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (2, 7, 6)])
def test_good_input_passes_all_checks(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEBIUS_CHECK", "1")
    moe, tokens = layer(), shape[:-1]
    aux = moe(
        x(*shape), token_ids=torch.zeros(tokens, dtype=torch.int32), group_ids=torch.ones(tokens, dtype=torch.uint8),
        pad_mask=torch.zeros(tokens, dtype=torch.bool),
    )[1]  # fmt: skip
    y, _ = moe(x(*shape), replay=aux.routing)
    assert y.shape == shape and y.isfinite().all()


def test_mixed_dtypes_are_allowed_under_autocast_only() -> None:
    moe, tokens_SD = layer(), x(7, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert moe(tokens_SD)[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"torch\.bfloat16"):
        moe(tokens_SD)
