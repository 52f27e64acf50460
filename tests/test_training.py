"""Training: the same run for the same seed, one bias update a step, what is skipped, what is logged, and that it learns."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from language_models import NOISY, RUN, model_config, tiny_corpus
from tracer import traced

from reference import AttentionConfig, text
from reference.autograd import MoE, tour_model, training
from reference.autograd.training import TrainConfig, TrainResult, batch_of_step, heldout_bits, learning_rate, make_optimizer, train
from reference.autograd.transformer import LanguageModel
from reference.cost import model_parameters, sum_parameters

CORPUS = tiny_corpus()
MODEL = model_config()


def run(model=MODEL, config: TrainConfig = RUN, **options: object) -> TrainResult:
    return train(model, config, CORPUS, progress=False, **options)


def same_bits(a: TrainResult, b: TrainResult) -> bool:
    """Equal parameters, buffers and logs; the speed is a measurement."""
    state_a, state_b = a.model.state_dict(), b.model.state_dict()
    logs = [[{**row, "tokens_per_second": 0} for row in result.log] for result in (a, b)]
    return state_a.keys() == state_b.keys() and all(torch.equal(state_a[n], state_b[n]) for n in state_a) and logs[0] == logs[1]


@pytest.mark.parametrize("model", [MODEL, NOISY], ids=["deepseek-v3", "gshard"])
def test_same_seed_is_the_same_run(model) -> None:
    torch.manual_seed(1)
    first = run(model)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = run(model)
    assert same_bits(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert not same_bits(first, run(model, replace(RUN, seed=1)))


def test_it_learns_and_the_log_says_so() -> None:
    result = run(config=replace(RUN, steps=60, batch=8, length=24, evaluate_every=30, log_every=10))
    first, last = result.log[0], result.log[-1]
    assert [row["step"] for row in result.log] == [10, 20, 30, 40, 50, 60]
    share = np.bincount(batch_of_step(CORPUS, replace(RUN, batch=500), 0).ravel()) / (500 * 17)
    unigram = -(share[share > 0] * np.log(share[share > 0])).sum()
    assert last["ce"] < unigram - 0.3 < first["ce"] < 6
    assert all(row["loss"] > row["ce"] and row["grad_norm"] > 0 and row["tokens_per_second"] > 0 for row in result.log)
    assert set(last["max_vio"]) == {"1", "2"} and last["drop_rate"] == 0 and last["dead_experts"] >= 0
    assert set(last["heldout"]) == {"sums", "words"} and "heldout" not in first
    assert sum(last["heldout"].values()) / 2 < unigram / math.log(2)
    assert json.loads(json.dumps(result.record, allow_nan=False)) == result.record
    assert not result.model.training


def test_drops_are_counted() -> None:
    rates = [row["drop_rate"] for row in run(NOISY).log]
    assert all(0 < rate < 1 for rate in rates)


def recording(updates: list[torch.Tensor]) -> type[MoE]:
    class Recording(MoE):
        def update_bias(self, load: torch.Tensor) -> None:
            updates.append(load.clone())
            super().update_bias(load)

    return Recording


def test_accumulation_is_the_whole_batch_with_one_bias_update_a_step() -> None:
    """The sequence-wise loss is a mean over sequences, so cutting the batch changes nothing but rounding."""
    config, results, loads = replace(RUN, steps=3, dtype="float64", checkpoint_every=0), [], []
    for parts in (1, 2, 4):
        updates: list[torch.Tensor] = []
        results.append(run(config=replace(config, accumulation=parts), moe_class=recording(updates)))
        loads.append(updates)
    assert len(loads[0]) == 3 * 2  # steps × MoE layers, whatever the accumulation
    assert int(loads[0][0].sum()) == config.batch * config.length * MODEL.moe.gating.top_k
    for result, updates in zip(results[1:], loads[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(loads[0], updates, strict=True))
        for a, b in zip(results[0].model.state_dict().values(), result.model.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        for field in ("loss", "ce", "grad_norm"):
            assert [row[field] for row in result.log] == pytest.approx([row[field] for row in results[0].log], rel=1e-8)


def test_activation_checkpointing_is_the_same_run() -> None:
    assert same_bits(run(NOISY), run(NOISY, replace(RUN, activation_checkpointing=True)))


def test_bias_moves_by_the_rate_and_never_twice() -> None:
    result = run(config=replace(RUN, steps=1))
    for moe in result.model.moe_layers().values():
        bias = moe.get_buffer("router.correction_bias")
        assert set(bias.abs().unique().tolist()) <= {0.0, np.float32(0.001)} and bias.abs().sum() > 0


class Spoiled(MoE):
    """Makes the gradients of the optimizer steps in `when` NaN."""

    when: frozenset[int] = frozenset()
    calls = 0

    def forward(self, x, **options):
        y, aux = super().forward(x, **options)
        if self.training:
            Spoiled.calls += 1
        return (y * float("nan") if self.training and (Spoiled.calls - 1) // 2 in self.when else y), aux


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    monkeypatch.setattr(Spoiled, "when", frozenset(steps))
    monkeypatch.setattr(Spoiled, "calls", 0)


def test_a_step_with_nan_is_skipped_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[dict[str, torch.Tensor]] = []

    def keep(row, model) -> None:
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    spoil(monkeypatch, 4)
    result = run(moe_class=Spoiled, callback=keep)
    bad = result.log[4]
    assert bad["step"] == 5 and bad["skipped"] == "the gradients' norm is nan" and bad["loss"] is None and bad["grad_norm"] is None
    assert all(torch.equal(states[3][name], states[4][name]) for name in states[3])
    assert not all(torch.equal(states[4][name], states[5][name]) for name in states[4])
    assert all(tensor.isfinite().all() for tensor in result.model.state_dict().values())
    assert not any("skipped" in row for row in result.log if row is not bad)
    json.dumps(result.log, allow_nan=False)


def test_patience_ends_a_run_that_does_not_recover(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(RUN, patience=3, log_every=100)
    spoil(monkeypatch, 2, 3, 5, 6, 7)
    with pytest.raises(FloatingPointError, match="steps 6 to 8 all had NaN or infinite gradients"):
        run(config=config, moe_class=Spoiled)
    spoil(monkeypatch, 2, 3, 5, 6)
    assert [row["step"] for row in run(config=config, moe_class=Spoiled).log] == [3, 4, 6, 7, 12]


def test_clipping_bounds_the_update() -> None:
    """Plain gradients pass through AdamW's first step scale-free, so the clip is seen in the moments."""
    states = {}
    for clip in (0.0, 0.01):
        model = LanguageModel(MODEL)
        config = replace(RUN, clip=clip, steps=1)
        state = training.Run(model, make_optimizer(model, config), config, CORPUS, "", [])
        result = training.optimizer_step(state, 0, batch_of_step(CORPUS, config, 0))
        moments = [m["exp_avg"] for m in state.optimizer.state.values()]
        states[clip] = torch.stack([m.square().sum() for m in moments]).sum().sqrt().item() / (1 - config.beta1), result.norm
    assert states[0.0][0] == pytest.approx(states[0.0][1], rel=1e-4)
    assert states[0.01][1] > 0.1 and states[0.01][0] == pytest.approx(0.01, rel=1e-3)


