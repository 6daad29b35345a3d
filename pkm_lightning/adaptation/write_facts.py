"""Writes facts into a model: deltas of a few rows of its value tables are learned, and nothing else moves.

    minimise  -ln p(answer | prompt) per answer token  +  c * (KL(before || now) + 4 drift) per token of other text

over the prompts of all facts. KL is exact on a sample of the text, the drift approximates it on all of it. c rises
while the divergence on further text, which the penalty never sees, is above its bound, and falls while it is below.
`learning.py` has the loop, `drift.py` the drift.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pkm_lightning.adaptation.drift import measure_drift
from pkm_lightning.adaptation.fact_sequences import (
    FactSequence,
    batches,
    fact_sequences,
    margins,
    padded,
    padded_batches,
)
from pkm_lightning.adaptation.facts_file import Fact, check_lengths, parse_fact
from pkm_lightning.adaptation.learning import Learned, Progress, learn_deltas
from pkm_lightning.adaptation.lower_layers import lower_layers_once
from pkm_lightning.adaptation.other_text import OtherText
from pkm_lightning.adaptation.row_choice import ReadFrequencies, SlotReads, choose_slots, lines_of
from pkm_lightning.adaptation.settings import WritingSettings
from pkm_lightning.adaptation.text_batches import TextParts, check_bounding
from pkm_lightning.build.edits import EditedTables, check_editable
from pkm_lightning.checkpoints.edit_file import Edit, LineDeltas
from pkm_lightning.data.base import Batch, TextCodec
from pkm_lightning.errors import ConfigError
from pkm_lightning.memory import ValueTable
from pkm_lightning.memory.row_deltas import RowDeltas

if TYPE_CHECKING:
    from pkm_lightning.model.trunk import Trunk

#: Tokens per batch of the prompts of earlier edits.
_BATCH_TOKENS = 1024


def write_facts(
    model: Trunk,
    tokenizer: TextCodec,
    facts: Sequence[Fact],
    *,
    other_text: TextParts,
    name: str = "facts",
    tables: EditedTables | None = None,
    device: torch.device | str = "cpu",
    context: int | None = None,
    note: str = "",
    watch: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> Edit:
    """Returns an edit that makes a model continue the prompts of facts with their answers; it is not applied.

    Where the model answers all of them already, the edit has no rows, and `figures["ended"]` is `known`.

    Args:
        model: whose trunk and tables stay as they are.
        tokenizer: of the model.
        facts: to be written.
        other_text: text on which the model is to predict what it predicts now; `adaptation.text_batches` reads it.
        name: of the edit.
        tables: the model's tables with the edits that are applied, with which the new one is to go together; None:
            there is none.
        device: of the model.
        context: tokens per sequence in training, which no prompt may exceed; None for any number.
        note: what the edit is for.
        watch: called at each look at what has been learned.
        settings: see `WritingSettings`.

    Raises:
        ConfigError: a setting is out of range, or the model has no table whose rows can be edited.
        DataError: there is no fact, a prompt is too long, or the other text has nothing to measure the bound on.

    Example: `docs/editing.md`, "From a program".
    """
    chosen = WritingSettings(**settings)
    device = torch.device(device)
    check_lengths(facts, tokenizer, context)
    check_bounding(other_text)
    tables = EditedTables(model) if tables is None else tables  # type: ignore[arg-type]
    weights = tables.weights
    with _frozen(model), lower_layers_once(model):  # type: ignore[arg-type]
        writer = _Writer(model, tokenizer, facts, other_text, tables, device, context, chosen)
        before = writer.recall()
        learned = writer.nothing() if all(before["learned"]) else writer.learn(watch)
        edit = Edit(
            name=name,
            weights=weights,
            tables=writer.line_deltas(learned),
            facts=tuple(fact.record() for fact in facts),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            note=note,
            settings=chosen.record(),
        )
        figures = writer.figures(edit, before, learned)
    return Edit(**{**edit.__dict__, "figures": figures})


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode within the block, in which none of its parameters learns."""
    was_training, learned = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        # Compiled blocks would be compiled anew for each length of a batch.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
        model.train(was_training)


