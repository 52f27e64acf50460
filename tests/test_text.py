"""The corpus that needs no download: honest domains, parts that share nothing, the same bytes every time."""

from __future__ import annotations

import importlib
import operator
import os
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import text
from reference.text import (
    DOMAINS,
    arithmetic_documents,
    batches,
    code_documents,
    decode,
    encode,
    heldout_windows,
    load_corpus,
    prose_documents,
    split_documents,
)


@pytest.fixture(scope="module")
def corpus() -> text.Corpus:
    return load_corpus()


def test_each_domain_has_two_parts_without_a_common_document(corpus: text.Corpus) -> None:
    assert corpus.domains == ("code", "prose", "arithmetic")
    for domain in corpus.domains:
        train, heldout = corpus.train[domain], corpus.heldout[domain]
        assert train.dtype == heldout.dtype == np.uint8
        assert train.size > 50_000
        assert 0.05 < heldout.size / (train.size + heldout.size) <= 0.1
        names, heldout_names = corpus.train_names[domain], corpus.heldout_names[domain]
        assert not set(names) & set(heldout_names)
        assert len(heldout_names) >= 3
        assert sum(len(content) for _, content in DOMAINS[domain](0)) == train.size + heldout.size
    assert sum(part["code"].size for part in (corpus.train, corpus.heldout)) <= text.CODE_LIMIT


def test_code_is_the_library_and_its_files_stay_whole(corpus: text.Corpus) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    train, heldout = corpus.train["code"].tobytes(), corpus.heldout["code"].tobytes()
    for names, here, there in [(corpus.train_names, train, heldout), (corpus.heldout_names, heldout, train)]:
        longest = max(names["code"], key=lambda name: (library / name).stat().st_size)
        content = (library / longest).read_bytes()
        assert content in here
        assert content not in there
    names = corpus.train_names["code"] + corpus.heldout_names["code"]
    assert "argparse.py" in names
    assert not [
        name for name in names if {"test", "tests", "site-packages", "pydoc_data"} & set(name.split("/")) or "_sysconfigdata" in name
    ]


def test_no_heldout_paragraph_of_prose_is_trained_on(corpus: text.Corpus) -> None:
    def paragraphs(content: np.ndarray) -> list[str]:
        return [" ".join(paragraph.split()) for paragraph in decode(content).split("\n\n") if paragraph.strip()]

    train, heldout = paragraphs(corpus.train["prose"]), paragraphs(corpus.heldout["prose"])
    assert len(train) == len(set(train))
    assert not set(train) & set(heldout)
    # what makes the rule necessary: topics repeat each other
    topics = importlib.import_module("pydoc_data.topics").topics
    everywhere = [paragraph for content in topics.values() for paragraph in set(content.split("\n\n")) if len(paragraph) > 80]
    assert len(everywhere) > len(set(everywhere)) + 100


def test_prose_keeps_sentences_and_drops_the_rest() -> None:
    sentence = "The guard of a case is tried when its pattern has matched the subject."
    noise = [
        "Titles are short\n****************",
        "   >>> print('what stands behind a prompt is code and no prose')",
        "   if_stmt ::= the word if and an expression and a colon and a suite",
        "   total = the sum of all the numbers that came before this one",
        '| "x + y"  | sum |  +---+ | "x - y"  | difference | | "x * y" | product |',
    ]
    longer = "\n\n".join([sentence, *noise, sentence.replace("guard", "body")])
    found = dict(prose_documents({"for": sentence.replace(" a case", "\na case"), "compound": longer, "empty": noise[0]}))
    assert found == {"compound": f"{sentence}\n\n{sentence.replace('guard', 'body')}\n\n".encode()}


def test_arithmetic_is_right_and_a_heldout_pair_is_new(corpus: text.Corpus) -> None:
    operations = {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "%": operator.mod}
    pairs: dict[str, set[tuple[int, ...]]] = {}
    for part, content in [("train", corpus.train["arithmetic"]), ("heldout", corpus.heldout["arithmetic"])]:
        signs = set()
        for line in decode(content).splitlines():
            left, sign, right, equals, result = line.split()
            assert equals == "="
            assert operations[sign](int(left), int(right)) == int(result)
            pairs.setdefault(part, set()).add(tuple(sorted((int(left), int(right)))))
            signs.add(sign)
        assert signs == set(operations)
    assert not pairs["train"] & pairs["heldout"]
    assert max(max(pair) for pair in pairs["train"]) == 999
    assert min(min(pair) for pair in pairs["train"]) == 1


