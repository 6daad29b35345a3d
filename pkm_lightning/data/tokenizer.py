"""Byte-level tokenizers: any text is representable, and no token crosses a boundary between words.

Hence tokens(prompt) + tokens(" answer") are the tokens of the whole, on which the scoring of answers relies.
Text never becomes a control token: a literal "<eos>" in it is encoded as ordinary text.

A `tokenizer.json` of the user's may hold settings for other uses. What would cut, fill up or vary the data is off here:
truncation, padding, dropout of merges, special tokens around a text. What belongs to its vocabulary stays, such as
lower-casing or an unknown token; a warning shows where it changes the text at hand.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pkm_lightning.data.bpe import learn_bpe
from pkm_lightning.data.bpe_process import EOS, PAD, alphabet, byte_level
from pkm_lightning.data.chunks import CHUNK_CHARACTERS, MAX_CHUNK_CHARACTERS, chunks, grouped
from pkm_lightning.data.continuation import rendered_ids, without_space
from pkm_lightning.data.cutting import Cutting, cutting_of
from pkm_lightning.data.end_token import declared_end, with_declared_end
from pkm_lightning.data.files import require_file
from pkm_lightning.data.pretrained_files import begin_token_of, chat_template_of, end_token_of
from pkm_lightning.errors import DataError

__all__ = ["Tokenizer"]

# Names of control tokens in the vocabularies of common models, the preferred ones first.
END_NAMES = (EOS, "<|endoftext|>", "</s>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
PAD_NAMES = (PAD, "<|pad|>", "[PAD]")

#: Between calls of the library signals are answered: a call takes a fraction of a second.
CALL_CHARACTERS = 256 * CHUNK_CHARACTERS
#: A text is encoded whole up to this length where it is not known that a cut is exact.
MAX_WHOLE_CHARACTERS = MAX_CHUNK_CHARACTERS // 2

log = logging.getLogger(__name__)


class Tokenizer:
    """A byte-level encoding of text as ids.

    Attributes:
        pad_id: the id at padded positions.
        eos_id: the id that ends a document.
        chat_template: Jinja text that renders conversations, where one lies beside the tokenizer's file.
        begin_token: name of the token that begins a text, where a file beside the tokenizer's names one of its own.
        begins_prompts: whether the file's token stands before prompts, as in the training of a pretrained model;
            trainings of this package put none there.

    Args:
        backend: of the library.
        source: where it comes from, for messages.
        end: name of the end token; None for the one that `backend` declares, else the first known name.
    """

    chat_template: str | None = None
    begin_token: str | None = None
    begins_prompts: bool = False
    _has_warned: bool = False

    def __init__(self, backend: Backend, source: str, end: str | None = None) -> None:
        usual = next((name for name in END_NAMES if backend.token_to_id(name) is not None), None)
        declared = declared_end(backend)
        if end is not None and end != (declared or usual) and backend.token_to_id(end) is not None:
            backend, declared = with_declared_end(backend, end), end
        end_ids = _known_ids(backend, END_NAMES if declared is None else [declared])
        if not end_ids:
            raise DataError(f"{source} has no end token; add one of: {', '.join(END_NAMES)}.")
        pad_ids = _known_ids(backend, PAD_NAMES)
        # Else `<eos>` in a text would end a document.
        backend.encode_special_tokens = True
        # Some files do not call their control tokens special.
        names = (*END_NAMES, *PAD_NAMES, *([] if declared is None else [declared]))
        backend.add_special_tokens(
            [name for name in names if set(_known_ids(backend, [name])) & set(_ids(backend, name))]
        )
        _keep_names_apart(backend)
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None) is not None:
            backend.model.dropout = None
        self._backend = backend
        self.eos_id: int = end_ids[0]
        self.pad_id: int = (pad_ids or end_ids)[0]

    @property
    def has_chosen_end(self) -> bool:
        """Whether the file declares which of several end tokens ends a text."""
        return declared_end(self._backend) is not None

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides how text becomes ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def adds_space(self) -> bool:
        """Whether a space is put before each text, whatever it begins with, as SentencePiece does."""
        return self._cutting.adds_space

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without an end token."""
        return _ids(self._backend, text)

    def encode_answer(self, answer: str) -> list[int]:
        """Returns the ids of a space and `answer`, as they are behind a prompt."""
        return self.encode_batch([f" {answer}"], follows=True)[0]

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids that a model continues, at least one; see `begins_prompts`."""
        begin = self.begin_id if self.begins_prompts else None
        ids = self.encode(text) if begin is None else [begin, *self.encode(text)]
        return ids or [self.prefix_id if self.begins_prompts else self.eos_id]

    def encode_rendered(self, text: str, before: str = "") -> list[int]:
        """Returns the ids of a text by a chat template, in which the names of control tokens mean these tokens.

        Args:
            text: the text.
            before: what the template has written before it, of which the end decides whether `text` begins like a text
                of its own.
        """
        self._backend.encode_special_tokens = False
        try:
            return rendered_ids(self._backend, self._continuing, text, before)
        finally:
            self._backend.encode_special_tokens = True

    def encode_rendered_batch(self, texts: Iterable[tuple[str, str]]) -> Iterator[list[int]]:
        """Yields the ids of several texts, each with what comes before it; see `encode_rendered`."""
        if self._continuing is None:
            yield from self.encode_pieces((text for text, _ in texts), rendered=True)
        else:
            yield from (self.encode_rendered(text, before) for text, before in texts)

    @cached_property
    def _continuing(self) -> Backend | None:
        return without_space(self._backend)

    @cached_property
    def _cutting(self) -> Cutting:
        return cutting_of(json.loads(self.to_json()))

    @property
    def control_tokens(self) -> dict[str, str]:
        """The names `bos_token`, which begins a text ("" for none), and `eos_token`, for chat templates."""
        begin = self.begin_id if self.begin_token is None else self._backend.token_to_id(self.begin_token)
        names = {"bos_token": begin, "eos_token": self.eos_id}
        return {key: ("" if i is None else self._backend.id_to_token(i)) or "" for key, i in names.items()}

    @property
    def begin_id(self) -> int | None:
        """The id of the token that the file puts before each text; None where it puts none."""
        special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        first: int | None = next(iter(self._backend.encode("a").ids), None)
        return first if first in special else None

    @property
    def prefix_id(self) -> int:
        """The id that an empty text stands for: of `bos_token`, which need not be put before texts, else `eos_id`."""
        named = _known_ids(self._backend, [name for name in [self.control_tokens["bos_token"]] if name])
        return (named or [self.eos_id])[0]

    def encode_batch(self, texts: list[str], *, follows: bool = False) -> list[list[int]]:
        """Returns the ids of several texts, in parallel where the machine allows; for `follows` see `pieces`."""
        pieces = [self.pieces(text, MAX_WHOLE_CHARACTERS, follows=follows) for text in texts]
        ids = self.encode_pieces(chain.from_iterable(pieces))
        return [list(chain.from_iterable(islice(ids, len(of_text)))) for of_text in pieces]

    def encode_pieces(self, pieces: Iterable[str], *, rendered: bool = False) -> Iterator[list[int]]:
        """Yields the ids of each piece, a few pieces at a time; for `rendered` ones see `encode_rendered`."""
        for group in grouped(pieces, CALL_CHARACTERS):
            self._backend.encode_special_tokens = not rendered
            try:
                # Without offsets, which would take a quarter of the time.
                encodings = self._backend.encode_batch_fast(group, add_special_tokens=False)
            finally:
                self._backend.encode_special_tokens = True
            yield from (encoding.ids for encoding in encodings)

    def pieces(self, text: str, size: int = CHUNK_CHARACTERS, *, follows: bool = False) -> list[str]:
        """Cuts `text` into pieces for `encode_pieces`, whose ids together are those of the whole.

        Where no cut is known to be exact, a text is one piece. Only beyond `MAX_WHOLE_CHARACTERS` it is cut all the
        same, since encoding takes 250 bytes of memory per character.

        Args:
            text: to be encoded.
            size: characters per piece, 1 or more.
            follows: whether other text comes before it, as a prompt before its answer. A space at its beginning is then
                left to a tokenizer that puts one there itself.
        """
        cutting = self._cutting
        if follows and cutting.adds_space:
            text = text.removeprefix(" ")
        size = size if cutting.exact else MAX_WHOLE_CHARACTERS
        pieces = chunks(text, size, strict=cutting.strict, leave_out_space=cutting.adds_space)
        if len(pieces) > 1 and not cutting.exact and not self._has_warned:
            self._has_warned = True
            log.warning(
                "The tokenizer encodes texts whole; those of more than %d characters are cut, where ids may differ.",
                MAX_WHOLE_CHARACTERS,
            )
        return pieces

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids` without pad and end tokens; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def token(self, token_id: int) -> str:
        """Returns the name of an id in the vocabulary, such as `<eos>`."""
        name: str | None = self._backend.id_to_token(token_id)
        assert name is not None
        return name

    def without_additions(self) -> Tokenizer:
        """Returns a tokenizer whose file makes no other program put control tokens around a text; often this one."""
        if self._backend.encode("a").ids == _ids(self._backend, "a"):
            return self
        content = {**json.loads(self._backend.to_str()), "post_processor": None}
        return _from_json(json.dumps(content))

    def to_json(self) -> str:
        """Returns the content of a `tokenizer.json`."""
        text: str = self._backend.to_str()
        return text

    def save(self, path: Path) -> None:
        """Writes a `tokenizer.json`, and beside it the chat template."""
        path.write_text(self.to_json(), encoding="utf-8")
        if self.chat_template is not None:
            path.with_name("chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    @classmethod
    def load(cls, path: Path, key: str = "", source: str = "") -> Tokenizer:
        """Reads a `tokenizer.json`, ours or any of the `tokenizers` library.

        A `tokenizer_config.json` beside it, as in a Hugging Face folder, names the tokens that begin and end a text.

        Args:
            path: of the file.
            key: what the path is called in messages, such as `data.tokenizer=`.
            source: the file in messages, if it was converted from another one.

        Raises:
            DataError: if the file is missing, unreadable, or has no end token.
        """
        require_file(f"{key}{path}", path, "set bpe, bytes or the path of a tokenizer.json")
        try:
            backend = Backend.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            reason = str(error).split("\n")[0]
            raise DataError(f"{key}{path} cannot be read ({reason}); it must be a tokenizer.json.") from error
        tokenizer = cls(backend, source or f"{key}{path}", end_token_of(path.parent))
        tokenizer.chat_template = chat_template_of(path.parent)
        begin = begin_token_of(path.parent)
        tokenizer.begin_token = begin if begin and backend.token_to_id(begin) is not None else None
        return tokenizer

    # The library's own pickling loses `encode_special_tokens`.
    def __reduce__(self) -> tuple[Callable[[str], Tokenizer], tuple[str]]:
        return _from_json, (self._backend.to_str(),)


def _ids(backend: Backend, text: str) -> list[int]:
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


def _known_ids(backend: Backend, names: Iterable[str]) -> list[int]:
    ids = (backend.token_to_id(name) for name in names)
    return [i for i in ids if i is not None]


def _keep_names_apart(backend: Backend) -> None:
    """Has the names of control tokens and bytes cut after their first character, where a model finds them in a text.

    A unigram model takes every entry of its vocabulary for text.
    """
    if not isinstance(backend.model, models.Unigram):
        return
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    names = [re.escape(name) for name in special if backend.token_to_id(name) in _ids(backend, name) and len(name) > 1]
    if backend.token_to_id("<0x41>") in _ids(backend, "<0x41>"):
        names.append("<0x[0-9A-F]{2}>")
    if names:
        apart = pre_tokenizers.Split(Regex("|".join(f"{name[0]}(?={name[1:]})" for name in names)), "isolated")
        earlier = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
        backend.pre_tokenizer = pre_tokenizers.Sequence([*earlier, apart])


def _from_json(text: str) -> Tokenizer:
    return Tokenizer(Backend.from_str(text), "the tokenizer")


def bytes_tokenizer(special_tokens: Sequence[str] = (), normalization: str | None = None) -> Tokenizer:
    """Returns a tokenizer with one token per byte: ids 0 `<pad>`, 1 `<eos>`, 2 to 257 the bytes, then the others."""
    # Sorted, since the library returns the alphabet in an order that changes from call to call.
    vocab = {token: i for i, token in enumerate([PAD, EOS, *alphabet()])}
    backend = byte_level(models.BPE(vocab=vocab, merges=[]), normalization)
    backend.add_special_tokens([PAD, EOS, *special_tokens])
    return Tokenizer(backend, "the byte tokenizer")


def train_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (), normalization: str | None = None
) -> Tokenizer:
    """Trains a byte-level BPE on `texts`; equal texts in equal order give an equal tokenizer."""
    return Tokenizer(learn_bpe(texts, vocab_size, special_tokens, normalization), "the trained tokenizer")
