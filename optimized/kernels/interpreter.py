"""Triton's interpreter with right arithmetic: bfloat16 that is bfloat16, tf32 that rounds, and device functions that cost less.

The stock interpreter (seen in 3.7.1 and 3.9.0) keeps a bfloat16 as the uint16 of its bits and lets NumPy add, compare and multiply those
integers, without an error; it truncates fp32 → bf16 where a GPU rounds to nearest even; it multiplies "tf32" operands unrounded; and it
leaves the order of a product's sums to BLAS, which on some processors (seen on Zen 5) differs from row to row of a tile.
`repair` replaces those operations. TRITON_INTERPRET=1 must be set before the first `import triton`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import JITFunction

COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}


def is_interpreting() -> bool:
    """Whether kernels run in Triton's interpreter: what `triton.language` itself was made for when it was imported."""
    return not isinstance(tl.sum, JITFunction)


def float32_of(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values of bfloat16 bit patterns, exactly."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def bfloat16_of(values: NDArray) -> NDArray[np.uint16]:
    """The bit patterns of values rounded to the nearest bfloat16, ties to even; a NaN stays one, what is too large becomes infinity."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def tf32_of(values: NDArray) -> NDArray[np.float32]:
    """fp32 operands as a tensor core takes them from Triton, which converts nothing: the low 13 bits of the mantissa are ignored."""
    values = np.ascontiguousarray(values, np.float32)
    cut = (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), cut, values)


def _is_bfloat16(handle: Any) -> bool:
    return getattr(handle.dtype, "scalar", handle.dtype) == tl.bfloat16


def _repair_casts(builder: Any, handle: Any) -> None:
    stock_cast, stock_convert = builder.cast_impl, builder.create_fp_to_fp

    def cast(self: Any, source: Any, target: Any) -> Any:
        own, wanted = source.dtype.scalar, target.scalar
        if own == wanted:
            return handle(source.data, wanted)
        if own == tl.bfloat16:
            values = handle(float32_of(source.data), tl.float32)
            return values if wanted == tl.float32 else stock_cast(self, values, target)
        if wanted == tl.bfloat16:
            return handle(bfloat16_of(source.data.astype(np.float32)), wanted)
        return stock_cast(self, source, target)

    def convert(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast(self, source, target)
        return stock_convert(self, source, target, rounding)

    # The class gave its casts to lambdas that look cast_impl up by name, so this reaches all of them.
    builder.cast_impl, builder.create_fp_to_fp = cast, convert


def _repair_elementwise(builder: Any, handle: Any) -> None:
    def widened(operand: Any) -> Any:
        return handle(float32_of(operand.data), tl.float32) if _is_bfloat16(operand) else operand

    def in_float32(stock: Callable[..., Any], operands: int) -> Callable[..., Any]:
        @functools.wraps(stock)
        def operation(self: Any, *arguments: Any) -> Any:
            tensors, rest = arguments[:operands], arguments[operands:]
            if not any(_is_bfloat16(tensor) for tensor in tensors):
                return stock(self, *arguments)
            if rest and rest[0] in COMPARISONS:
                return handle(rest[0](*(widened(tensor).data for tensor in tensors)), tl.int1)
            return handle(bfloat16_of(stock(self, *map(widened, tensors), *rest).data), tl.bfloat16)

        return operation

    builder.unary_op = in_float32(builder.unary_op, 1)
    builder.binary_op = in_float32(builder.binary_op, 2)
    builder.create_fma = in_float32(builder.create_fma, 3)
    builder.create_clampf = in_float32(builder.create_clampf, 3)


def _repair_reductions(interpreter: Any, handle: Any) -> None:
    def in_float32(kind: Any) -> None:
        stock = kind.apply_impl

        def apply(self: Any, tensors: Any) -> Any:
            narrow = [_is_bfloat16(tensor) for tensor in tensors]
            if not any(narrow):
                return stock(self, tensors)
            wide = (self.to_tensor(float32_of(t.handle.data), tl.float32) if n else t for t, n in zip(tensors, narrow, strict=True))
            results = stock(self, tuple(wide))
            single = not isinstance(results, (list, tuple))
            results = [results] if single else list(results)
            for place, result in enumerate(results):
                if place < len(narrow) and narrow[place]:
                    bits = bfloat16_of(result.handle.data)
                    shape = tl.block_type(tl.bfloat16, list(bits.shape)) if result.shape else tl.bfloat16
                    results[place] = tl.core.tensor(handle(bits, tl.bfloat16), shape)
            return results[0] if single else results

        kind.apply_impl = apply

    in_float32(interpreter.ReduceOps)
    in_float32(interpreter.ScanOps)


def ordered_product(left: NDArray, right: NDArray, dtype: Any) -> NDArray:
    """A tile's matrix product, every element summed in the order of the inner dimension; BLAS may take another order in each row."""
    return np.einsum("...mk,...kn->...mn", np.ascontiguousarray(left), np.ascontiguousarray(right), dtype=dtype)


def _repair_products(builder: Any, handle: Any) -> None:
    from triton._C.libtriton import ir

    stock = builder.create_dot

    def values(operand: Any, rounds: bool) -> NDArray:
        wide = float32_of(operand.data) if _is_bfloat16(operand) else operand.data
        return tf32_of(wide) if rounds else wide

    def dot(self: Any, left: Any, right: Any, accumulator: Any, precision: Any, imprecise: Any) -> Any:
        if any(operand.data.dtype == np.uint8 for operand in (left, right)):  # fp8, which the stock interpreter converts
            return stock(self, left, right, accumulator, precision, imprecise)
        rounds = left.data.dtype == np.float32 and precision == ir.INPUT_PRECISION.TF32
        start = values(accumulator, rounds=False)
        product = ordered_product(values(left, rounds), values(right, rounds), start.dtype) + start
        return handle(bfloat16_of(product) if _is_bfloat16(accumulator) else product, accumulator.dtype.scalar)

    builder.create_dot = dot


def _patch_the_language_once(interpreter: Any) -> None:
    """A call of a device function inside a kernel patches `triton.language` again, although the kernel's launch has done so."""
    stock = interpreter._patch_lang
    patched: set[tuple[int, ...]] = set()

    class Nothing:
        def restore(self) -> None:
            """There is nothing to undo."""

    def patch(function: Any) -> Any:
        key = tuple(sorted({id(value) for value in function.__globals__.values() if value is tl or value is tl.core}))
        if key in patched:
            return Nothing()
        scope = stock(function)
        undo = scope.restore
        if not patched:

            def restore() -> None:
                patched.clear()
                undo()

            scope.restore = restore
        patched.add(key)
        return scope

    interpreter._patch_lang = patch


@functools.cache
def repair() -> None:
    """Repair the interpreter of this process; a second call changes nothing."""
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    _repair_casts(builder, handle)
    _repair_elementwise(builder, handle)
    _repair_reductions(interpreter, handle)
    _repair_products(builder, handle)
    _patch_the_language_once(interpreter)
