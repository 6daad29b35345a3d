"""Reads a pickle as inert values, in time and memory that its length bounds, whatever it describes.

A pickle may refer to its own parts again and again: 200 bytes describe nested tuples that have 2**45 leaves. To hash or
to print such a value never ends, and a reader hashes the keys of dictionaries while it reads. Here keys are flat, only
the opcodes that Python's and torch's picklers write for checkpoints are read, and what the file calls is recorded.
"""

from __future__ import annotations

import io
import pickle
from typing import Any, ClassVar

from pkm_lightning.checkpoints.tree import check_extent

#: Of protocols 2 to 5, without sets, byte arrays, whose forged length is reserved in memory, extensions and copies.
_OPCODES = (
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE",
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "SETITEM", "SETITEMS",
    "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE",
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID",
)  # fmt: skip


class Record:
    """What a pickle describes as an object.

    Attributes:
        state: what it would be given, or None.
        parts: all that it is made from.
    """

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.parts: list[Any] = list(arguments)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.parts += [key, value]

    def __setstate__(self, state: Any) -> None:
        self.state = state
        self.parts.append(state)


#: More than any checkpoint passes on in calls; each of them may copy its text.
_MOST_LETTERS = 2**28
#: Hashed without walking through their parts; of tuples, all parts must be such.
_FLAT = (str, bytes, int, float, type(None), Record, type)


# In Python, not in C: pickle.Unpickler reserves as much memory as a forged position in its memo asks for.
class InertUnpickler(pickle._Unpickler):
    """An unpickler that makes nothing but plain values and records.

    Attributes:
        used: all that was called or is a key, as often as it was; it need not be a part of the result.

    Raises:
        Exception: of a dozen classes, for bytes that are no pickle of a checkpoint.
    """

    stack: list[Any]  # of the base class
    dispatch: ClassVar[dict[int, Any]] = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code in {getattr(pickle, name)[0] for name in _OPCODES}
    }

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.used: list[Any] = []
        self._letters = 0

    def find_class(self, module: str, name: str) -> Any:
        """Returns a class of records: one per use, for a pickle may set attributes of a class."""
        return type(name, (Record,), {})

    def persistent_load(self, pid: Any) -> Any:
        """Returns the record of what lies outside of the pickle."""
        return Record(pid)

    def load_reduce(self) -> None:
        """Calls what `find_class` has returned."""
        self._call()

    def load_newobj(self) -> None:
        """Calls what `find_class` has returned."""
        self._call()

    def load_setitem(self) -> None:
        """Sets one entry of a dictionary."""
        self._check_keys(self.stack[-2:-1])
        pickle._Unpickler.load_setitem(self)  # type: ignore[attr-defined]

    def load_setitems(self) -> None:
        """Sets the entries above the mark."""
        self._check_keys(self.stack[::2])
        pickle._Unpickler.load_setitems(self)  # type: ignore[attr-defined]

    def _call(self) -> None:
        arguments, make = self.stack.pop(), self.stack.pop()
        self.used.append(arguments)
        self._letters += sum(len(argument) for argument in arguments if isinstance(argument, str | bytes))
        if self._letters > _MOST_LETTERS:
            raise ValueError("calls repeat long texts")
        self.stack.append(make(*arguments))

    def _check_keys(self, keys: list[Any]) -> None:
        for key in keys:
            parts = key if isinstance(key, tuple) else (key,)
            if not all(isinstance(part, _FLAT) for part in parts):
                raise ValueError("a key of a dictionary is no text or number")
            self.used.append(key)

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


class _Allocating(Record):
    """A call that could reserve memory: of a number of bytes, or of a shape."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if not all(isinstance(argument, str) or type(argument).__name__ == "encode" for argument in arguments):
            raise ValueError("a call reserves memory")


class _ArchiveUnpickler(InertUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_allocating = name == "bytearray" or name.endswith(("Tensor", "Storage"))
        return type(name, (_Allocating if is_allocating else Record,), {})


def check_pickle(content: bytes) -> None:
    """Refuses the pickle of an archive that takes more time or memory to read than its length explains.

    Raises:
        Exception: of a dozen classes.
    """
    unpickler = _ArchiveUnpickler(io.BytesIO(content))
    root = unpickler.load()
    check_extent([root, unpickler.used])
