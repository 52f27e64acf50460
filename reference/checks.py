"""What configs refuse: one function for each kind of value."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds; messages name the value and the limit."""
    if not condition:
        raise ValueError(message)


def is_count(value: Any, least: int) -> bool:
    """Whether the value is an integer (not a bool) of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_amount(value: Any) -> bool:
    """Whether the value is a finite number ≥ 0 (not a bool)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def named_pairs(value: Any, where: str) -> tuple[tuple[str, Any], ...]:
    """The value as a tuple of pairs (name, whatever). Raises ValueError, naming `where`, for anything else."""
    fits = isinstance(value, (list, tuple)) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value)
    require(fits, f"{where} is {value!r}; it must be a sequence of pairs (name, number)")
    return tuple((str(name), second) for name, second in value)


def check_flags(config: Any, where: str = "") -> None:
    """ValueError unless every field of a dataclass that is declared `bool` is one: the text "false" of a hand-written file is true."""
    for field in dataclasses.fields(config):
        if field.type == "bool":
            value = getattr(config, field.name)
            require(isinstance(value, bool), f"{where}{field.name} is {value!r}; it must be True or False")


def known_fields(cls: type, data: Any) -> dict[str, Any]:
    """`data` as keyword arguments of the dataclass; ValueError names the first field that it does not have."""
    require(isinstance(data, dict), f"{cls.__name__} wants a mapping of fields, got {data!r}")
    names = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        require(key in names, f"{cls.__name__} has no field {key!r}; known: {', '.join(names)}")
    return data
