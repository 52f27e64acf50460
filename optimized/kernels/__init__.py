"""Triton kernels of the fast track and their launchers; `launch` is what the backend calls."""

from __future__ import annotations

from .interpreter import is_interpreting, repair

if is_interpreting():
    repair()
