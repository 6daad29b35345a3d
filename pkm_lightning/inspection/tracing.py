"""The trace of texts: for each token the slots that are read, what they add, and what the model expects next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pkm_lightning.data.base import TextCodec, prompt_ids
from pkm_lightning.errors import ConfigError, check_choice, check_integer
from pkm_lightning.inspection.effects import exact_effects, gradient_effects
from pkm_lightning.inspection.expectations import Expectations, expectations
from pkm_lightning.inspection.foreign import codec_of, trunk_of
from pkm_lightning.inspection.masking import all_modules
from pkm_lightning.inspection.record import ReaderRecord, ReadsRecord, Record, TextRecord
from pkm_lightning.inspection.slot_sets import inspected_readers, set_of_readers, slot_sets
from pkm_lightning.inspection.windows import DEFAULT_CONTEXT, Pieces, Window, windows
from pkm_lightning.memory import QuantizedTable, zero_reads
from pkm_lightning.usage.slot_readers import Reader

if TYPE_CHECKING:
    from pkm_lightning.model import Transformer

Effects = Literal["exact", "gradient", "none"]
EFFECTS = ("exact", "gradient", "none")
#: FLOPs up to which effects are exact unless the caller chooses: minutes on two CPU cores.
_MOST_FLOPS = 1e13
#: Reads per token up to which a gradient would cost about as much as exact effects.
_FEW_READS = 8


def trace(
    model: Transformer | nn.Module,
    tokenizer: TextCodec | Any,
    text: str | Sequence[str],
    *,
    context: int | None = None,
    effects: Effects | None = None,
    name: str = "model",
) -> Record:
    """Returns the record of one text or several: reads, weights, effects, and predictions with and without the tables.

    `effects.py` defines the effect of a read. A text that is longer than `context` is read in windows that overlap by
    half, so that memory does not grow with its length.

    Args:
        model: a `Transformer`, another trunk of this package, or a model of transformers after `replace_ffn`; in
            evaluation mode.
        tokenizer: of the model, such as `loaded.codec()` or one of transformers.
        text: what to read.
        context: most tokens per forward, such as `loaded.context`; None: 1,024.
        effects: `exact` (a forward of one token per read), `gradient` (its first-order approximation, one forward and
            backward per token), or `none`; None: exact up to 1e13 FLOPs or 8 reads per token, else gradient, and none
            of quantised tables, whose reads have no gradient.
        name: of the model, in the record.

    Raises:
        ConfigError: a value out of its range, or a model without value tables and experts.

    Example: `docs/inspecting.md`.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not texts or not all(isinstance(one, str) for one in texts):
        raise ConfigError(f"text={text!r:.60} is no text; give TEXT or [TEXT, ...].")
    model, tokenizer = trunk_of(model), codec_of(tokenizer)
    encoded = [prompt_ids(tokenizer, one) for one in texts]
    titles = [_title(one) for one in texts]
    return trace_ids(model, tokenizer, encoded, titles, context=context, effects=effects, name=name)


def trace_ids(
    model: Transformer,
    tokenizer: TextCodec,
    texts: Sequence[Sequence[int]],
    titles: Sequence[str],
    *,
    context: int | None = None,
    effects: Effects | None = None,
    name: str = "model",
) -> Record:
    """Returns the record of texts that are token ids already; else as `trace`."""
    length = DEFAULT_CONTEXT if context is None else context
    check_integer("context", length, low=2)
    readers = inspected_readers(model)
    record = Record(name, _reader_records(readers), [], effects="none" if effects is None else effects)
    check_choice("effects", record.effects, EFFECTS)
    pieces = Pieces(tokenizer)
    for title, ids in zip(titles, texts, strict=True):
        record.texts.append(_traced(model, readers, pieces, ids, title, length))
    reads: dict[str, int] = {}
    for reader in record.readers:
        reader.heads, reader.reads = _shape_of_reads(model, readers[reader.name], texts[0])
        reads[reader.name] = reader.heads * reader.reads
    if effects is None:
        record.effects = _affordable(model, readers, sum(map(len, texts)), sum(reads.values()))
    if record.effects != "none":
        for text, ids in zip(record.texts, texts, strict=True):
            _add_effects(model, readers, text, ids, length, reads, record.effects)
    return record


