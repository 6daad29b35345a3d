"""Masks on a model: some slots for every token, or single reads of single tokens.

Letters: C reads per token over all heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from pkm_lightning.errors import ConfigError
from pkm_lightning.inspection.foreign import trunk_of
from pkm_lightning.inspection.slot_sets import SlotSet, find_set, inspected_readers, maskable_modules, slot_sets
from pkm_lightning.memory import MaskableReads, ReadMask, ValueTable, masked_reads, zero_reads
from pkm_lightning.usage.slot_readers import HasPlugins, Reader

#: Slots to mask: ids of the only set of a model, or by the name of a set its ids, None for all of them.
SlotChoice = Mapping[str, Iterable[int] | None] | Iterable[int]


@contextlib.contextmanager
def mask(model: HasPlugins | nn.Module, slots: SlotChoice) -> Iterator[None]:
    """Computes, within the block, what the model would compute if these slots held zeros.

    A masked row of a value table reads as zeros, in every layer that shares the table; a masked expert has weight 0,
    and the other experts of the token keep theirs. Nothing of the model is changed.

    Args:
        model: a `Transformer`, another trunk of this package, or a model of transformers after `replace_ffn`.
        slots: `[17, 42]` where the model has one set of slots; `{"table0": [17, 42], "layer2.expert": [3]}`; None for
            all slots of a set. `docs/inspecting.md` lists how sets are named.

    Raises:
        ConfigError: a set or a slot that the model does not have.

    Example:
        >>> from pkm_lightning import MemoryPlus, Transformer, mask
        >>> ffns = [MemoryPlus(dim=8, n_keys=16)]
        >>> model = Transformer(vocab_size=50, dim=8, n_heads=2, n_kv_heads=2, ffns=ffns)
        >>> with mask(model, [17, 42]):
        ...     hidden_BTD = model(torch.tensor([[1, 2, 3]])).hidden_BTD
    """
    sets = slot_sets(inspected_readers(trunk_of(model)))
    with contextlib.ExitStack() as stack:
        for name, ids in checked_choice(sets, slots).items():
            modules = {module: None for reader in sets[name].readers for module in maskable_modules(reader)}
            for module in modules:
                if ids is None:
                    stack.enter_context(zero_reads([module]))
                else:
                    stack.enter_context(masked_reads([module], _without(ids, module)))
        yield


def checked_choice(sets: Mapping[str, SlotSet], slots: SlotChoice, key: str = "slots") -> dict[str, list[int] | None]:
    """Returns the slots by the name of their set, ascending.

    Raises:
        ConfigError: as `mask`.
    """
    if not isinstance(slots, Mapping):
        if slots is None or len(sets) != 1:
            names = ", ".join(list(sets)[:8])
            raise ConfigError(f"{key}={slots!r:.60} is no choice among {names}; give {{NAME: [ID, ...]}}.")
        slots = {next(iter(sets)): slots}
    named = {name: (find_set(sets, name, key), ids) for name, ids in slots.items()}
    return {name: None if ids is None else _checked_ids(one, ids, key) for name, (one, ids) in named.items()}


def _checked_ids(one: SlotSet, ids: Iterable[int], key: str) -> list[int]:
    """Returns the slots, which may be numbers of numpy or torch, ascending and each once."""
    try:
        listed = list(ids) if not isinstance(ids, str | bytes) else None
    except TypeError:
        listed = None
    if listed is None:
        raise ConfigError(f"{key}={ids!r:.60} is no list of slots of {one.name}; give their numbers, as in [17, 42].")
    for slot in listed:
        is_number = hasattr(slot, "__index__") and not isinstance(slot, bool)
        if not is_number or not 0 <= int(slot) < one.count:
            raise ConfigError(f"{key}={slot!r:.60}: {one.name} has the slots 0 to {one.count - 1}.")
    return sorted({int(slot) for slot in listed})


def _without(ids: Sequence[int], module: MaskableReads) -> ReadMask:
    slices = module.slices if isinstance(module, ValueTable) else 1
    masked = torch.tensor(ids, dtype=torch.int64)

    def keeps(ids_TK: Tensor) -> Tensor:
        nonlocal masked
        masked = masked.to(ids_TK.device)
        return ~torch.isin(ids_TK // slices if slices > 1 else ids_TK, masked)

    return keeps


def all_modules(readers: Mapping[str, Reader]) -> list[MaskableReads]:
    """Returns every value table and all experts that `readers` read, each once."""
    return list(dict.fromkeys(module for reader in readers.values() for module in maskable_modules(reader)))


class ReadFactors(contextlib.AbstractContextManager["ReadFactors"]):
    """Factors on single reads of single tokens, while the block lasts: 0 leaves a read out, 1 keeps it.

    They act where the reader's plugin reads, so that other layers of a shared table are not touched. Of several tables
    that a reader combines, such as the input and output vectors of PEER's experts, the last one is scaled: it holds
    what a read adds.

    Args:
        readers: whose reads are scaled.

    Attributes:
        of: by the reader's name, (B, T, C) for the next forwards; readers that are not in it read as always.
    """

    def __init__(self, readers: Mapping[str, Reader]) -> None:
        self._readers = readers
        self._stack = contextlib.ExitStack()
        self.of: dict[str, Tensor] = {}

    def __enter__(self) -> ReadFactors:
        # Blocks run uncompiled: hooks of modules within a compiled block would not be called.
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        for reader in self._readers.values():
            self._watch(reader)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _watch(self, reader: Reader) -> None:
        """Lets the factors of a reader act while its plugin runs, and no longer."""
        module = maskable_modules(reader)[-1]
        before: list[tuple[ReadMask, ...]] = []

        def begin(plugin: nn.Module, inputs: Any) -> None:
            before.append(module.masks)
            if reader.name in self.of:
                module.masks = (*module.masks, lambda ids_TK: self._factors(reader, ids_TK))

        def end(plugin: nn.Module, inputs: Any, output: Any) -> None:
            module.masks = before.pop()

        for handle in (
            reader.plugin.register_forward_pre_hook(begin),
            reader.plugin.register_forward_hook(end, always_call=True),
        ):
            self._stack.callback(handle.remove)

    def _factors(self, reader: Reader, ids_TK: Tensor) -> Tensor:
        factors_TC = self.of[reader.name].flatten(0, -2)
        # A table of slices is read once per slice, with the slots of the token in the same order.
        times, rest = divmod(len(ids_TK), len(factors_TC))
        if rest or ids_TK.shape[1] != factors_TC.shape[1]:
            raise ConfigError(
                f"{reader.name} reads {tuple(ids_TK.shape)} lines, but its trace has {tuple(factors_TC.shape)}; masks "
                "of single reads need the reads in the order of the trace."
            )
        return factors_TC.repeat_interleave(times, 0)
