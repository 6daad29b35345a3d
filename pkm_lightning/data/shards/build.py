"""Documents into shards: read in one thread, tokenised by the threads of the tokenizers library, written in order.

All parts close their shards at the same places, about every 256 MB of text. There all files are flushed to disk, then
`progress.json` is renamed into place with the position in the files and all counts, so that a build that is killed
continues with the shard that it was at, and leaves the same bytes as one that was not.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pkm_lightning.data.chunks import chunks
from pkm_lightning.data.documents import Piece, Reader, Segment, question_of
from pkm_lightning.data.progress import BuildProgress
from pkm_lightning.data.shards.format import INDEX, PARTS, ShardWriter
from pkm_lightning.data.shards.plan import Divider, Plan, Portion, survey
from pkm_lightning.data.shards.read_ahead import Group, Position, file_sizes, read_ahead
from pkm_lightning.data.shards.record import BuildRecord
from pkm_lightning.data.split import Fractions
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.data.tokenizer_choice import TokenizerChoice
from pkm_lightning.errors import DataError
from pkm_lightning.storage import written_beside

__all__ = ["build_shards"]

#: Text of one shard of all parts together, in bytes.
SHARD_BYTES = 256_000_000
#: Text that is tokenised in one go: enough to keep many threads busy, little beside the rest of the process.
GROUP_BYTES = 2_000_000
#: Validation questions that are kept as text.
MAX_QUESTIONS = 10_000
QUESTIONS = "questions.json"
_ENDINGS = {".tokens", ".begins", ".places", ".learned", ".tmp"}

#: Names such as <eos> and <|user|>.
_CONTROL_TOKEN = re.compile(r"<\|?\w+\|?>")

log = logging.getLogger(__name__)


def build_shards(
    folder: Path,
    *,
    readers: Callable[[], Mapping[str, Reader]],
    fractions: Fractions,
    choice: TokenizerChoice,
    name: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Fills `folder` with tokenizer, shards, validation questions and `shards.json`, or continues to fill it.

    Args:
        folder: empty, or left by a killed call with the same arguments.
        readers: makes the readers of `train`, and of `validation` and `test` where these have files of their own; each
            pass over the text has new ones.
        fractions: of the training documents that are held out for parts without a reader.
        choice: of the tokenizer; one that is trained sees training text only.
        name: of the data in messages, such as `data.path=books`.
        shard_bytes: text of one shard, in bytes.

    Raises:
        DataError: there is no text, or too little to be divided; whatever the readers raise.
    """
    record = BuildRecord.load(folder)
    if record is None and (folder / INDEX).exists():
        return  # killed between the end of the build and the renaming of the folder
    _clear(folder, keep={} if record is None else record.sha256)
    if record is None:
        first = readers()
        plan = survey(first["train"], _of_train(fractions, first), name)
        tokenizer = choice.make(lambda: _training_texts(readers()["train"], plan), bounded=True)
        tokenizer.save(folder / "tokenizer.json")
        record = BuildRecord(plan)
        record.save(folder)
    else:
        shards = sum(map(len, record.shards.values()))
        log.info("%s: continues a preparation that was interrupted, after %d shards", name, shards)
    _Build(folder, record, name, shard_bytes).run(readers())


def _of_train(fractions: Fractions, readers: Mapping[str, Reader]) -> Fractions:
    """Returns the fractions of the training text that are held out: none for parts that have files of their own."""
    validation = 0.0 if "validation" in readers else fractions.validation
    return Fractions(validation, 0.0 if "test" in readers else fractions.test, fractions.seed)


def _clear(folder: Path, keep: Mapping[str, str]) -> None:
    """Removes what a killed call has left behind its last record."""
    for path in folder.iterdir():
        if path.suffix in _ENDINGS and path.name not in keep:
            path.unlink()


def _training_texts(reader: Reader, plan: Plan) -> Iterator[str]:
    divider = Divider(plan)
    portions = (portion for piece in reader.pieces() for portion in divider.divide(piece))
    segments = (s for portion in portions if portion.part == plan.main for s in portion.segments)
    for segment in segments:
        # A chat template writes the names of control tokens, which are no words.
        texts = _CONTROL_TOKEN.split(segment.text) if segment.rendered else [segment.text]
        yield from (chunk for text in texts for chunk in chunks(text))


