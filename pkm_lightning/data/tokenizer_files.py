"""Tokenizers in other forms than `tokenizer.json`: converted once into one, which is kept in the cache.

| file | form |
|---|---|
| `*.tiktoken` | ranks of tiktoken; `*.model` may be such a file too |
| `*.model` | SentencePiece |
| `*.gguf` | a model of llama.cpp with its tokenizer |
| folder | of Hugging Face: `tokenizer.json`, or what transformers converts; else one of the above |
| folder | with `vocab.json` and `merges.txt`, and nothing else: a BPE of bytes, as GPT-2's |
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import models

from pkm_lightning.data.bpe_process import alphabet, byte_level
from pkm_lightning.data.cache import CacheKey, Source, open_cache, sha256_file
from pkm_lightning.data.files import require_file
from pkm_lightning.data.pretrained_files import convert_tokenizer, end_token_of, is_gguf, pretrained_folder
from pkm_lightning.data.sentencepiece_file import read_model
from pkm_lightning.data.tiktoken_file import END, chosen_encoding, is_rank_file, rank_backend, read_ranks
from pkm_lightning.data.tokenizer import END_NAMES, PAD_NAMES
from pkm_lightning.errors import DataError

#: Endings of files that hold a tokenizer.
ENDINGS = (".json", ".tiktoken", ".model", ".gguf")
#: Raised when a conversion changes: tokenizers of earlier ones are then not found.
CONVERSION_VERSION = 1

_CLASS_FILES = ("tokenizer_config.json", "config.json")
_BPE_FILES = ("vocab.json", "merges.txt")
_VOCABULARIES = ("*.model", "*.tiktoken", "vocab.json", "vocab.txt")
_BESIDE = ("tokenizer_config.json", "chat_template.jinja")


def tokenizer_json(
    path: Path, cache_dir: Path, key: str, pattern: str | None = None, special_tokens: Sequence[str] = ()
) -> Path:
    """Returns the `tokenizer.json` of a file or folder, converted if need be.

    Args:
        path: see the table above.
        cache_dir: where conversions are kept.
        key: what the path is called in messages, such as `data.tokenizer=`.
        pattern: `data.tokenizer_pattern`, for ranks of tiktoken.
        special_tokens: control tokens of ranks of tiktoken.

    Raises:
        DataError: it is missing, damaged, or cannot be converted.
        ConfigError: a package or key that the conversion needs is missing.
    """
    if is_gguf(path):
        return pretrained_folder(path, cache_dir, key) / "tokenizer.json"
    if path.is_dir():
        if (path / "tokenizer.json").exists():
            return path / "tokenizer.json"
        return _of_folder(path, cache_dir, key, pattern, special_tokens)
    if path.suffix == ".json":
        require_file(f"{key}{path}", path, "set bpe, bytes or the path of a tokenizer.json")
        return path
    return _of_file(path, cache_dir, key, pattern, special_tokens)


def _of_folder(path: Path, cache_dir: Path, key: str, pattern: str | None, special_tokens: Sequence[str]) -> Path:
    vocabularies = sorted({file for name in _VOCABULARIES for file in path.glob(name)})
    if not vocabularies:
        raise DataError(
            f"{key}{path} holds no tokenizer; give a folder with tokenizer.json, or with the vocabulary of another "
            f"kind ({', '.join(_VOCABULARIES)})."
        )
    end_token_of(path)  # refuses a damaged tokenizer_config.json
    names_class = any((path / name).is_file() for name in _CLASS_FILES)
    if len(vocabularies) == 1 and vocabularies[0].suffix in ENDINGS[1:] and (pattern or not names_class):
        return _of_file(vocabularies[0], cache_dir, key, pattern, special_tokens)
    if names_class:
        arguments = {"transformers": _version("transformers")}
        files = sorted(file for file in path.iterdir() if file.suffix in (*ENDINGS[:3], ".txt", ".jinja"))
        return _kept(path, files, cache_dir, arguments, lambda folder: convert_tokenizer(path, folder, key))
    pair = [path / name for name in _BPE_FILES]
    for file in pair:
        require_file(f"{key}{file}", file, "give a folder with tokenizer.json, or with vocab.json and merges.txt")
    return _kept(path, pair, cache_dir, {}, lambda folder: _save(_bpe_of_pair(pair, f"{key}{path}"), folder))


def _of_file(path: Path, cache_dir: Path, key: str, pattern: str | None, special_tokens: Sequence[str]) -> Path:
    require_file(f"{key}{path}", path, "give a tokenizer.json, or a .tiktoken, .model or .gguf file")
    beside = [file for name in _BESIDE if (file := path.with_name(name)).is_file()]
    end_token_of(path.parent)  # refuses a damaged tokenizer_config.json
    if special_tokens and not set(special_tokens) & set(END_NAMES):
        special_tokens = [*special_tokens, END]
    arguments = {"pattern": pattern, "special_tokens": list(special_tokens)}

    def convert(folder: Path) -> None:
        content, source = path.read_bytes(), f"{key}{path}"
        if path.suffix == ".tiktoken" or is_rank_file(content):
            ranks = read_ranks(content, source)
            encoding = chosen_encoding(str(path), pattern, special_tokens, max(ranks.values()) + 1)
            _save(rank_backend(ranks, encoding, source), folder)
        else:
            _save(read_model(content, source), folder)
        for file in beside:
            shutil.copyfile(file, folder / file.name)

    return _kept(path, [path, *beside], cache_dir, arguments, convert)


def _kept(
    path: Path, files: Sequence[Path], cache_dir: Path, arguments: Mapping[str, object], convert: Callable[[Path], None]
) -> Path:
    """Returns the `tokenizer.json` that `convert` writes into a folder of the cache, unless it is there already."""
    hashes = {file.name: sha256_file(file) for file in files}
    # The name decides where a rank file is that of a published encoding.
    named = {"name": path.name, "version": CONVERSION_VERSION, "tokenizers": _version("tokenizers")}
    key = CacheKey("tokenizer", {"files": hashes, **named, **arguments})

    def build(folder: Path) -> list[Source]:
        convert(folder)
        return [Source(str(path), files=hashes)]

    return open_cache(cache_dir, key, build) / "tokenizer.json"


def _version(package: str) -> str:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else ""


def _save(backend: Backend, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")


def _bpe_of_pair(pair: Sequence[Path], source: str) -> Backend:
    """Returns the byte-level BPE of a vocab.json and a merges.txt, cut as GPT-2 cuts."""
    try:
        backend = byte_level(models.BPE.from_file(*map(str, pair)))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{source}: vocab.json or merges.txt is damaged ({error}); restore it.") from None
    if not set(alphabet()) <= backend.get_vocab().keys():
        raise DataError(
            f"{source} holds a vocabulary that is not one of bytes, as GPT-2's; add the tokenizer_config.json that "
            "names its class."
        )
    names = [name for name in (*END_NAMES, *PAD_NAMES) if backend.token_to_id(name) is not None]
    backend.add_special_tokens(names)
    return backend
