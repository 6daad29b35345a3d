"""Instructions that numba has no name for: requests of cache lines, and the bits of floats.

Only `cpu` backends import this module, so that the package can be imported without numba. numba's cache of a kernel
does not notice changes of this file: clear it (`make clean`) after one.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


@intrinsic
def prefetch(typing_context, array, row, column):  # type: ignore[no-untyped-def]
    """Requests the cache line of array[row, column], without waiting for it."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        view = context.make_array(kind)(context, builder, arguments[0])
        element = cgutils.get_item_pointer(context, builder, kind, view, arguments[1:], wraparound=False)
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, word, word, word]), "llvm.prefetch.p0i8"
        )
        # Not for writing: threads that read one source row would take it from each other.
        for_writing, keep_in_all_caches, data = word(0), word(3), word(1)
        builder.call(function, [builder.bitcast(element, byte), for_writing, keep_in_all_caches, data])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), code


# numba has no bfloat16: kernels read its 16 bits, which are the upper half of the float32 of the same value.
@intrinsic
def widened(typing_context, value):  # type: ignore[no-untyped-def]
    """Returns the float32 of a float32, or of the bits of a bfloat16; exact."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if value == types.float32:
            return arguments[0]
        bits = builder.zext(arguments[0], context.get_value_type(types.uint32))
        shifted = builder.shl(bits, context.get_constant(types.uint32, 16))
        return builder.bitcast(shifted, context.get_value_type(types.float32))

    return types.float32(value), code


@intrinsic
def item_bytes(typing_context, array):  # type: ignore[no-untyped-def]
    """Returns the bytes per element of an array as a constant: `array.itemsize` is a number that kernels load.

    A branch or a division by it then costs nothing, and the compiler drops code for other dtypes.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant(types.intp, array.dtype.bitwidth // 8)

    return types.intp(array), code


@intrinsic
def float_bits(typing_context, value):  # type: ignore[no-untyped-def]
    """Returns the bits of a float32 or float64 as a signed integer of its size."""
    bits = types.Integer.from_bitwidth(value.bitwidth, signed=True)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(bits))

    return bits(value), code
