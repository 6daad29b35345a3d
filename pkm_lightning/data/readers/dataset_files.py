"""The files of a dataset of Hugging Face on disk: of one format, of one split, or those that `save_to_disk` wrote."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pkm_lightning.data.files import check_paths, expanded, find_files, skipped_files
from pkm_lightning.data.pretrained_files import read_json
from pkm_lightning.data.readers.tables import TABLE_ENDINGS, table_kind
from pkm_lightning.errors import ConfigError, DataError, nearest

__all__ = ["OTHER_SPLITS", "dataset_files"]

#: The reason why a file was left out, before the name of its split.
OTHER_SPLITS = "files of other splits:"
#: Words for splits in the names of files and folders, as in `train-00000-of-00002.parquet`.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORDS = re.compile(r"[^\W_\d]+")


def dataset_files(path: str | Sequence[str], split: str, key: str) -> tuple[list[Path], Counter[str]]:
    """Returns the files of a dataset, and how many were left out, by reason.

    Args:
        path: a file, a directory, a folder of `save_to_disk`, a glob, or a list of them.
        split: of a directory whose files name their splits; files that were given by name are read whatever they say.
        key: that `path` is the value of.

    Raises:
        DataError: there are none, or not of this split.
    """
    check_paths(key, path)
    files: dict[Path, None] = {}
    left_out: Counter[str] = Counter()
    for entry in [path] if isinstance(path, str) else path:
        folder = expanded(entry)
        if not os.path.isdir(folder):
            found, others = _of_known_format(entry, key), Counter[str]()
        elif saved := _saved_files(folder, split, key):
            found, others = saved, Counter()
        else:
            found, others = _of_folder(folder, split, key)
        files.update(dict.fromkeys(found))
        left_out += others
    return list(files), left_out


def _of_known_format(entry: str, key: str) -> list[Path]:
    files = find_files(entry, TABLE_ENDINGS, key)
    for file in files:
        if table_kind(file) not in TABLE_ENDINGS:
            raise DataError(
                f"{key}: {file} has the ending '{file.suffix}'; data=hf reads {', '.join(TABLE_ENDINGS)}, and "
                "data=text reads text."
            )
    return files


def _of_folder(folder: Path, split: str, key: str) -> tuple[list[Path], Counter[str]]:
    files = find_files(str(folder), TABLE_ENDINGS, key)
    kind = next(ending for ending in TABLE_ENDINGS if any(table_kind(file) == ending for file in files))
    left_out = Counter(
        {f"files of other endings: {ending}": n for ending, n in skipped_files(str(folder), [kind]).items()}
    )
    of_kind = [file for file in files if table_kind(file) == kind]
    splits = {file: _split_of(file.relative_to(folder)) for file in of_kind}
    named = sorted({found for found in splits.values() if found})
    if not named:
        return of_kind, left_out
    chosen = [file for file in of_kind if splits[file] == _SPLITS.get(split, split)]
    if not chosen:
        raise ConfigError(
            f"{_split_key(key)}={split}: the files of {key}={folder} are of the splits {', '.join(named)}; set one of "
            "them."
        )
    left_out += Counter(f"{OTHER_SPLITS} {splits[file] or 'none'}" for file in of_kind if file not in chosen)
    return chosen, left_out


def _split_key(key: str) -> str:
    """Returns the key of the split of the files that `key` names, such as `data.val_split` of `data.val_path`."""
    return key.replace("path", "split")


def _split_of(file: Path) -> str | None:
    """Returns the split that a file's name or folders name, or None."""
    words = (word for part in reversed(file.parts) for word in _WORDS.findall(part.lower()))
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def _saved_files(folder: Path, split: str, key: str) -> list[Path]:
    """Returns the files of a folder that `save_to_disk` has written; none if it is no such folder."""
    index = folder / "dataset_dict.json"
    if index.is_file():
        splits = read_json(index, "").get("splits")
        if not isinstance(splits, list) or split not in splits:
            shown = [str(name) for name in splits] if isinstance(splits, list) else []
            raise ConfigError(
                f"{_split_key(key)}={split}: {key}={folder} holds the splits {', '.join(shown)}; set one of them."
                f"{nearest(split, shown)}"
            )
        folder = folder / split
    state = folder / "state.json"
    if not state.is_file():
        return []
    entries = read_json(state, "").get("_data_files")
    names = [entry.get("filename") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    files = [folder / name for name in names if isinstance(name, str)]
    for file in files:
        if not file.is_file():
            raise DataError(f"{key}: {state} names {file.name}, which is missing; copy the folder again.")
    if not files:
        raise DataError(f"{key}: {state} names no files; save the dataset again with save_to_disk.")
    return files
