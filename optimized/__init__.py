"""The fast track: the layer of `reference.autograd` on kernels, equal to the reference by tests and interchangeable with it by import.

Same names and arguments as the reference, and a file only where it is faster; the rest it imports. `backends` is the table of
implementations, `contracts` the list of what each of them must equal.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any


def _check_reference(origin: str | None) -> None:
    """ImportError unless the `reference` that Python finds is the one beside this package: others use that name too."""
    expected = Path(__file__).resolve().parent.parent / "reference" / "__init__.py"
    if origin is None or Path(origin).resolve() != expected:
        raise ImportError(
            f"`import reference` finds {origin or 'no package'}, which shadows {expected}; "
            "remove it from the Python path, or run where this project's own package comes first"
        )


_spec = find_spec("reference")
_check_reference(_spec.origin if _spec else None)

if TYPE_CHECKING:
    from .layer import MoE, apply_experts, set_backend

__all__ = ["MoE", "apply_experts", "set_backend"]


def __getattr__(name: str) -> Any:  # the command line must not wait for PyTorch before it can print its help
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import layer

    return getattr(layer, name)
