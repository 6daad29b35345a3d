"""The files that lie beside the weights of a pretrained model, as Hugging Face names them.

| file | content |
|---|---|
| `config.json` | the architecture |
| `generation_config.json` | ids that end an answer |
| `tokenizer.json` | the tokenizer |
| `tokenizer_config.json` | the names of the tokens that begin and end a text; chat templates of earlier versions |
| `chat_template.jinja` | the template of conversations |

A GGUF file holds all of this itself. transformers (extra `hf`) converts it, which takes seconds: the files are then
kept in a cache folder.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pkm_lightning.data.cache import CacheKey, Source, open_cache
from pkm_lightning.data.files import expanded, file_identities, read_text, require_file
from pkm_lightning.errors import DataError, missing_extra
from pkm_lightning.storage import open_regular

_MAGIC = b"GGUF"
#: Raised when a conversion changes: those of earlier versions are then not read.
CONVERSION_VERSION = 1
#: Tokens that the metadata of a GGUF file name.
_NAMED = ("bos_token", "eos_token")


def default_cache() -> Path:
    """Returns the cache directory where no `data.cache_dir` is at hand."""
    return expanded(os.environ.get("PKM_LIGHTNING_CACHE") or "~/.cache/pkm_lightning")


def is_gguf(path: str | Path) -> bool:
    """Returns whether `path` names a GGUF file."""
    return str(path).lower().endswith(".gguf")


def pretrained_folder(path: Path, cache_dir: Path, key: str) -> Path:
    """Returns the folder with the files of the model `path`: itself, or that of the cache for a GGUF file.

    Args:
        path: a folder or a GGUF file.
        cache_dir: where the files of GGUF files are kept.
        key: what the path is called in messages, such as `model.path=`.

    Raises:
        DataError: it does not exist, or is no readable GGUF file.
        ConfigError: a package that reads GGUF files is not installed.
    """
    if path.is_dir():
        return path
    remedy = "give a folder with config.json and *.safetensors, or a .gguf file"
    require_file(f"{key}{path}", path, remedy)
    with open_regular(path, "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise DataError(f"{key}{path} is no GGUF file; {remedy}.")
    for package in ("transformers", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(f"{key}{path}", package, "hf")
    arguments = {
        "file": file_identities([path]),
        "version": CONVERSION_VERSION,
        "transformers": importlib.metadata.version("transformers"),
        "named": list(_NAMED),
    }

    def build(folder: Path) -> list[Source]:
        _convert(path, folder, key)
        return [Source(str(path))]

    return open_cache(cache_dir, CacheKey("gguf", arguments), build)


def read_json(file: Path, key: str) -> dict[str, Any]:
    """Returns the content of a JSON file, which is a mapping.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        with open_regular(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{key}{file} cannot be read ({reason}).") from None
    if not isinstance(content, dict):
        raise DataError(f"{key}{file} holds no mapping of names to values.")
    return content


def end_token_of(folder: Path) -> str | None:
    """Returns the name of the end token in the `tokenizer_config.json` of `folder`, or None."""
    return _named_token(folder, "eos_token")


def begin_token_of(folder: Path) -> str | None:
    """Returns the name of the token that begins a text in the `tokenizer_config.json` of `folder`, or None."""
    return _named_token(folder, "bos_token")


def _named_token(folder: Path, key: str) -> str | None:
    named = _tokenizer_config(folder).get(key)
    # Earlier versions describe a token by a mapping.
    named = named.get("content") if isinstance(named, dict) else named
    return named if isinstance(named, str) else None


def chat_template_of(folder: Path) -> str | None:
    """Returns the template of conversations of the model in `folder`, or None."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_text(file)
    template = _tokenizer_config(folder).get("chat_template")
    if isinstance(template, list):  # several, by their names
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else None


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return read_json(file, "") if file.is_file() else {}


def _convert(gguf: Path, folder: Path, key: str) -> None:
    """Writes the files of a GGUF file into `folder`."""
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoTokenizer

    try:
        with quiet_transformers(), weights_alone(gguf) as arguments:
            config = AutoConfig.from_pretrained(**arguments)
            tokenizer = AutoTokenizer.from_pretrained(**arguments)
            config.name_or_path = str(gguf.parent)  # the folder of the block is gone behind it
            shapes = {tensor.name: tensor.shape for tensor in GGUFReader(gguf).tensors}
    except Exception as error:  # of any kind, from the readers of several libraries
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(f"{key}{gguf} cannot be read as a GGUF file of a language model ({reason:.300}).") from None
    # The last is that of rows. A file may hold a tokenizer alone.
    rows = int(shapes["token_embd.weight"][-1]) if "token_embd.weight" in shapes else None
    if rows is not None and len(tokenizer) > rows:
        raise DataError(
            f"{key}{gguf} has a tokenizer of {len(tokenizer)} tokens for an embedding of {rows} rows, so that some ids "
            "have none; the file is damaged: fetch it again."
        )
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1), encoding="utf-8")
    _write_tokenizer(tokenizer, folder)


def convert_tokenizer(source: Path, folder: Path, key: str) -> None:
    """Writes the tokenizer of the Hugging Face folder `source`, which has no tokenizer.json, into `folder`.

    Raises:
        ConfigError: transformers is not installed.
        DataError: it cannot be converted.
    """
    if importlib.util.find_spec("transformers") is None:
        raise missing_extra(f"{key}{source}, which holds no tokenizer.json,", "transformers", "hf")
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        _write_tokenizer(tokenizer, folder)
    except Exception as error:  # of any kind, from the readers of several libraries
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(f"{key}{source} holds no tokenizer that transformers converts ({reason:.300}).") from None


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    named = {name: getattr(tokenizer, name) for name in _NAMED}
    (folder / "tokenizer_config.json").write_text(json.dumps(named, indent=1), encoding="utf-8")
    if isinstance(tokenizer.chat_template, str):
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


@contextlib.contextmanager
def weights_alone(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the arguments by which `from_pretrained` of transformers reads the model at `path`, as links in a folder.

    Whatever else lies beside weights transformers takes for theirs: a tokenizer.json goes before the tokenizer that a
    GGUF file holds, and an adapter_config.json adds the weights of an adapter.

    Args:
        path: a GGUF file, or a folder with config.json and safetensors files.
    """
    with tempfile.TemporaryDirectory(prefix="pkm_lightning-") as folder:
        arguments = {"pretrained_model_name_or_path": folder, "local_files_only": True, "trust_remote_code": False}
        if is_gguf(path):
            # A fixed name: of others, such as tokenizer.model.gguf, transformers derives what they hold.
            Path(folder, "model.gguf").symlink_to(path.absolute())
            yield {**arguments, "gguf_file": "model.gguf"}
            return
        for file in (path / "config.json", *path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")):
            Path(folder, file.name).symlink_to(file.absolute())
        yield {**arguments, "use_safetensors": True}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppresses the progress bars and warnings of transformers within the block."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The reader of GGUF files has a bar of its own.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
