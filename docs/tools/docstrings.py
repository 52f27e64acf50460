"""Docstrings as Markdown, for the pages of the API: lists of fields and labelled parts become definition lists, what is named is a link.

The docstrings are set for reading in the source: a field and its meaning stand in two columns, and `Shapes:`, `Source:` and so on begin
a line or a sentence. Markdown would run all of this together. What stands inside a line, marks.py sees to.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import griffe

from reference.notation import EQUATIONS

sys.path.insert(0, str(Path(__file__).parent))  # mkdocstrings loads this file from its path
from api import has_page
from marks import mark

LABELS = ("Shapes", "Gradient", "Returns", "Raises", "Source", "Deviates")
LABEL = re.compile(rf"(?:^|(?<=[.;)] ))({'|'.join(LABELS)}): ")
RAISES = re.compile(r"(?:^|(?<=[.;)] ))Raises (?=[A-Z]\w*Error)(?P<text>(?:(?!\. [A-Z]).)*)$")
"""A last sentence that says what is raised."""
FIELD = re.compile(r"^(?P<names>\w+(?:, \w+)*) {2,}(?P<text>\S.*)$")
VERBATIM, LISTED = re.compile(r" {4}|>>> |```"), re.compile(r"- |\d+\. ")
EQUATION = re.compile(r"\((" + "|".join(map(re.escape, EQUATIONS)) + r")\)")
CODE = re.compile(r"`([A-Za-z_][\w.]*)`")
Entry = tuple[str, str]


def definition(term: str, text: str) -> str:
    """An entry of a definition list."""
    told = re.sub(r"[ \n]+", " ", text.strip())  # but no space that marks.py wants kept
    return f"{term}\n:   {told}\n"


def code(names: str) -> str:
    """Names with commas between them, each as code."""
    return ", ".join(f"`{name}`" for name in names.split(", "))


def parts(text: str, arguments: Set[str]) -> list[Entry]:
    """What a text says of arguments one after the other: `x [T, D]: the tokens; count: how many`. Empty unless it begins so."""
    if not arguments:
        return []
    either = "|".join(sorted(map(re.escape, arguments), key=len, reverse=True))
    head, *found = re.split(rf"(?:^|(?<=[;.] ))((?:{either})(?:, (?:{either}))*(?: \[[^\]]*\])?): ", text)
    terms = (f"`{term}`" if "[" in term else code(term) for term in found[::2])
    return [] if head else list(zip(terms, (said.rstrip(" ;") for said in found[1::2]), strict=True))


def fields(lines: Sequence[str], arguments: Set[str] = frozenset()) -> tuple[list[Entry], list[str]]:
    """Lines `name  meaning` and what continues them, further in, as entries; and the lines behind them."""
    entries: list[list[str]] = []
    for place, line in enumerate(lines):
        if found := FIELD.match(line):
            entries.append([found["names"], found["text"]])
        elif entries and line.startswith(" "):
            entries[-1][1] += " " + line.strip()
        else:
            rest = list(lines[place:])
            break
    else:
        rest = []
    told: list[Entry] = []
    for names, text in entries:
        first = names.split(", ")[0]
        (_, meaning), *further = parts(f"{first}: {' '.join(text.split())}", arguments | {first})
        told += [(code(names), meaning), *further]
    return told, rest


def labelled(paragraph: str) -> tuple[str, list[Entry]]:
    """What a paragraph says; and from its first label on, each label with what stands behind it, in the order of LABELS."""
    head, *rest = LABEL.split(" ".join(paragraph.split()))
    entries: list[Entry] = []
    for label, text in [("", head), *zip(rest[::2], rest[1::2], strict=True)]:
        raises = RAISES.search(text)
        said = (text[: raises.start()] if raises else text).strip()
        if label:
            entries.append((label, said))
        else:
            head = said
        entries += [("Raises", raises["text"])] if raises else []
    return head, in_order(entries)


def in_order(entries: list[Entry]) -> list[Entry]:
    """Labels with their texts, one order on all pages."""
    return sorted(entries, key=lambda entry: LABELS.index(entry[0]))


def markdown(text: str, arguments: Set[str] = frozenset(), names: Set[str] = frozenset()) -> str:
    """A docstring, its blocks one by one; what else is indented as a whole is code and stays.

    `arguments`: what the function or class takes; `names`: see `marks.mark`.
    """
    blocks: list[str] = []

    def tell(entries: list[Entry]) -> None:
        if entries:
            blocks.append("\n".join(definition(term, mark(said, names, values=True)) for term, said in entries))

    raised: list[Entry] = []  # what a sentence within the text says of errors stands below the text
    *_, last_block = all_blocks = re.split(r"\n\s*\n", text)
    for block in all_blocks:
        listed, rest = fields(textwrap.dedent(block).splitlines(), arguments)
        if not listed and VERBATIM.match(block):
            blocks.append(block)
        elif not listed and LISTED.match(block):
            blocks.append(mark(block, names))
        else:
            head, entries = labelled("\n".join(rest))
            told = parts(head, arguments)
            if told:  # what is more than a sentence is not about the last argument alone
                (term, last), head = told[-1], ""
                if found := re.search(r"\. (?=[A-Z])", last):
                    told[-1], head = (term, last[: found.start() + 1]), last[found.end() :]
            tell(listed + told)
            blocks += [mark(head, names)] if head else []
            if block is not last_block and {label for label, _ in entries} == {"Raises"}:
                raised += entries
                continue
            tell(in_order(raised + entries))
            raised = []
    tell(raised)
    return EQUATION.sub(linked, "\n\n".join(blocks))


def linked(match: re.Match[str]) -> str:
    """The id of an equation as a reference to its heading: MkDocs and Zensical see a relative HTML link from different places."""
    return f"([{match[1]}][eq-{match[1]}])"


def crossed(text: str, find: Callable[[str], str | None]) -> str:
    """Markdown in which a name set as code leads to where `find` says that it is documented, if that is on a page."""

    def reference(match: re.Match[str]) -> str:
        path = find(match[1])
        if path and has_page(path):
            return f"[`{match[1]}`][{path.replace('.', '')}]"  # its page's title, whose anchor has no dots
        return f'<autoref identifier="{path}" optional><code>{match[1]}</code></autoref>' if path else match[0]

    return CODE.sub(reference, text)


def objects(parent: griffe.Object) -> Iterator[griffe.Object]:
    """A module or class and all that is defined in it."""
    yield parent
    for member in parent.members.values():
        if not member.is_alias:
            yield from objects(member)


def arguments_of(obj: griffe.Object) -> set[str]:
    """What a function takes, or the fields of a class and what its making takes; also without the letters of the shape."""
    made = obj.members.get("__init__") if obj.is_class else obj
    taken = {parameter.name for parameter in made.parameters} if made and made.is_function else set()
    taken |= {name for name, member in obj.members.items() if member.is_attribute} if obj.is_class else set()
    return taken | {re.sub(r"_[A-Z]+$", "", name) for name in taken} - {"self", "cls"}


def constructor(named_tuple: griffe.Class) -> griffe.Function:
    """How a NamedTuple is made, which nobody writes down: its fields in their order."""
    fields = [member for member in named_tuple.members.values() if member.is_attribute and "property" not in member.labels]
    kind = griffe.ParameterKind.positional_or_keyword
    parameters = [griffe.Parameter("self", kind=kind)]
    parameters += [griffe.Parameter(field.name, annotation=field.annotation, kind=kind, default=field.value) for field in fields]
    return griffe.Function("__init__", parameters=griffe.Parameters(*parameters))


class DocstringMarkdown(griffe.Extension):
    """Applies `markdown` to everything that mkdocstrings reads."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Called for each package when all of it has been read."""
        found = list(objects(pkg))
        for obj in found:
            if obj.is_class and "NamedTuple" in map(str, obj.bases):
                obj.set_member("__init__", constructor(obj))
        known = [obj for package in loader.modules_collection.members.values() for obj in objects(package)]
        names = {obj.name for obj in known} | {name for obj in known if obj.is_function for name in arguments_of(obj)}
        for obj in found:
            if obj.is_module and obj.exports:  # what has a page of its own is told there
                moved = {
                    name for name, member in obj.members.items() if member.is_alias and has_page(member.target_path.rpartition(".")[0])
                }
                obj.exports = [name for name in obj.exports if str(name) not in moved]
            if obj.docstring:
                told = markdown(obj.docstring.value, arguments_of(obj), names)
                obj.docstring.value = crossed(told, lambda name, obj=obj: home(name, obj, loader))


def home(name: str, obj: griffe.Object, loader: griffe.GriffeLoader) -> str | None:
    """The dotted name under which what a docstring of `obj` calls `name` is defined; None if it is nothing of ours, or of `obj` itself."""
    first = name.split(".")[0]
    if first in arguments_of(obj) or name == obj.name:
        return None
    package = obj.module.path if obj.module.is_init_module else obj.module.path.rpartition(".")[0]
    for start in (obj.path, obj.module.path, package, ""):
        try:
            found = loader.modules_collection[f"{start}.{name}".lstrip(".").removesuffix(".py")]
            while not found.docstring and found.parent and found.parent.is_class:  # a field is told by its class
                found = found.parent
            return found.canonical_path
        except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
            continue
    return None
