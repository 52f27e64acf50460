"""A kernel module with one line of defence taken away, in memory: the files stay as they are."""

from __future__ import annotations

import importlib
import linecache
import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "optimized.kernels"


@dataclass(frozen=True)
class Fault:
    """One wrong edit of a kernel.

    name, defence   what is wrong, and what the right text is there for
    module          of `optimized.kernels`;  old, new: the text that is replaced (it occurs exactly once) and what replaces it
    check, on       the check of `faults.checks` that must catch it, and on which of that check's inputs
    means           by which means the check catches it, of `faults.checks.MEANS`
    fast            whether `make test` runs it too
    """

    name: str
    defence: str
    module: str
    old: str
    new: str
    check: str
    on: str
    means: str
    fast: bool = False

    @property
    def kernel(self) -> str:
        """The function in whose text the fault lies."""
        before = source_of(self.module).split(self.old)[0]
        return re.findall(r"^def (\w+)", before + self.old.split("\n")[0], re.MULTILINE)[-1]


def source_of(module: str) -> str:
    """The text of a module of `optimized.kernels`."""
    return Path(str(importlib.import_module(f"{PACKAGE}.{module}").__file__)).read_text(encoding="utf-8")


def patched_source(source: str, old: str, new: str, where: str) -> str:
    """The source with `old` replaced. Raises ValueError unless it occurs exactly once: a fault that no longer fits is no fault."""
    if (count := source.count(old)) != 1:
        raise ValueError(f"the text of a planted fault occurs {count} times in {where}, not once; fit the fault to the kernel:\n{old}")
    return source.replace(old, new)


def copy_with(fault: Fault) -> types.ModuleType:
    """A second module from the patched source. Triton reads a kernel's source through `inspect`, so the text is left in `linecache`."""
    original = importlib.import_module(f"{PACKAGE}.{fault.module}")
    source = patched_source(source_of(fault.module), fault.old, fault.new, f"{fault.module}.py")
    name = f"<{fault.module} with the fault: {fault.name}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    copy = types.ModuleType(original.__name__)
    copy.__dict__.update(__package__=PACKAGE, __file__=name)
    exec(compile(source, name, "exec"), copy.__dict__)
    return copy


@contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """Inside the block every module that holds a function or table of the fault's module holds that of the faulty copy instead."""
    original, copy = vars(importlib.import_module(f"{PACKAGE}.{fault.module}")), vars(copy_with(fault))
    own = {
        name: value for name, value in original.items() if name in copy and value is not copy[name] and not name.startswith("__")
    }  # what it imports is the same object in both
    replaced: list[tuple[dict[str, object], str, object]] = []
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        if getattr(module, "__name__", "").startswith(("optimized", "test_kernels")):
            replaced += [(names, name, value) for name, value in own.items() if names.get(name) is value]
    for names, name, _ in replaced:
        names[name] = copy[name]
    try:
        yield
    finally:
        for names, name, value in replaced:
            names[name] = value
