"""Models of SentencePiece as a `Tokenizer` of the `tokenizers` library.

Unigram and BPE models are converted, with byte fallback, dummy prefix and the normalisation that the model holds. The
conversion is compared with the sentencepiece library (extra `data`) on texts of every kind, and refused where ordinary
text would get other ids.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pkm_lightning.data.conversion_check import check_conversion
from pkm_lightning.errors import DataError, missing_extra

#: SentencePiece writes a space so.
SPACE = "\u2581"
#: A word with the spaces before it.
WORDS = f"{SPACE}*[^{SPACE}]+|{SPACE}+"
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


def read_model(content: bytes, source: str) -> Backend:
    """Returns the tokenizer of a SentencePiece model.

    Args:
        content: of the file.
        source: the file, for messages.

    Raises:
        ConfigError: sentencepiece is not installed.
        DataError: the file is no such model, or one that cannot be converted; says why.
    """
    if importlib.util.find_spec("sentencepiece") is None:
        raise missing_extra(source, "sentencepiece", "data")
    model = _parsed(content, source)
    backend = _unigram(model) if model.trainer_spec.model_type == _UNIGRAM else _bpe(model)
    _set_spaces(backend, model)
    pieces = list(model.pieces)
    special = [AddedToken(p.piece, special=True, normalized=False) for p in pieces if p.type in (_UNKNOWN, _CONTROL)]
    backend.add_special_tokens(special)
    symbols = [p.piece for p in pieces if p.type == _USER_DEFINED]
    # Looked for in the normalised text: what stands between two of them must not be normalised as a text of its own.
    backend.add_tokens([AddedToken(symbol, normalized=True) for symbol in symbols])
    from sentencepiece import SentencePieceProcessor

    check_conversion(backend, SentencePieceProcessor(model_proto=content).encode, source, "sentencepiece", symbols)
    return backend


def _parsed(content: bytes, source: str) -> Any:
    messages: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    model = messages.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception:  # the kind belongs to protobuf, of which there are several implementations
        raise DataError(f"{source} is no SentencePiece model, or a damaged one; restore the file.") from None
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    names = [piece.piece for piece in model.pieces]
    problem = (
        "it holds no vocabulary with one unknown token"
        if [piece.type for piece in model.pieces].count(_UNKNOWN) != 1
        else "a token occurs twice"
        if len(set(names)) < len(names)
        else "it is neither a unigram nor a BPE model"
        if trainer.model_type not in (_UNIGRAM, _BPE)
        else "it marks spaces at the ends of words"
        if trainer.treat_whitespace_as_suffix
        else "it does not mark spaces"
        if not normalizer.escape_whitespaces
        else "not all 256 bytes have a token"
        if trainer.byte_fallback and [piece.type for piece in model.pieces].count(_BYTE) != 256
        else ""
    )
    if problem:
        raise DataError(f"{source} is no SentencePiece model that can be used: {problem}; give another tokenizer.")
    return model


def _unigram(model: Any) -> Backend:
    pieces = list(model.pieces)
    unknown = next(i for i, piece in enumerate(pieces) if piece.type == _UNKNOWN)
    vocab = [(piece.piece, piece.score) for piece in pieces]
    return Backend(models.Unigram(vocab, unknown, model.trainer_spec.byte_fallback))


def _bpe(model: Any) -> Backend:
    pieces = list(model.pieces)
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    unknown = next(piece.piece for piece in pieces if piece.type == _UNKNOWN)
    normal = {piece.piece for piece in pieces if piece.type == _NORMAL}
    merges = []
    # The pair whose union has the highest score is merged first.
    for piece in sorted(normal, key=lambda piece: (-pieces[ids[piece]].score, ids[piece])):
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in normal and pair[1] in normal]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    fallback = model.trainer_spec.byte_fallback
    return Backend(models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback))


def _set_spaces(backend: Backend, model: Any) -> None:
    """Sets the normalisation, the mark before the first word, and what brings spaces back."""
    spec = model.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        # Symbols are normalised too before they are looked for, and must stay as they are.
        symbols = "|".join(re.escape(piece.piece) for piece in model.pieces if piece.type == _USER_DEFINED)
        before_text = Regex(rf"\A(?!(?:{symbols})\z)(?=[\s\S])")
        steps.append(normalizers.Replace(before_text, SPACE) if symbols else normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    names = [piece.piece for piece in model.pieces]
    if SPACE in names and not any(crosses_space(name, SPACE) for name in names):
        # No token reaches over the space before a word: words can be encoded, and remembered, each for itself.
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []),
        ]
    )


def crosses_space(token: str, space: str) -> bool:
    """Returns whether `token` holds a `space` after another character."""
    return space in token.lstrip(space)
