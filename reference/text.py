"""Real text with no download: bytes with a domain label, from what Python itself ships, and arithmetic.

    code        the standard library's `.py` files as they are, comments and docstrings included
    prose       the running text of the language and library reference that `help()` shows, from `pydoc_data.topics`
    arithmetic  lines such as "37 + 485 = 522", generated

A token is a byte, so the vocabulary is 256 and no tokenizer is needed. A domain's documents (a file, a topic, an operand pair) go whole
to the training part or to the held-out part, chosen by a hash of their names.

Python's own text differs between its versions, patch releases and distributions. Two machines with one distribution of Python get the
same bytes; a result that depends on them records `Corpus.fingerprint()`.
"""

from __future__ import annotations

import hashlib
import importlib
import operator
import os
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike

from .config import require

CODE_LIMIT = 8_000_000
ARITHMETIC_LINES = 100_000

# Tests, tables of character codes, prose inside strings, what the build generates, and what some distributions package apart or leave out.
SKIPPED_DIRECTORIES = {
    "__phello__", "__pycache__", "dist-packages", "distutils", "encodings", "ensurepip", "idlelib", "lib-dynload", "lib2to3", "pydoc_data",
    "site-packages", "test", "tests", "tkinter", "turtledemo", "venv",
}  # fmt: skip
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")

OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}

