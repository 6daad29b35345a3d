"""Options of the numba kernels, and the division of a kernel's tasks among threads.

`parallel=True` doubles the time to compile a kernel: numba compiles each `prange` as a kernel more, with two wrappers.
Here the kernel itself runs once per thread, and each run takes its share of the tasks. Only modules of numba kernels
import this one. An error in a kernel, as NUMBA_BOUNDSCHECK=1 raises, is seen with one thread only. numba's cache of a
kernel does not notice changes of this file: clear it (`make clean`) after one.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

#: Options of all kernels. They allocate nothing: without numba's runtime (`_nrt`) a slice of an array counts no
#: references, which takes an atomic instruction each time. They divide by no zero: Python's error model would test
#: every division, which prevents vectorisation. No C code calls them.
KERNEL: dict[str, Any] = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
    "_nrt": False,
    "no_cfunc_wrapper": True,
}
#: Options of functions that only kernels call.
CALLED: dict[str, Any] = {**KERNEL, "no_cpython_wrapper": True}

#: The last argument of a kernel that all threads run; `share` starts them with numbers of their own instead.
ALL = -1

_BYTE = ir.IntType(8).as_pointer()
_WORD = ir.IntType(64)


@intrinsic
def share(typing_context, tasks, worker):  # type: ignore[no-untyped-def]
    """Returns the first of the tasks of this thread, and the one after its last.

    A kernel calls it once, before all else that writes, with its own last argument as `worker`. The threads then run
    the kernel with its other arguments, each with its share. The caller, who has passed `ALL`, waits for them and gets
    an empty share, or with one thread all tasks. The kernel returns nothing and raises nothing, no array that it writes
    shares memory with another, and `use_torch_threads` has been called before: it loads the threads.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tasks, worker = arguments
        kernel = builder.function
        # As `prange` does: without it, every loop that writes would first compare the addresses of its arrays.
        for argument in kernel.args[2:]:
            if isinstance(argument.type, ir.PointerType):
                argument.add_attribute("noalias")
        first, last = (cgutils.alloca_once_value(builder, _WORD(0)) for _ in range(2))
        with builder.if_else(builder.icmp_signed("<", worker, _WORD(0))) as (all_workers, one_worker):
            with all_workers:
                count = ir.FunctionType(ir.IntType(32), [])
                threads = cgutils.get_or_insert_function(builder.module, count, "get_num_threads")
                workers = builder.sext(builder.call(threads, []), _WORD)
                with builder.if_else(builder.icmp_signed("<=", workers, _WORD(1))) as (alone, together):
                    with alone:
                        builder.store(tasks, last)
                    with together:
                        _run_workers(builder, workers)
            with one_worker:
                number = builder.and_(worker, _WORD(2**32 - 1))
                workers = builder.ashr(worker, _WORD(32))
                for place, limit in ((first, number), (last, builder.add(number, _WORD(1)))):
                    builder.store(builder.sdiv(builder.mul(tasks, limit), workers), place)
        limits = [builder.load(first), builder.load(last)]
        return context.make_tuple(builder, signature.return_type, limits)

    return types.UniTuple(types.intp, 2)(types.intp, types.intp), code


def _run_workers(builder: Any, workers: Any) -> None:
    """Runs the kernel that is being compiled once per worker, in numba's threads."""
    kernel = builder.function
    # What the workers read: the arguments of the kernel but the last, and the number of workers.
    values = [*kernel.args[2:-1], workers]
    frame = cgutils.alloca_once(builder, ir.LiteralStructType([value.type for value in values]))
    for i, value in enumerate(values):
        builder.store(value, cgutils.gep_inbounds(builder, frame, 0, i))
    data = builder.bitcast(frame, _BYTE)
    # numba's threads count in the address that they pass: it starts at `data` and rises by one byte per worker.
    places, steps, sizes = (cgutils.alloca_once_value(builder, value) for value in (data, _WORD(1), workers))
    run = ir.FunctionType(ir.VoidType(), [_BYTE] * 5 + [_WORD] * 3)
    function = cgutils.get_or_insert_function(builder.module, run, "numba_parallel_for")
    pointers = (builder.bitcast(p, _BYTE) for p in (_worker(kernel, frame.type), places, sizes, steps))
    inner_dimensions, arrays = _WORD(0), _WORD(1)
    builder.call(function, [*pointers, data, inner_dimensions, arrays, workers])


def _worker(kernel: ir.Function, frame_type: ir.PointerType) -> ir.Function:
    """Returns the function that numba's threads call: it runs the kernel for some workers, most often one."""
    module, words = kernel.module, _WORD.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), words, words, _BYTE])
    worker = ir.Function(module, kind, module.get_unique_name(f"{kernel.name}.worker"))
    worker.linkage = "internal"
    builder = ir.IRBuilder(worker.append_basic_block())
    places, sizes, _, data = worker.args
    # The results and the error of a kernel, of which there are none.
    unused = [cgutils.alloca_once(builder, argument.type.pointee) for argument in kernel.args[:2]]
    frame = builder.bitcast(data, frame_type)
    *values, workers = (
        builder.load(cgutils.gep_inbounds(builder, frame, 0, i)) for i in range(len(frame_type.pointee.elements))
    )
    first = builder.sub(*(builder.ptrtoint(address, _WORD) for address in (builder.load(places), data)))
    with cgutils.for_range(builder, builder.load(sizes)) as loop:
        number = builder.or_(builder.shl(workers, _WORD(32)), builder.add(first, loop.index))
        builder.call(kernel, [*unused, *values, number])
    builder.ret_void()
    return worker