class _Writer:
    """The facts, the model and the text of one call."""

    def __init__(
        self,
        model: Trunk,
        tokenizer: TextCodec,
        facts: Sequence[Fact],
        other_text: TextParts,
        tables: EditedTables,
        device: torch.device,
        context: int | None,
        settings: WritingSettings,
    ) -> None:
        self._model, self._tables, self._device, self._settings = model, tables, device, settings
        self._tokenizer, self._context = tokenizer, context
        torch.manual_seed(settings.seed)
        self._learned = self._sequences(facts, lambda fact: fact.learned)
        self._tests = {
            "test_prompts": self._sequences(facts, lambda fact: fact.test_prompts),
            "question": self._sequences(facts, lambda fact: () if fact.question is None else (fact.question,)),
        }
        reads = SlotReads(model)
        if not reads.sets:
            raise ConfigError(
                "the model has no value table whose reads are traced, so that no row can be edited; use one with a "
                "memory, such as ffn=memory_plus."
            )
        frequencies = ReadFrequencies(reads, self._on_device(other_text.penalised))
        slots = choose_slots(reads, self._fact_batches(), frequencies, per_fact=settings.rows_per_fact)
        self.deltas = self._row_deltas(reads, slots)
        #: Facts of applied edits by edit, as sequences: those whose rows may move now.
        self._at_risk = self._colliding()
        protected = padded_batches([s for group in self._at_risk.values() for s in group], _BATCH_TOKENS)
        self._penalised = OtherText(model, [*other_text.penalised, *protected], device=device)
        self._held_out = OtherText(model, other_text.held_out, device=device)
        moving = [self._tables.by_name[name] for name in self.deltas]
        self._drifts = measure_drift(model, moving, self._penalised.batches, device=device)

    def _sequences(self, facts: Sequence[Fact], prompts: Callable[[Fact], Sequence[str]]) -> list[FactSequence]:
        return fact_sequences(facts, self._tokenizer, prompts, ends=self._settings.ends)

    def _on_device(self, text: Sequence[Batch]) -> Iterator[Batch]:
        return ({name: value.to(self._device) for name, value in batch.items()} for batch in text)

    def _fact_batches(self) -> Iterator[tuple[Batch, list[int]]]:
        for numbers in batches(self._learned, self._settings.batch_size):
            part = [self._learned[number] for number in numbers]
            ids_BT, labels_BT = padded(part, self._device)
            lengths_B1 = torch.tensor([[len(sequence.ids) - 1] for sequence in part], device=self._device)
            valid_BT = torch.arange(ids_BT.shape[1], device=self._device) < lengths_B1
            yield {"input_ids": ids_BT, "labels": labels_BT, "valid": valid_BT}, [s.fact for s in part]

    def _row_deltas(self, reads: SlotReads, slots: Mapping[str, Sequence[Tensor]]) -> dict[str, RowDeltas]:
        """Returns deltas, all zero, by the name of the table's weight."""
        names = {table: name for name, table in self._tables.by_name.items()}
        deltas = {}
        for set_name, table_set in reads.sets.items():
            moved_U = torch.unique(torch.cat(list(slots[set_name])))
            for table in table_set.tables:
                check_editable(names[table], table)
                within_U = lines_of(table, moved_U[moved_U < table.rows])
                width, dtype = table.weight.shape[1], torch.promote_types(table.weight.dtype, torch.float32)
                deltas[names[table]] = RowDeltas(within_U.to(table.weight.device), width, dtype=dtype)
        return deltas

    def _colliding(self) -> dict[str, list[FactSequence]]:
        planned = Edit(
            "", "", {name: LineDeltas(d.lines_U.cpu(), d.values_UV.detach().cpu()) for name, d in self.deltas.items()}
        )
        at_risk = {}
        for name in self._tables.collisions(planned):
            facts = [parse_fact(f"edit {name}", fact) for fact in self._tables.applied[name].facts]
            at_risk[name] = self._sequences(facts, lambda fact: fact.learned)
        return at_risk

    def nothing(self) -> Learned:
        """Returns deltas that are all zero."""
        return Learned(
            {self._tables.by_name[name]: added.values_UV.detach() for name, added in self.deltas.items()},
            0,
            0.0,
            "known",
        )

    def learn(self, watch: Callable[[Progress], None] | None) -> Learned:
        """Trains the deltas."""
        every: list[ValueTable] = list(self._tables.by_name.values())
        by_table = {self._tables.by_name[name]: added for name, added in self.deltas.items()}
        return learn_deltas(
            self._model,
            by_table,
            every,
            self._learned,
            drifts=self._drifts,
            penalised=self._penalised,
            held_out=self._held_out,
            settings=self._settings,
            context=self._context,
            device=self._device,
            watch=watch,
        )

    def line_deltas(self, learned: Learned) -> dict[str, LineDeltas]:
        """Returns the learned deltas as an edit holds them, without lines that have not moved."""
        tables = {}
        for name, added in self.deltas.items():
            values_UV = learned.values[self._tables.by_name[name]].cpu()
            moved_U = values_UV.ne(0).any(1)
            tables[name] = LineDeltas(added.lines_U.cpu()[moved_U], values_UV[moved_U])
        return tables

    def recall(self) -> dict[str, list[bool]]:
        """Returns which prompts the model answers right now, by kind."""
        groups = {"learned": self._learned, **self._tests, **{f"edit {n}": s for n, s in self._at_risk.items()}}
        return {name: self._right(sequences) for name, sequences in groups.items()}

    def _right(self, sequences: Sequence[FactSequence]) -> list[bool]:
        return (margins(self._model, sequences, device=self._device) > 0).tolist() if sequences else []

    def figures(self, edit: Edit, before: Mapping[str, Sequence[bool]], learned: Learned) -> dict[str, Any]:
        """Returns what the edit does to the model: with the rows as they are when it is applied, rounding included."""
        self._tables.apply(edit)
        try:
            after, divergence = self.recall(), self._held_out.mean_divergence()
            penalised = self._penalised.mean_divergence()
        finally:
            self._tables.remove(edit.name)
        figures: dict[str, Any] = {
            "rows": edit.n_lines,
            "kl": divergence,
            "kl_penalised": penalised,
            "kl_tokens": self._held_out.n_tokens,
            "steps": learned.steps,
            "seconds": round(learned.seconds, 2),
            "ended": learned.ended,
        }
        for name in ("learned", "test_prompts", "question"):
            if after[name]:
                figures[name] = {
                    "prompts": len(after[name]),
                    "before": _share(before[name]),
                    "after": _share(after[name]),
                }
        collisions = {}
        for name, count in self._tables.collisions(edit).items():
            group = f"edit {name}"
            lost = [n for n, (was, now) in enumerate(zip(before[group], after[group], strict=True)) if was and not now]
            texts = sorted({self._at_risk[name][number].fact for number in lost})
            collisions[name] = {
                "rows": count,
                "before": _share(before[group]),
                "after": _share(after[group]),
                "lost": [self._tables.applied[name].facts[fact]["prompt"] for fact in texts],
            }
        return {**figures, "collisions": collisions} if collisions else figures


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)