Document = tuple[str, bytes]
"""(name, content)."""


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def code_documents(root: Path | None = None, limit: int = CODE_LIMIT) -> Iterator[Document]:
    """The standard library's source: one document a file, named by its path below `root` (the library's directory when None).

    Skipped: the directories and prefixes named above, empty files, and files that cannot be read. Line ends become "\\n". Files are taken
    in the order of a hash of their names until the next one would pass `limit` bytes, and come in the order of their names.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    paths = []
    for folder, directories, files in os.walk(root):
        directories[:] = [d for d in directories if d not in SKIPPED_DIRECTORIES and not d.startswith(SKIPPED_PREFIXES)]
        paths += [Path(folder, f) for f in files if f.endswith(".py") and not f.startswith(SKIPPED_PREFIXES)]
    taken, total = [], 0
    for name, path in sorted(((p.relative_to(root).as_posix(), p) for p in paths), key=lambda pair: _hash(pair[0])):
        try:
            content = path.read_bytes().replace(b"\r\n", b"\n")
        except OSError:
            continue
        if total + len(content) > limit:
            break
        total += len(content)
        taken += [(name, content)] if content else []
    yield from sorted(taken)


def _is_prose(paragraph: str) -> bool:
    """At least eight words, mostly letters and spaces, and no sign of a prompt, a grammar rule, a comment or an assignment."""
    words = " ".join(paragraph.split())
    plain = sum(c.isalpha() or c == " " for c in words)
    return words.count(" ") >= 7 and plain >= 0.85 * len(words) and not any(sign in words for sign in (">>>", "::=", " # ", " = "))


def prose_documents(topics: Mapping[str, str] | None = None) -> Iterator[Document]:
    """The reference text of `help()`: one document a topic, its paragraphs of running text without code, grammar and tables.

    `topics` maps names to text (`pydoc_data.topics.topics` when None; nothing where a distribution leaves that out). Long topics contain
    short ones word for word ("compound" contains "for"), which would carry training text into the held-out part. So every paragraph
    is kept once, in the longest topic that has it.
    """
    try:
        topics = dict(importlib.import_module("pydoc_data.topics").topics if topics is None else topics)
    except ImportError:
        return
    seen: set[str] = set()
    documents = []
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        kept = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if _is_prose(paragraph) and words not in seen:
                seen.add(words)
                kept.append(paragraph.strip("\n"))
        documents += [(name, ("\n\n".join(kept) + "\n\n").encode())] if kept else []
    yield from sorted(documents)


def arithmetic_documents(seed: int = 0, lines: int = ARITHMETIC_LINES) -> Iterator[Document]:
    """Lines "left sign right = result" over `OPERATIONS`: operands of up to one, two or three digits, never 0; division rounds down.

    The document's name is the unordered operand pair, so that a held-out pair is unseen in every operation and in both orders. The draws
    come from `random.Random.random`, the one generator method whose sequence Python promises to keep.
    """
    draw = random.Random(seed).random
    signs = tuple(OPERATIONS)
    for _ in range(lines):
        left, right = (1 + int(draw() * (10 ** (1 + int(draw() * 3)) - 1)) for _ in range(2))
        sign = signs[int(draw() * len(signs))]
        yield f"{min(left, right)},{max(left, right)}", f"{left} {sign} {right} = {OPERATIONS[sign](left, right)}\n".encode()


DOMAINS: Mapping[str, Callable[[int], Iterable[Document]]] = {
    "code": lambda seed: code_documents(),
    "prose": lambda seed: prose_documents(),
    "arithmetic": arithmetic_documents,
}


def split_documents(documents: Iterable[Document], heldout_share: float) -> tuple[list[Document], list[Document]]:
    """(train, held-out): in the order of a hash of their names, documents are held out while they fit into `heldout_share` of the bytes.

    Documents of one name stay together, and each part keeps the order of `documents`. Where no name fits, the smallest is held out. Raises
    ValueError unless 0 < heldout_share < 1 and there are two names, so that neither part is empty.
    """
    require(0 < heldout_share < 1, f"heldout_share is {heldout_share!r}; it must lie between 0 and 1")
    documents = list(documents)
    sizes: dict[str, int] = {}
    for name, content in documents:
        sizes[name] = sizes.get(name, 0) + len(content)
    require(len(sizes) >= 2, f"{len(sizes)} documents cannot be split into a training and a held-out part; at least 2 are needed")
    room, heldout = heldout_share * sum(sizes.values()), set()
    for name in sorted(sizes, key=_hash):
        if sizes[name] <= room:
            heldout.add(name)
            room -= sizes[name]
    heldout = heldout or {min(sizes, key=lambda name: (sizes[name], name))}
    return [d for d in documents if d[0] not in heldout], [d for d in documents if d[0] in heldout]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Bytes by domain, in two parts that share no document. Arrays are uint8, one-dimensional and read-only.

    domains                        names; a domain's id is its place here
    train, heldout                 domain → bytes, the documents one after the other
    train_names, heldout_names     domain → sorted names of the documents (files, topics, operand pairs) in that part
    """

    domains: tuple[str, ...]
    train: Mapping[str, np.ndarray] = field(repr=False)
    heldout: Mapping[str, np.ndarray] = field(repr=False)
    train_names: Mapping[str, tuple[str, ...]] = field(repr=False)
    heldout_names: Mapping[str, tuple[str, ...]] = field(repr=False)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of both parts with their domains and lengths: equal exactly when the text is."""
        digest = hashlib.sha256()
        for part in (self.train, self.heldout):
            for domain in self.domains:
                digest.update(f"{domain}:{part[domain].size}\n".encode())
                digest.update(part[domain].tobytes())
        return digest.hexdigest()


def load_corpus(domains: Iterable[str] = tuple(DOMAINS), heldout_share: float = 0.1, seed: int = 0) -> Corpus:
    """The corpus of these domains, read once and kept in memory: the same arguments give the same object.

    `seed` (an integer) chooses the arithmetic problems. Raises ValueError for no domain, an unknown or repeated one, a share outside
    (0, 1), and a domain of which this Python ships too little to split; name the other domains to go on without it.
    """
    domains = tuple(domains)
    require(len(domains) > 0, f"domains is empty; known: {', '.join(DOMAINS)}")
    require(len(set(domains)) == len(domains), f"domains names one twice: {domains}")
    for domain in domains:
        require(domain in DOMAINS, f"domain {domain!r} is unknown; known: {', '.join(DOMAINS)}")
    require(isinstance(seed, int), f"seed is {seed!r}; it must be an integer")
    return _load_corpus(domains, heldout_share, seed)


@lru_cache(maxsize=4)
def _load_corpus(domains: tuple[str, ...], heldout_share: float, seed: int) -> Corpus:
    train, heldout, train_names, heldout_names = {}, {}, {}, {}
    for domain in domains:
        try:
            parts = split_documents(DOMAINS[domain](seed), heldout_share)
        except ValueError as error:
            raise ValueError(f"domain {domain!r}: {error}") from error
        train[domain], heldout[domain] = (np.frombuffer(b"".join(content for _, content in part), dtype=np.uint8) for part in parts)
        train_names[domain], heldout_names[domain] = (tuple(sorted({name for name, _ in part})) for part in parts)
    read_only = MappingProxyType
    return Corpus(domains, read_only(train), read_only(heldout), read_only(train_names), read_only(heldout_names))


def _domain_probabilities(source: Mapping[str, np.ndarray], length: int, weights: Mapping[str, float] | None) -> np.ndarray:
    weights = dict.fromkeys(source, 1.0) if weights is None else weights
    for domain, weight in weights.items():
        require(domain in source, f"domain_weights names {domain!r}; known: {', '.join(source)}")
        require(np.isfinite(weight) and weight >= 0, f"domain_weights gives {domain!r} the weight {weight!r}; it must be finite and ≥ 0")
        size = source[domain].size
        require(weight == 0 or length <= size, f"length is {length} but domain {domain!r} has {size} bytes")
    total = sum(weights.values())
    require(total > 0, f"domain_weights sum to {total}; at least one must be positive")
    return np.array([weights.get(domain, 0.0) / total for domain in source])


def batches(
    source: Mapping[str, np.ndarray],
    rng: np.random.Generator,
    batch: int,
    length: int,
    domain_weights: Mapping[str, float] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless random windows (bytes_BS, domain_B) of one part, `corpus.train` or `corpus.heldout`.

    bytes_BS is int64 in [0, 256), a window of `length` bytes each; a language model that predicts the next byte asks for one more than it
    reads. domain_B is int64: the place of the window's domain in `source`. Domains are drawn in proportion to `domain_weights` (None:
    equally; a domain not named: never), places in them uniformly, documents' borders ignored. Nothing is drawn ahead and all state is
    that of `rng`: with the generator's state restored, the same batches follow.
    Raises ValueError, at the call, for a batch or length below 1, a length beyond a drawn domain, and unknown or unusable weights.
    """
    require(batch >= 1, f"batch is {batch}; it must be at least 1")
    require(length >= 1, f"length is {length}; it must be at least 1")
    return _draw_batches(source, rng, batch, length, _domain_probabilities(source, length, domain_weights))


