"""Sampling: the cut of the distribution, equal seeds, windows, and values outside their range."""

from __future__ import annotations

import pytest
import torch
from conftest import REPOSITORY
from language_models import model_config, random_model
from tracer import traced

from reference.autograd.sampling import START, Reader, sample, token_probabilities

MODEL = random_model(model_config())
LOGITS = torch.tensor([1.0, 3.0, 2.0, 3.0, -1.0])


def test_probabilities_are_a_softmax_with_temperature() -> None:
    torch.testing.assert_close(token_probabilities(LOGITS, 0.5), torch.softmax(LOGITS.double() / 0.5, 0))
    assert token_probabilities(LOGITS, 0).tolist() == [0, 1, 0, 0, 0]
    assert token_probabilities(LOGITS, 1e-320).tolist() == [0, 0.5, 0, 0.5, 0], "a quotient has overflowed"


@pytest.mark.parametrize("top_k, stay", [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (5, [0, 1, 2, 3, 4])])
def test_top_k_keeps_the_most_probable(top_k: int, stay: list[int]) -> None:
    found, whole = token_probabilities(LOGITS, 1.0, top_k=top_k), torch.softmax(LOGITS.double(), 0)
    assert found.nonzero().flatten().tolist() == stay
    torch.testing.assert_close(found[stay], whole[stay] / whole[stay].sum())


# The probabilities are .054 .397 .146 .397 .007 in order of id.
@pytest.mark.parametrize("top_p, stay", [(0.1, [1]), (0.4, [1, 3]), (0.85, [1, 2, 3]), (0.95, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3, 4])])
def test_top_p_keeps_the_fewest_that_reach_p(top_p: float, stay: list[int]) -> None:
    found, whole = token_probabilities(LOGITS, 1.0, top_p=top_p), torch.softmax(LOGITS.double(), 0)
    assert found.nonzero().flatten().tolist() == stay
    torch.testing.assert_close(found[stay], whole[stay] / whole[stay].sum())


def test_top_k_cuts_before_top_p() -> None:
    assert token_probabilities(LOGITS, 1.0, top_k=2, top_p=0.49).nonzero().flatten().tolist() == [1]
    assert token_probabilities(LOGITS, 1.0, top_p=0.49).nonzero().flatten().tolist() == [1, 3]


def test_greedy_bytes_are_the_argmax_of_the_whole_pass() -> None:
    """With a cache and without: bytes that fit into the window come from one and the same model."""
    text = list(b"import")
    for _ in range(12):
        text.append(int(MODEL.eval()(torch.tensor([text]))[0][0, -1].argmax()))
    assert sample(MODEL, b"import", 12, temperature=0) == bytes(text[6:])


@pytest.mark.parametrize("window, context", [(8, 8), (2, 2), (9, 9)])
def test_a_full_window_is_read_anew_from_its_last_half(window: int, context: int) -> None:
    reader, model = Reader(MODEL.eval(), window), MODEL.eval()
    text = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    start = 0
    for end in range(1, 41):
        found = reader.read(text[end - 1 : end])
        if end - start > window:
            start = end - window // 2
        torch.testing.assert_close(found, model(torch.tensor([text[start:end]]))[0][0, -1], rtol=1e-9, atol=1e-10)


def test_seeds_decide() -> None:
    first = sample(MODEL, b"x = ", 40, seed=3)
    assert first == sample(MODEL, b"x = ", 40, seed=3) and len(first) == 40
    assert first != sample(MODEL, b"x = ", 40, seed=4)
    torch.manual_seed(9)
    assert first == sample(MODEL, b"x = ", 40, seed=3)


def test_frequencies_follow_the_probabilities() -> None:
    logits_V = MODEL.eval()(torch.tensor([list(b"ab")]))[0][0, -1]
    expected = token_probabilities(logits_V, 0.7, top_k=3)
    drawn = torch.tensor([sample(MODEL, b"ab", 1, temperature=0.7, top_k=3, seed=seed)[0] for seed in range(250)])
    found = torch.bincount(drawn, minlength=256) / 250
    assert (found - expected).abs().max() < 0.12 and found.nonzero().flatten().tolist() == expected.nonzero().flatten().tolist()


def test_empty_prompt_long_prompt_and_no_bytes() -> None:
    assert sample(MODEL, b"", 5, seed=1) == sample(MODEL, START, 5, seed=1)
    assert sample(MODEL, b"y" * 100 + b"z" * 8, 3, window=8) == sample(MODEL, b"z" * 8, 3, window=8)
    assert sample(MODEL, b"abc", 0) == b""


def test_mode_is_put_back() -> None:
    for training in (True, False):
        MODEL.train(training)
        sample(MODEL, b"a", 2)
        assert MODEL.training is training


def test_mode_is_put_back_after_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    MODEL.train()
    monkeypatch.setattr(Reader, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sample(MODEL, b"a", 2)
    assert MODEL.training


@pytest.mark.parametrize(
    "message, options",
    [
        ("temperature is -1", dict(temperature=-1.0)),
        ("temperature is nan", dict(temperature=float("nan"))),
        ("top_k is 0; it must lie between 1 and 256", dict(top_k=0)),
        ("top_k is 257", dict(top_k=257)),
        ("top_p is 0", dict(top_p=0.0)),
        ("top_p is 1.5", dict(top_p=1.5)),
        ("count is -2", dict(count=-2)),
        ("window is 1", dict(window=1)),
        ("seed is -1; it must lie between", dict(seed=-1)),
        ("seed is 9223372036854775808", dict(seed=2**63)),
    ],
)
def test_bad_values_are_named(message: str, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=message):
        sample(MODEL, b"a", **{"count": 3, **options})


def test_models_that_cannot_be_sampled() -> None:
    with pytest.raises(ValueError, match="vocabulary is 300"):
        sample(random_model(model_config(vocabulary=300)), b"a", 3)
    with pytest.raises(ValueError, match="window is 256, but the model has max_positions = 32"):
        sample(random_model(model_config(max_positions=32)), b"a", 3)


def test_suffixes_are_shapes() -> None:
    with traced(REPOSITORY / "reference" / "autograd") as trace:
        sample(MODEL, b"abc", 6, top_k=9, top_p=0.9, window=4)
    assert not trace.errors, trace.errors[:5]
