"""A record with all that a page or a screen may meet: two tables, experts, strange tokens, slots, facts, ablations."""

from __future__ import annotations

import random

from pkm_lightning.inspection.record import (
    AblationRecord,
    FactReading,
    ReaderRecord,
    ReadsRecord,
    Record,
    SlotReading,
    SlotRecord,
    TextRecord,
)

WORDS = (
    *(" Alice", " Smith", " was", " born", " in", " Paris", " on", " 4", " May", " 1901", ".", "\n", " <b>", "&amp;"),
    *('"', "\\", "\ufffd", "\u2028", " \u0634\u0645\u0633", "\U0001f40d", " </script>", "   ", "'"),
)


def example_record(tokens: int = 12, texts: int = 2, seed: int = 0) -> Record:
    """Returns a record of `texts` texts with `tokens` tokens each, drawn from `seed`.

    Its figures are consistent: texts read the slots that `slots` lists, probabilities sum to at most 1.
    """
    draw = random.Random(seed)
    readers = [
        ReaderRecord("layer1.slot", 1, "table0", "row", 4096, heads=2, reads=4),
        ReaderRecord("layer3.slot", 3, "table0", "row", 4096, heads=2, reads=4),
        ReaderRecord("layer2.expert", 2, "layer2.expert", "expert", 8, heads=1, reads=2),
        ReaderRecord("layer4.before.slot", 4, "table1", "row", 1000, heads=1, reads=3, by_tokens=True),
    ]
    record = Record("runs/example", readers, [_text(draw, n, tokens, readers) for n in range(texts)], data="validation")
    for reader in readers:
        of_table = record.slots.setdefault(reader.table, {})
        for number, text in enumerate(record.texts):
            reads = text.reads[reader.name]
            for place, (slots, weights) in enumerate(zip(reads.slots, reads.weights, strict=True)):
                for slot, weight in zip(slots, weights, strict=True):
                    if slot >= 0:
                        of_slot = of_table.setdefault(str(slot), SlotRecord(0))
                        of_slot.reads += 1
                        token = text.tokens[place][1]
                        of_slot.readers.append(SlotReading(number, place, token, weight, reader.name, "was born", "."))
        for of_slot in of_table.values():
            place = draw.randrange(100)
            of_slot.readers.append(SlotReading(f"validation {place}", 7, " Oslo", 0.5, reader.name, "lives in", "and"))
            of_slot.readers.sort(key=lambda reading: -abs(reading.weight))
            del of_slot.readers[8:]
            of_slot.facts.append(FactReading("Alice Smith was born in", " Paris", 0.75, reader.name))
    masked: list[int] = [int(slot) for slot in list(record.slots["table0"])[:2]]
    for one in ({"table0": masked}, {"table1": None}):
        p_without = [[p / 2 for p in text.p] for text in record.texts]
        top_without = [text.top_without for text in record.texts]
        losses: list[float | None] = [2.5 for _ in record.texts]
        worse: list[float | None] = [3.25 for _ in record.texts]
        record.ablations.append(AblationRecord(dict(one), losses, worse, p_without, top_without, 0.75, 0.5))
    return record


def _text(draw: random.Random, number: int, tokens: int, readers: list[ReaderRecord]) -> TextRecord:
    ids = [draw.randrange(len(WORDS)) for _ in range(tokens)]
    targets: list[int | None] = [*ids[1:], None]
    top = [_top(draw) for _ in ids]
    reads = {}
    for reader in readers:
        places = reader.heads * reader.reads
        slots = [[draw.randrange(min(reader.slots, 64)) for _ in range(places)] for _ in ids]
        weights = [[draw.gauss(0, 0.4) for _ in range(places)] for _ in ids]
        effects = [[draw.gauss(0, 1.5) for _ in range(places)] for _ in ids]
        reads[reader.name] = ReadsRecord(slots, weights, effects)
    return TextRecord(
        title=f"text {number + 1}",
        tokens=[(token, WORDS[token]) for token in ids],
        targets=targets,
        scored=[top[t][0][0] if target is None else target for t, target in enumerate(targets)],
        p=[draw.random() for _ in ids],
        top=top,
        p_without=[draw.random() for _ in ids],
        top_without=[_top(draw) for _ in ids],
        reads=reads,
    )


def _top(draw: random.Random) -> list[tuple[int, str, float]]:
    tokens = draw.sample(range(len(WORDS)), 5)
    return [(token, WORDS[token], 0.5 / 2**place) for place, token in enumerate(tokens)]