def _draw_batches(
    source: Mapping[str, np.ndarray], rng: np.random.Generator, batch: int, length: int, probabilities: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    texts = tuple(source.values())
    while True:
        domain_B = rng.choice(len(texts), size=batch, p=probabilities)
        start_B = rng.integers(0, [texts[d].size - length + 1 for d in domain_B])
        bytes_BS = np.stack([texts[d][s : s + length] for d, s in zip(domain_B, start_B, strict=True)]).astype(np.int64)
        yield bytes_BS, domain_B


def heldout_windows(corpus: Corpus, domain: str, length: int, count: int) -> np.ndarray:
    """`count` evenly spaced windows of one domain's held-out bytes: bytes_BS int64, no two overlapping, the same on every call.

    Raises ValueError for an unknown domain, a length or count below 1, and more bytes than the domain holds out.
    """
    require(domain in corpus.heldout, f"domain {domain!r} is unknown; known: {', '.join(corpus.domains)}")
    text = corpus.heldout[domain]
    require(length >= 1 and count >= 1, f"length is {length} and count {count}; both must be at least 1")
    require(length * count <= text.size, f"{count} windows of {length} bytes, but domain {domain!r} holds out {text.size}")
    start_B = np.arange(count) * text.size // count
    return text[start_B[:, None] + np.arange(length)].astype(np.int64)


def encode(text: str) -> np.ndarray:
    """Text as its UTF-8 bytes: bytes_S, int64 in [0, 256). The inverse of `decode`, also for bytes that are no valid UTF-8."""
    return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8).astype(np.int64)


def decode(bytes_S: ArrayLike, errors: str = "surrogateescape") -> str:
    """Bytes as text. By default no byte is lost: `encode(decode(b))` is b for every b; `errors="replace"` gives text to print instead.

    Raises ValueError unless bytes_S is one-dimensional and holds integers in [0, 256).
    """
    bytes_S = np.asarray(bytes_S)
    require(bytes_S.ndim == 1, f"bytes_S has shape {bytes_S.shape}; it must have one dimension")
    if bytes_S.size == 0:
        return ""
    require(bytes_S.dtype.kind in "iu", f"bytes_S has dtype {bytes_S.dtype}; it must hold integers")
    least, most = bytes_S.min(), bytes_S.max()
    require(least >= 0 and most <= 255, f"bytes_S holds values from {least} to {most}; a byte lies between 0 and 255")
    return bytes_S.astype(np.uint8).tobytes().decode("utf-8", errors)
