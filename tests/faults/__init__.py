"""Faults planted into copies of the kernels, and what catches each of them: a check that no fault fails proves nothing."""
