"""How wide a kernel's accesses to global memory are, read from its PTX.

Every register that an address is computed from is followed back to the pointer among the kernel's parameters, also
where threads exchange addresses through shared memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

#: Stands for an address whose pointer is not found.
UNKNOWN = "?"
_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.+?);", re.MULTILINE)
_REGISTER = re.compile(r"%(?!p)[a-z]+\d+")
_PARAMETER = re.compile(r"_param_(\d+)\b")
#: What an instruction writes, one register or several in braces, and what it reads.
_OPERANDS = re.compile(r"\s*(\{[^}]*\}|[^,]*)(.*)")
#: Asynchronous copies to shared memory state their bytes as the third operand.
_COPY = re.compile(r"\[[^\]]*\]\s*,\s*\[([^\]]*)\]\s*,\s*(0x[0-9a-f]+|\d+)")


def access_widths(ptx: str, pointers: Mapping[int, str]) -> dict[str, dict[str, set[int]]]:
    """Returns for `loads` and `stores` the widths in bits of the accesses by each pointer.

    Args:
        ptx: the code of one kernel.
        pointers: names of the kernel's parameters that are pointers, by their number.
    """
    instructions = _INSTRUCTION.findall(ptx)
    origins = _origins(instructions, pointers)
    widths: dict[str, dict[str, set[int]]] = {"loads": {}, "stores": {}}
    for operation, operands in instructions:
        for kind, address, bits in _accesses(operation, operands):
            names = {name for register in _REGISTER.findall(address) for name in origins.get(register, ())}
            for name in names or {UNKNOWN}:
                widths[kind].setdefault(name, set()).add(bits)
    order = [*pointers.values(), UNKNOWN]
    return {kind: {name: by[name] for name in order if name in by} for kind, by in widths.items()}


def _accesses(operation: str, operands: str) -> Iterator[tuple[str, str, int]]:
    """Yields kind, address and width of what an instruction reads or writes in global memory."""
    if operation.startswith("cp.async") and ".global" in operation and (copy := _COPY.search(operands)):
        yield "loads", copy[1], 8 * int(copy[2], 0)
    kind = {"ld": "loads", "st": "stores"}.get(operation.partition(".")[0])
    if kind is None or ".global" not in operation:
        return
    vector, element = re.search(r"\.v(\d)\b", operation), re.search(r"\.[bfus](\d+)$", operation)
    address = re.search(r"\[([^\]]*)\]", operands)
    assert element, operation
    assert address, operands
    yield kind, address[1], int(vector[1] if vector else 1) * int(element[1])


def _origins(instructions: list[tuple[str, str]], pointers: Mapping[int, str]) -> dict[str, set[str]]:
    """Returns for each register the pointers that its value is computed from."""
    origins: dict[str, set[str]] = {}
    known, before = 0, -1
    # Registers of loops are set after they are used, so one pass is not enough.
    while known > before:
        before = known
        for operation, operands in instructions:
            target, read = _OPERANDS.fullmatch(operands).groups()  # type: ignore[union-attr]
            sources = {name for register in _REGISTER.findall(read) for name in origins.get(register, ())}
            written = _REGISTER.findall(target)
            if operation.startswith("ld.param"):
                number = _PARAMETER.search(read)
                sources = {pointers[int(number[1])]} if number and int(number[1]) in pointers else set()
            elif operation.startswith("st.shared") and operation.endswith("64"):
                written = ["shared"]  # one name for all of it: addresses are the only 64-bit numbers that matter here
            elif operation.startswith("ld.shared") and operation.endswith("64"):
                sources = origins.get("shared", set())
            elif operation.startswith(("ld.", "st.", "atom.", "red.", "cp.")):
                continue  # what is loaded from memory is no address
            for register in written:
                origins.setdefault(register, set()).update(sources)
        known = sum(map(len, origins.values()))
    return origins