class _Build:
    """A build under way: its record, and the shards that are open."""

    def __init__(self, folder: Path, record: BuildRecord, name: str, shard_bytes: int) -> None:
        self._folder, self._record, self._name, self._shard_bytes = folder, record, name, shard_bytes
        self._tokenizer = Tokenizer.load(folder / "tokenizer.json")
        self._end = np.asarray([self._tokenizer.eos_id])
        self._writers: dict[str, ShardWriter] = {}
        self._tokens = 0

    def run(self, readers: Mapping[str, Reader]) -> None:
        sizes = {part: sum(file_sizes(reader)) for part, reader in readers.items()}
        before = 0
        try:
            with BuildProgress(f"{self._name}: tokenises", sum(sizes.values())) as progress:
                for part, reader in readers.items():
                    if part not in self._record.finished:
                        self._read(part, reader, progress, before)
                    before += sizes[part]
        finally:
            for writer in self._writers.values():
                writer.abandon()
        self._finish(readers, sum(sizes.values()))

    def _read(self, part: str, reader: Reader, progress: BuildProgress, before: int) -> None:
        record = self._record
        plan = record.plan if part == "train" else Plan(part, Fractions(0.0, 0.0, 0))
        divider = Divider(plan, **record.divider)
        group_bytes = min(GROUP_BYTES, self._shard_bytes)
        groups = read_ahead(reader, record.position, group_bytes=group_bytes, shard_bytes=self._shard_bytes)
        with closing(groups):
            for group in groups:
                tokens = self._tokens
                self._write(group, divider)
                progress.update(before + group.done, self._tokens - tokens)
                if group.pieces and group.after is not None:
                    record.position, record.divider = group.after, _state(divider)
                    self._checkpoint()
        assert group.after is not None
        if divider.documents == 0:
            raise DataError(f"{self._name}: the files of the {part} part hold no text; give files that are not empty.")
        record.documents += divider.documents
        record.add_skipped(group.after.skipped)
        record.finished.append(part)
        record.position, record.divider = Position(), {}
        self._checkpoint()

    def _write(self, group: Group, divider: Divider) -> None:
        portions = list(_joined(portion for piece in group.pieces for portion in divider.divide(piece)))
        ids = _encode(self._tokenizer, portions)
        for portion in portions:
            self._write_portion(portion, list(islice(ids, len(portion.segments))))

    def _write_portion(self, portion: Portion, ids: list[list[np.ndarray]]) -> None:
        record, part = self._record, portion.part
        if part not in self._writers:
            name = f"{part}-{len(record.shards.get(part, [])):05d}"
            self._writers[part] = ShardWriter(self._folder, name, self._tokenizer.vocab_size)
        writer = self._writers[part]
        before = writer.tokens
        if portion.begins:
            writer.begin_document(portion.piece.file, portion.piece.record)
        for segment, parts in zip(portion.segments, ids, strict=True):
            for some in parts:
                writer.write(some, learned=segment.learned)
            record.learned = segment.learned
            record.text_bytes[part] = record.text_bytes.get(part, 0) + len(segment.text.encode())
        if portion.ends:
            writer.write(self._end, learned=record.learned)
        self._tokens += writer.tokens - before
        if part == "validation" and portion.begins and len(record.questions) < MAX_QUESTIONS:
            question = question_of(Piece(0, 0, portion.segments, portion.ends))
            record.questions.extend([question] if question else [])

    def _checkpoint(self) -> None:
        """Closes the shards of all parts and records that the build has come so far."""
        for part, writer in sorted(self._writers.items()):
            self._record.shards.setdefault(part, []).append(writer.close())
            self._record.sha256.update(writer.sha256)
        self._writers = {}
        self._record.save(self._folder)

    def _finish(self, readers: Mapping[str, Reader], n_bytes: int) -> None:
        record = self._record
        shards = {part: [asdict(info) for info in record.shards.get(part, [])] for part in PARTS}
        files = sum(len(reader.files) for reader in readers.values())
        index = {
            "vocab_size": self._tokenizer.vocab_size,
            "parts": shards,
            "text_bytes": {part: record.text_bytes.get(part, 0) for part in PARTS},
            "read": {"files": files, "documents": record.documents, "bytes": n_bytes},
            "skipped": dict(sorted(record.skipped.items())),
        }
        kind = getattr(readers["train"], "kind", None)
        if kind is not None:
            index["records"] = kind.value
        for name, content in ((QUESTIONS, record.questions), (INDEX, index)):
            with written_beside(self._folder / name) as file:
                file.write(json.dumps(content, ensure_ascii=False, indent=1).encode())


def _joined(portions: Iterable[Portion]) -> Iterator[Portion]:
    """Yields the portions with consecutive ones of one text as one: only the tokenizer knows where a cut is exact."""
    waiting: list[Portion] = []
    for portion in portions:
        if waiting and (portion.begins or not (_is_text(portion) and _is_text(waiting[-1]))):
            yield _one(waiting)
            waiting = []
        waiting.append(portion)
    if waiting:
        yield _one(waiting)


def _is_text(portion: Portion) -> bool:
    return len(portion.segments) == 1 and portion.segments[0].learned and not portion.segments[0].rendered


def _one(portions: list[Portion]) -> Portion:
    if len(portions) == 1:
        return portions[0]
    text = "".join(portion.segments[0].text for portion in portions)
    return portions[0]._replace(ends=portions[-1].ends, segments=(Segment(text),))


def _state(divider: Divider) -> dict[str, Any]:
    return {name: value for name, value in vars(divider).items() if name != "plan"}


def _encode(tokenizer: Tokenizer, portions: list[Portion]) -> Iterator[list[np.ndarray]]:
    """Yields the ids of each segment, in one array per chunk."""
    texts = [
        tokenizer.pieces(segment.text, follows=number > 0 or not portion.begins)
        for portion in portions
        for number, segment in enumerate(portion.segments)
        if not segment.rendered
    ]
    ids = tokenizer.encode_pieces(chunk for of_segment in texts for chunk in of_segment)
    rendered = tokenizer.encode_rendered_batch(_rendered(portions))
    counts = map(len, texts)
    for segment in (segment for portion in portions for segment in portion.segments):
        if segment.rendered:
            yield [np.asarray(next(rendered), dtype=np.int64)]
        else:
            yield [np.asarray(some, dtype=np.int64) for some in islice(ids, next(counts))]


def _rendered(portions: Iterable[Portion]) -> Iterator[tuple[str, str]]:
    """Yields each rendered segment with the text of its portion before it."""
    for portion in portions:
        before = ""
        for segment in portion.segments:
            if segment.rendered:
                yield segment.text, before
            before += segment.text
