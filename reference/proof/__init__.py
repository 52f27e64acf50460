"""The proof that the tracks are equal, as code: the policy (`equal`), the cases (`cases`) and the bug museum (`bugs`).

Tests, notebook checkers, `moebius parity`, the benchmark's gate and `make gpu-check` call these same functions.
"""
