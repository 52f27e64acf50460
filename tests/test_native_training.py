"""Training on the fast path: the same run every time and after every interruption, close to the reference's, and no processor held idle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from language_models import RUN, model_config, tiny_corpus

from optimized import MoE, backends, tracks
from optimized.environment import DEFAULTS
from optimized.native import packing
from optimized.native.library import Library
from reference import presets
from reference.autograd import MoE as ReferenceMoE
from reference.autograd.training import TrainResult, train

CORPUS, MODEL = tiny_corpus(), model_config()
native = partial(MoE, backend="native")

if backends.why_not("native", torch.device("cpu"), torch.float32, MODEL.moe):
    pytest.skip("needs tool: cc", allow_module_level=True)


def run(moe_class: Callable[..., torch.nn.Module] = native, steps: int = RUN.steps, **options: object) -> TrainResult:
    # The schedule depends on the number of steps: an interrupted run is one that a callback ends.
    return train(MODEL, replace(RUN, steps=steps), CORPUS, progress=False, moe_class=moe_class, **options)


def assert_same(found: TrainResult, wanted: TrainResult) -> None:
    for name, tensor in wanted.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name


class StoppedError(Exception):
    pass


def test_a_run_on_the_native_path_is_the_same_after_any_interruption(tmp_path: Path) -> None:
    whole = run()
    assert_same(run(), whole)

    def stop(row: dict, model: torch.nn.Module) -> None:
        if row["step"] >= RUN.steps // 2:
            raise StoppedError

    often = replace(RUN, checkpoint_every=1)
    with pytest.raises(StoppedError):
        train(MODEL, often, CORPUS, progress=False, moe_class=native, out=tmp_path, callback=stop)
    resumed = train(MODEL, often, CORPUS, progress=False, moe_class=native, out=tmp_path, resume=True)
    assert_same(resumed, whole)


def test_a_run_on_two_threads_repeats_itself() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first = run(steps=3)
        assert_same(run(steps=3), first)
    finally:
        torch.set_num_threads(before)


def test_a_native_run_stays_near_the_references_and_its_checkpoint_is_the_references(tmp_path: Path) -> None:
    fast, slow = run(steps=6, out=tmp_path), run(ReferenceMoE, steps=6)
    for found, wanted in zip(fast.log, slow.log, strict=True):
        assert found["ce"] == pytest.approx(wanted["ce"], rel=1e-4)
    slow.model.load_state_dict(fast.model.state_dict(), strict=True)
    assert_same(run(ReferenceMoE, steps=6, out=tmp_path, resume=True), fast)


def test_training_packs_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed copy would be thrown away after each step."""
    packed = []
    monkeypatch.setattr(Library, "pack", lambda *arguments: packed.append(arguments))
    before = len(packing._entries)
    train(MODEL, replace(RUN, steps=4, evaluate_every=0), CORPUS, progress=False, moe_class=native)
    assert not packed and len(packing._entries) == before


def test_the_fastest_track_is_the_backend_that_auto_takes() -> None:
    config = presets.tiny("deepseek-v3")
    assert tracks.fastest(config, "float32").name == tracks.fastest(config, "bfloat16").name == "optimized native"
    assert tracks.fastest(config, "float64").name == tracks.YARDSTICK
    assert isinstance(tracks.fastest(config, "float32").module()(config), MoE)
    with pytest.raises(ValueError, match="no module"):
        tracks.TRACKS[tracks.TRUTH].module()


CHILD = """
import json, os, sys
from optimized import environment
late = environment.prepare_process()
import torch
print(json.dumps([late, {name: os.environ.get(name) for name in environment.DEFAULTS}, environment.prepare_process()]))
"""


def child(code: str, **variables: str) -> list:
    environment = {name: value for name, value in os.environ.items() if name not in DEFAULTS} | variables
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_commands_bound_how_long_openmp_waits_awake_and_leave_what_the_user_has_set() -> None:
    assert child(CHILD) == [[], DEFAULTS, []]
    assert child(CHILD, GOMP_SPINCOUNT="7") == [[], DEFAULTS | {"GOMP_SPINCOUNT": "7"}, []]
    assert child("import torch\n" + CHILD) == [list(DEFAULTS), dict.fromkeys(DEFAULTS), list(DEFAULTS)]
