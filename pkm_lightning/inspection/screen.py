"""A record on the screen: tokens with their main reads, main slots with their readers, and what masks change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pkm_lightning.errors import counted
from pkm_lightning.inspection.record import AblationRecord, Record, SlotReading, SlotRecord, TextRecord

#: Reads per token, readers and facts per slot that are shown.
_READS, _READERS = 3, 3


def show(record: Record, console: Console, rows: int = 20) -> None:
    """Prints a record, at most `rows` tokens per text, slots per set and changed tokens per mask; the rest is counted.

    Args:
        record: what to show.
        console: without markup and emoji, which texts may contain by chance.
        rows: see above, 1 or more.
    """
    console.print(Text(_headline(record)))
    for text in record.texts:
        console.print(_text(record, text, rows))
    for table in record.slots:
        console.print(_slots(record, table, rows))
    for ablation in record.ablations:
        console.print(_ablation(record, ablation, rows))


def _headline(record: Record) -> str:
    readers = [f"{one.name} ({one.table}: {one.heads} x {one.reads} of {one.slots:,})" for one in record.readers]
    over = f"; readers of slots out of {record.data}" if record.data else ""
    return f"{record.model}\nreads: {', '.join(readers)}\neffects: {record.effects}{over}"


def _table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in columns:
        justify = "right" if column in right else "left"
        table.add_column(Text(column), justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table


def _text(record: Record, text: TextRecord, rows: int) -> RenderableType:
    adds = "" if record.effects == "none" else ": slot (weight) what it adds to the logit"
    table = _table(
        text.title, "", "token", "next", "p", "without", "most likely", f"main reads{adds}", right=("", "p", "without")
    )
    for place, (_, token) in enumerate(text.tokens[:rows]):
        target = text.targets[place]
        after = "" if target is None else visible(text.tokens[place + 1][1])
        likely = f"{visible(text.top[place][0][1])} {_share(text.top[place][0][2])}"
        reads = [_reads(record, text, reader.name, place) for reader in record.readers]
        table.add_row(
            *map(Text, (str(place), visible(token), after, _share(text.p[place]), _share(text.p_without[place]))),
            Text(likely),
            Text("\n".join(read for read in reads if read)),
        )
    return _with_rest(table, len(text.tokens), rows, "more token")


def _reads(record: Record, text: TextRecord, name: str, place: int) -> str:
    """Returns the main reads of one reader: by effect, where effects are known, else by weight."""
    reads = text.reads[name]
    if not reads.slots:
        return ""
    slots, weights = reads.slots[place], reads.weights[place]
    effects = None if reads.effects is None else reads.effects[place]
    sizes = weights if effects is None else effects
    order = sorted((c for c in range(len(slots)) if slots[c] >= 0), key=lambda c: -abs(sizes[c]))
    shown = [
        f"{slots[c]} ({weights[c]:.2f})" + ("" if effects is None else f" {_effect(effects[c])}")
        for c in order[:_READS]
    ]
    rest = f", {len(order) - _READS} more" if len(order) > _READS else ""
    label = f"{name}: " if len(record.readers) > 1 else ""
    return f"{label}{', '.join(shown)}{rest}"


def _slots(record: Record, name: str, rows: int) -> RenderableType:
    sizes = _sizes(record, name)
    slots = record.slots[name]
    order = sorted(slots, key=lambda slot: -sizes.get(int(slot), 0.0))
    what = "weights" if record.effects == "none" else "effects"
    table = _table(
        f"slots of {name}, those of the largest {what} first",
        *("slot", "reads", "tokens that read it most", "facts"),
        right=("slot", "reads"),
    )
    for slot in order[:rows]:
        one = slots[slot]
        table.add_row(
            *map(Text, (slot, f"{one.reads:,}")),
            Text("\n".join(map(_reader, one.readers[:_READERS]))),
            Text(_facts(one)),
        )
    return _with_rest(table, len(order), rows, "more slot")


def _sizes(record: Record, name: str) -> dict[int, float]:
    """Returns the largest effect of each slot in the texts; its largest weight where there are no effects."""
    sizes: dict[int, float] = {}
    for reader in (one.name for one in record.readers if one.table == name):
        for text in record.texts:
            reads = text.reads[reader]
            for slots, values in zip(reads.slots, reads.effects or reads.weights, strict=True):
                for slot, value in zip(slots, values, strict=True):
                    sizes[slot] = max(abs(value), sizes.get(slot, 0.0))
    return sizes


def _reader(reading: SlotReading) -> str:
    where = f"text {reading.text + 1}" if isinstance(reading.text, int) else reading.text
    before, after = end_of(visible(reading.before), 30), start_of(visible(reading.after), 20)
    return f"{reading.weight:.2f} {before}[{visible(reading.token)}]{after} ({where})"


def _facts(slot: SlotRecord) -> str:
    return "\n".join(
        f"{fact.weight:.2f} {end_of(visible(fact.prompt), 40)} -> {fact.answer}" for fact in slot.facts[:_READERS]
    )


def _ablation(record: Record, ablation: AblationRecord, rows: int) -> RenderableType:
    table = _table(
        f"without {masked_slots(ablation)}",
        *("text", "token", "next", "p", "without", "most likely then"),
        right=("p", "without"),
    )
    changes: list[tuple[float, list[str]]] = []
    for number, text in enumerate(record.texts):
        for place, p in enumerate(text.p):
            without = ablation.p_without[number][place]
            likely = ablation.top_without[number][place][0]
            target = text.targets[place]
            after = "" if target is None else visible(text.tokens[place + 1][1])
            cells = [str(number + 1), visible(text.tokens[place][1]), after, _share(p), _share(without)]
            changes.append((abs(p - without), [*cells, f"{visible(likely[1])} {_share(likely[2])}"]))
    changes.sort(key=lambda change: -change[0])
    for _, cells in changes[:rows]:
        table.add_row(*map(Text, cells))
    lines = [
        f"text {number + 1}: loss {_nats(loss)} -> {_nats(ablation.loss_without[number])} nats per token"
        for number, loss in enumerate(ablation.loss[:rows])
    ]
    if ablation.recall is not None and ablation.recall_without is not None:
        lines.append(f"questions answered: {_share(ablation.recall)} -> {_share(ablation.recall_without)}")
    return Group(_with_rest(table, len(changes), rows, "more token", " of smaller change"), Text("\n".join(lines)))


def masked_slots(ablation: AblationRecord) -> str:
    """Returns the slots that an ablation leaves out, in words."""
    parts = []
    for name, ids in ablation.masked.items():
        slots = "slot" if ids is not None and len(ids) == 1 else "slots"
        shown = "all slots" if ids is None else f"{slots} {', '.join(map(str, ids[:8]))}"
        more = f" and {len(ids) - 8} more" if ids is not None and len(ids) > 8 else ""
        parts.append(f"{shown}{more} of {name}")
    return " and ".join(parts)


def _with_rest(table: Table, count: int, rows: int, noun: str, how: str = "") -> RenderableType:
    if count <= rows:
        return table
    return Group(table, Text(f"{counted(count - rows, noun)}{how}: set show={count}, or format=json or html"))


def visible(text: str) -> str:
    """Returns `text` with line ends and other characters that a terminal would act on as escapes."""
    return "".join(_visible_characters(text))


def _visible_characters(text: str) -> Iterable[str]:
    for character in text:
        is_plain = character.isprintable()
        yield character if is_plain else character.encode("unicode_escape").decode("ascii")


def start_of(text: str, most: int) -> str:
    """Returns `text`, or where it is longer its first `most` characters with an ellipsis behind them."""
    return text if len(text) <= most else f"{text[:most]}..."


def end_of(text: str, most: int) -> str:
    """Returns `text`, or where it is longer its last `most` characters with an ellipsis before them."""
    return text if len(text) <= most else f"...{text[-most:]}"


def _effect(effect: float) -> str:
    return f"{effect:+.2f}" if abs(effect) >= 0.005 or effect == 0 else f"{effect:+.0e}"


def _share(p: float) -> str:
    return f"{p:.3f}" if p >= 0.0005 or p == 0 else f"{p:.0e}"


def _nats(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.3f}"