def test_only_matrices_decay() -> None:
    model = LanguageModel(model_config("biases", attention=AttentionConfig(heads=2, kv_heads=2, head_dim=4, bias=True, qk_norm=True)))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in make_optimizer(model, RUN).param_groups)
    assert {"embed_tokens.weight", "layers.1.mlp.router.weight", "layers.1.mlp.experts.up_proj", "layers.0.mlp.down_proj"} <= decayed
    assert {
        "norm.weight",
        "layers.1.mlp.experts.up_proj_bias",
        "layers.0.self_attn.q_proj.bias",
        "layers.0.self_attn.q_norm.weight",
    } <= free
    assert decayed | free == set(names.values()) and not decayed & free


def test_schedules() -> None:
    config = TrainConfig(steps=110, lr=1.0, warmup=10, final_lr=0.1)
    rates = [learning_rate(config, step) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1 and rates[60] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert {learning_rate(replace(config, schedule="constant"), step) for step in range(10, 110)} == {1.0}
    assert learning_rate(replace(config, warmup=0), 0) == 1.0


def test_batch_is_a_function_of_seed_and_step() -> None:
    first, other = batch_of_step(CORPUS, RUN, 7), batch_of_step(CORPUS, RUN, 8)
    assert first.shape == (RUN.batch, RUN.length + 1)
    assert np.array_equal(first, batch_of_step(CORPUS, RUN, 7)) and not np.array_equal(first, other)
    words = batch_of_step(CORPUS, replace(RUN, domain_weights=(("words", 1.0),)), 0)
    assert set(bytes(words.astype(np.uint8).ravel())) <= set(b"expert router token gate load")


def test_heldout_bits_are_the_mean_over_windows() -> None:
    torch.manual_seed(0)
    model = LanguageModel(MODEL, dtype=torch.float64).train()
    whole = heldout_bits(model, CORPUS, 16, 5, 5)
    assert model.training
    assert heldout_bits(model, CORPUS, 16, 5, 2) == pytest.approx(whole, rel=1e-12)
    assert all(7 < bits < 11 for bits in whole.values())


def test_heldout_losses_come_when_they_are_due_whatever_is_logged() -> None:
    log = run(config=replace(RUN, steps=8, log_every=5, evaluate_every=3, heldout=2)).log
    assert [row["step"] for row in log] == [3, 5, 6, 8]
    assert [row["step"] for row in log if "heldout" in row] == [3, 6, 8]


def test_a_directory_that_cannot_be_made_ends_a_run_before_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    seen: list[int] = []
    with pytest.raises(OSError, match="file"):
        train(
            MODEL,
            replace(RUN, log_every=1),
            CORPUS,
            out=tmp_path / "file",
            progress=False,
            callback=lambda row, _: seen.append(row["step"]),
        )
    assert seen == []


def test_mixed_precision_keeps_parameters_wide() -> None:
    result = run(config=replace(RUN, dtype="bfloat16"))
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert math.isfinite(result.log[-1]["ce"]) and result.log[-1]["ce"] != run().log[-1]["ce"]


BAD = {
    "steps is 0": dict(steps=0),
    "batch is 2.5": dict(batch=2.5),
    "accumulation is 3, which does not divide batch = 4": dict(batch=4, accumulation=3),
    "lr is nan": dict(lr=math.nan),
    "clip is -1": dict(clip=-1),
    "beta2 is 1": dict(beta2=1),
    "schedule is 'linear'; known: constant, cosine": dict(schedule="linear"),
    "dtype is 'int8'; known: float64, float32, bfloat16": dict(dtype="int8"),
    "seed is True": dict(seed=True),
    "keep is 0": dict(keep=0),
    "lr is True": dict(lr=True),
    "activation_checkpointing is 'no'; it must be True or False": dict(activation_checkpointing="no"),
    r"schedule is \['cosine'\]": dict(schedule=["cosine"]),
    r"dtype is \{\}": dict(dtype={}),
    "domain_weights is 5; it must be a sequence of pairs": dict(domain_weights=5),
    r"domain_weights is \['sums'\]": dict(domain_weights=["sums"]),
    "domain_weights gives 'sums' the weight 'x'": dict(domain_weights=(("sums", "x"),)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_configs_are_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**BAD[message])


def test_config_round_trips_through_json() -> None:
    config = replace(RUN, domain_weights=(("sums", 1.0), ("words", 2)))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="TrainConfig has no field 'momentum'"):
        TrainConfig.from_dict({"momentum": 0.9})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: run(model_config(vocabulary=100)), "vocabulary is 100"),
        (lambda: run(config=replace(RUN, length=50_000)), "length is 50001 but domain"),
        (lambda: run(config=replace(RUN, heldout=100)), "100 windows of 17 bytes, but domain 'sums' holds out 1500"),
        (lambda: run(config=replace(RUN, domain_weights=(("poems", 1.0),))), "names 'poems'"),
    ],
)
def test_what_does_not_fit_the_text(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_progress_bar_shows_loss_speed_and_violation(capsys: pytest.CaptureFixture[str]) -> None:
    train(MODEL, replace(RUN, steps=3), CORPUS)
    shown = capsys.readouterr().out
    assert "loss" in shown and "tokens/s" in shown and "MaxVio" in shown and "3/3" in shown
    run(config=replace(RUN, steps=3))
    assert capsys.readouterr().out.strip() == ""


def test_tour_fits_its_limits() -> None:
    size = 2 * sum_parameters(model_parameters(tour_model.TOUR_MODEL)).total
    assert size < 2_800_000  # bf16, with room for names and config below 3 MB
    for config in (tour_model.TOUR_TRAIN, tour_model.MODEL_TRAIN):
        weights = dict(config.domain_weights)
        assert set(weights) == set(text.DOMAINS) and sum(weights.values()) == pytest.approx(1)
        assert config.steps // config.log_every < 400  # rows of the committed log


def test_steps_are_fitted_to_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by 0.1 s whenever it is read: twice in a step of training, once in the probe."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) / 10)
    assert [tour_model.steps_in(seconds, MODEL, RUN, CORPUS) for seconds in (6.01, 60.01, 0.01)] == [20, 200, 1]
    with pytest.raises(ValueError, match="seconds is 0"):
        tour_model.steps_in(0, MODEL, RUN, CORPUS)


def test_suffixes_are_shapes() -> None:
    with traced(REPOSITORY / "reference" / "autograd") as trace:
        run(config=replace(RUN, steps=2, accumulation=2, evaluate_every=1))
    assert not trace.errors, trace.errors[:5]