def test_the_same_every_time(corpus: text.Corpus) -> None:
    text._load_corpus.cache_clear()
    again = load_corpus()
    assert load_corpus(["code", "prose", "arithmetic"], heldout_share=0.1) is again
    assert again is not corpus
    assert again.fingerprint() == corpus.fingerprint()
    # generated text owes nothing to the Python version, so its fingerprint is a constant
    arithmetic = load_corpus(("arithmetic",))
    assert arithmetic.fingerprint() == "9e3fc3afd62d1b3a83df3ce8730eb41366219c2cc63c92ecd09c850172850a1b"
    assert load_corpus(("arithmetic",), seed=1).fingerprint() != arithmetic.fingerprint()
    assert load_corpus(("arithmetic", "prose")).fingerprint() != load_corpus(("prose", "arithmetic")).fingerprint()


def test_nobody_can_write_into_the_corpus(corpus: text.Corpus) -> None:
    with pytest.raises(ValueError, match="read-only"):
        corpus.train["code"][0] = 0
    with pytest.raises(TypeError):
        corpus.train["code"] = corpus.train["prose"]  # type: ignore[index]


def test_code_rules_on_a_small_library(tmp_path: Path) -> None:
    for name, content in {
        "b.py": b"b = 1\r\n",
        "a.py": b"a = 1\n",
        "package/c.py": b"c = '\xe9'\n",
        "package/test/t.py": b"t = 1\n",
        "site-packages/s.py": b"s = 1\n",
        "config-3/k.py": b"k = 1\n",
        "_sysconfigdata_x.py": b"x = 1\n",
        "empty.py": b"",
        "notes.txt": b"n\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content)
    os.symlink(tmp_path / "missing", tmp_path / "broken.py")
    found = list(code_documents(tmp_path))
    assert found == [("a.py", b"a = 1\n"), ("b.py", b"b = 1\n"), ("package/c.py", b"c = '\xe9'\n")]
    limited = list(code_documents(tmp_path, limit=13))
    assert len(limited) in (1, 2)
    assert set(limited) < set(found)
    assert list(code_documents(tmp_path / "nowhere")) == []


def test_split_fills_the_share_with_whole_names() -> None:
    documents = [(f"{i % 40}", bytes(10)) for i in range(80)]
    train, heldout = split_documents(documents, 0.25)
    assert len(heldout) == 20
    assert sorted(train + heldout) == sorted(documents)
    assert not {name for name, _ in train} & {name for name, _ in heldout}
    assert [name for name, _ in train] == [name for name, _ in documents if name in dict(train)]
    # a document that is larger than the share stays in training; where all are, the smallest is held out
    large = [("large", bytes(1000)), *documents]
    assert "large" not in dict(split_documents(large, 0.25)[1])
    assert split_documents([("a", bytes(9)), ("b", bytes(8)), ("c", bytes(9))], 0.1)[1] == [("b", bytes(8))]


def test_missing_text_names_the_domain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text._load_corpus.cache_clear()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match="domain 'prose': 0 documents"):
        load_corpus()
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match="domain 'code': 0 documents"):
        load_corpus(("code", "arithmetic"))
    assert load_corpus(("arithmetic",)).domains == ("arithmetic",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domains": ()}, "domains is empty"),
        ({"domains": ("poetry",)}, "'poetry' is unknown; known: code, prose, arithmetic"),
        ({"domains": ("code", "code")}, "twice"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"domains": ("arithmetic",), "heldout_share": 1.0}, "heldout_share is 1.0"),
        ({"domains": ("arithmetic",), "heldout_share": 0}, "heldout_share is 0"),
    ],
)
def test_bad_corpus(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_corpus(**options)


MARKED = {"low": np.arange(100, dtype=np.uint8), "high": np.arange(200, 240, dtype=np.uint8)}


def test_batches_are_windows_with_the_right_label(rng: np.random.Generator) -> None:
    seen, starts = np.zeros(2, int), set()
    stream = batches(MARKED, rng, 50, 8, {"low": 3, "high": 1})
    for _ in range(40):
        bytes_BS, domain_B = next(stream)
        assert bytes_BS.shape == (50, 8)
        assert bytes_BS.dtype == domain_B.dtype == np.int64
        assert (np.diff(bytes_BS, axis=1) == 1).all()
        np.testing.assert_array_equal(bytes_BS[:, 0] >= 200, domain_B == 1)
        seen += np.bincount(domain_B, minlength=2)
        starts |= set(bytes_BS[domain_B == 1, 0].tolist())
    assert seen[0] / seen.sum() == pytest.approx(0.75, abs=0.05)
    assert starts == set(range(200, 233))  # first and last window included


def test_batches_follow_the_generator_alone(corpus: text.Corpus) -> None:
    rng = np.random.default_rng(4)
    stream = batches(corpus.train, rng, 6, 33)
    next(stream)
    state = rng.bit_generator.state
    expected = [next(stream) for _ in range(3)]
    resumed = np.random.default_rng(0)
    resumed.bit_generator.state = state
    for (bytes_BS, domain_B), (again_BS, again_B) in zip(expected, batches(corpus.train, resumed, 6, 33), strict=False):
        np.testing.assert_array_equal(bytes_BS, again_BS)
        np.testing.assert_array_equal(domain_B, again_B)
    for row, domain in zip(bytes_BS, domain_B, strict=True):
        assert row.astype(np.uint8).tobytes() in corpus.train[corpus.domains[domain]].tobytes()


def test_a_domain_without_weight_is_never_drawn(rng: np.random.Generator) -> None:
    for weights in ({"high": 2.0}, {"low": 0.0, "high": 1.0}):
        stream = batches(MARKED, rng, 64, 40, weights)
        assert (next(stream)[1] == 1).all()
    assert next(batches({"short": MARKED["low"][:3], "low": MARKED["low"]}, rng, 8, 50, {"low": 1}))[0].shape == (8, 50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"length": 0}, "length is 0"),
        ({"length": 41}, "length is 41 but domain 'high' has 40 bytes"),
        ({"domain_weights": {"poetry": 1}}, "'poetry'; known: low, high"),
        ({"domain_weights": {"low": -1}}, "'low' the weight -1"),
        ({"domain_weights": {"low": float("nan")}}, "weight nan"),
        ({"domain_weights": {"low": 0}}, "sum to 0"),
    ],
)
def test_bad_batches_fail_at_the_call(rng: np.random.Generator, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(**{"source": MARKED, "rng": rng, "batch": 2, "length": 4} | options)


def test_heldout_windows_lie_apart_and_never_change(corpus: text.Corpus) -> None:
    size = corpus.heldout["prose"].size
    for length, count in [(64, 10), (size // 7, 7), (size, 1), (1, size)]:
        windows_BS = heldout_windows(corpus, "prose", length, count)
        assert windows_BS.shape == (count, length)
        assert windows_BS.dtype == np.int64
        np.testing.assert_array_equal(windows_BS, heldout_windows(corpus, "prose", length, count))
    np.testing.assert_array_equal(windows_BS[:, 0], corpus.heldout["prose"])
    small = text.Corpus(("a",), train={}, heldout={"a": np.arange(250, dtype=np.uint8)}, train_names={}, heldout_names={})
    shown = heldout_windows(small, "a", 35, 7).ravel()
    assert len(set(shown.tolist())) == 7 * 35


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("poetry", 8, 1), "'poetry' is unknown"),
        (("prose", 0, 1), "length is 0 and count 1"),
        (("prose", 8, 0), "length is 8 and count 0"),
        (("prose", 1000, 10_000), "10000 windows of 1000 bytes, but domain 'prose' holds out"),
    ],
)
def test_bad_windows(corpus: text.Corpus, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        heldout_windows(corpus, *arguments)


@given(st.binary())
def test_no_byte_is_lost(content: bytes) -> None:
    values = np.frombuffer(content, dtype=np.uint8)
    np.testing.assert_array_equal(encode(decode(values)), values)
    decode(values, errors="replace").encode()


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_no_character_is_lost(content: str) -> None:
    bytes_S = encode(content)
    assert bytes_S.dtype == np.int64
    assert decode(bytes_S) == content
    assert bytes_S.size == len(content.encode())


@pytest.mark.parametrize(
    ("values", "message"),
    [([-1], "from -1 to -1"), ([3, 256], "from 3 to 256"), ([[1, 2]], r"\(1, 2\)"), ([0.5], "float64")],
)
def test_bad_bytes(values: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(values)


def test_arithmetic_documents_are_named_by_their_operands() -> None:
    for name, line in arithmetic_documents(seed=3, lines=50):
        left, _, right, *_ = line.decode().split()
        assert name == f"{min(int(left), int(right))},{max(int(left), int(right))}"