def _title(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def _reader_records(readers: Mapping[str, Reader]) -> list[ReaderRecord]:
    sets = set_of_readers(slot_sets(readers))
    records = []
    for name, reader in readers.items():
        of_reader = sets[name]
        count = reader.slots.count
        records.append(
            ReaderRecord(name, reader.layer, of_reader.name, of_reader.kind, count, 1, 0, of_reader.by_tokens)
        )
    return sorted(records, key=lambda record: record.layer)


@torch.no_grad()
def _shape_of_reads(model: Transformer, reader: Reader, ids: Sequence[int]) -> tuple[int, int]:
    """Returns heads H and reads per head K."""
    ids_BT = torch.tensor([ids[:1]], device=model.embedding.weight.device)
    reads = reader.reads(model(ids_BT, observe=True).traces, {"input_ids": ids_BT})
    return (0, 0) if reads is None else (reads.ids_THK.shape[1], reads.ids_THK.shape[2])


def _affordable(model: Transformer, readers: Mapping[str, Reader], tokens: int, reads: int) -> str:
    tables = {id(parameter) for table in model.value_tables for parameter in table.parameters()}
    params = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in tables)
    if 2 * params * tokens * reads <= _MOST_FLOPS or reads <= _FEW_READS:
        return "exact"
    return "none" if any(isinstance(m, QuantizedTable) for m in all_modules(readers)) else "gradient"


@torch.no_grad()
def _traced(
    model: Transformer, readers: Mapping[str, Reader], pieces: Pieces, ids: Sequence[int], title: str, context: int
) -> TextRecord:
    """Returns everything about a text but the effects."""
    reads = {name: ReadsRecord([], []) for name in readers}
    whole, modules = Expectations(ids), all_modules(readers)
    device = model.embedding.weight.device
    with torch.compiler.set_stance("force_eager"):
        for window in windows(len(ids), context):
            ids_BT = torch.tensor([ids[window.begin : window.end]], device=device)
            output = model(ids_BT, observe=True)
            whole.add(model, output.hidden_BTD[0, window.first - window.begin :], pieces)
            for name, reader in readers.items():
                _add_reads(reads[name], reader, output.traces, ids_BT, window)
    with zero_reads(modules):
        without = expectations(model, pieces, ids, whole.scored, context=context)
    return TextRecord(
        title=title,
        tokens=list(zip(ids, pieces.of_text(ids), strict=True)),
        targets=[*ids[1:], None],
        scored=whole.scored,
        p=whole.p,
        top=whole.top,
        p_without=without.p,
        top_without=without.top,
        reads=reads,
    )


def _add_reads(
    record: ReadsRecord, reader: Reader, traces: dict[int, dict[str, Tensor]], ids_BT: Tensor, window: Window
) -> None:
    reads = reader.reads(traces, {"input_ids": ids_BT})
    if reads is None:
        return
    new = slice(window.first - window.begin, None)
    ids_TC = reads.ids_THK.flatten(1)[new].long()
    # An expert that has not chosen the token.
    ids_TC = ids_TC.where((ids_TC >= 0) & (ids_TC < reader.slots.count), -1)
    record.slots += ids_TC.tolist()
    record.weights += reads.weights_THK.flatten(1)[new].float().tolist()


def _add_effects(
    model: Transformer,
    readers: Mapping[str, Reader],
    text: TextRecord,
    ids: Sequence[int],
    context: int,
    reads: Mapping[str, int],
    how: str,
) -> None:
    compute = exact_effects if how == "exact" else gradient_effects
    device = model.embedding.weight.device
    traced = {name: reader for name, reader in readers.items() if text.reads[name].slots}
    of_traced = {name: reads[name] for name in traced}
    for name in traced:
        text.reads[name].effects = []
    for window in windows(len(ids), context):
        ids_T = torch.tensor(ids[window.begin : window.end], device=device)
        computed = compute(model, traced, ids_T, text.scored[window.first : window.end], of_traced)
        for name, effects_TC in computed.items():
            rows = text.reads[name].effects
            assert rows is not None
            rows += effects_TC.tolist()
