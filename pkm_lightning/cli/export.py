"""`export`: a model's weights as one safetensors file, or as a folder that Hugging Face transformers loads: all of the
model, or its n-gram tables in the layout of Qwen's models.

From a file or a folder of any number of ranks, or from a pretrained model (`model=hf`), as it is or with plugins.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from pkm_lightning.build.adapters import merge_adapters
from pkm_lightning.build.edits import applied_line, check_fit, include_edits
from pkm_lightning.build.loading import saved_tokenizer
from pkm_lightning.build.saving import save
from pkm_lightning.build.stored_tables import include_stored_rows
from pkm_lightning.checkpoints import SavedCheckpoint, open_checkpoint
from pkm_lightning.checkpoints.companions import CHAT_TEMPLATE, TOKENIZER, companion_place, find_companion
from pkm_lightning.checkpoints.edit_file import Edit, weights_digest
from pkm_lightning.checkpoints.edit_folder import read_edits
from pkm_lightning.checkpoints.export import write
from pkm_lightning.checkpoints.quantized import QuantizedCheckpoint
from pkm_lightning.cli.command_keys import is_path_of_extra
from pkm_lightning.cli.evaluation import edits_of, locate, names_pretrained
from pkm_lightning.cli.job import Job, log_to_stderr
from pkm_lightning.cli.moved_tables import moved_tables
from pkm_lightning.cli.pretrained_run import config_of
from pkm_lightning.cli.run_contents import HELD_OUT, copy_held_out
from pkm_lightning.compare.overrides import key_of
from pkm_lightning.errors import CheckpointError, ConfigError, check_choice, check_flag
from pkm_lightning.storage import check_target, is_stream, write_beside

_log = logging.getLogger(__name__)
#: What is put into a pretrained model.
_PLUGIN_KEYS = ("ffn", "extra_ffns", "placement", "seed")


def run(job: Job) -> None:
    """Writes what `format` names, and prints its content."""
    kind = "safetensors" if job.config.format is None else str(job.config.format)
    check_choice("format", kind, ("safetensors", "hf", "ngram"))
    check_flag("overwrite", job.config.overwrite)
    _check_model_keys(job)
    {"safetensors": _write_file, "hf": _write_folder, "ngram": _write_ngrams}[kind](job)


def _check_model_keys(job: Job) -> None:
    """Refuses keys of a model where a run or checkpoint is named, which has its own."""
    for override in job.overrides:
        if names_pretrained(job):
            return
        key = key_of(override)
        group = key.partition(".")[0].partition("/")[0].partition("@")[0]
        if key == "table.path" or is_path_of_extra(job.verb, key):
            continue
        if group == "table":
            raise ConfigError(
                f"{override}: export reads no key of table but table.path, where the rows of a frozen table lie."
            )
        if group in _PLUGIN_KEYS or group == "model":
            raise ConfigError(
                f"{override}: export does not read {group} of a run or checkpoint, only of a pretrained model: "
                "model=hf model.path=PATH; leave it out."
            )


@contextlib.contextmanager
def _weights(job: Job, folder: Path) -> Iterator[Path]:
    """Gives the checkpoint to export; a pretrained model is written into `folder` as one for the time of the block."""
    _, path = locate(job)
    if not names_pretrained(job):
        yield path
        return
    from pkm_lightning.huggingface.loading import load_pretrained

    loaded = load_pretrained(config_of(job))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as place:
        yield save(loaded, place)


def _write_file(job: Job) -> None:
    file = _target(job)
    if is_stream(file):
        log_to_stderr()
    with _weights(job, Path(tempfile.gettempdir()) if is_stream(file) else file.parent) as path:
        _write_checkpoint(job, path, file)


def _write_checkpoint(job: Job, path: Path, file: Path) -> None:
    checkpoint, edits = _opened(job, path)
    width = job.config.quantize
    if checkpoint.kind == "exported" and width is None and not edits and not names_pretrained(job):
        raise CheckpointError(f"ckpt={path} is an exported file already; copy it, or give a run's checkpoint.")
    if edits and file.exists() and file.samefile(path):
        raise ConfigError(
            f"file={file} is the file that the edits are of, and they fit no other weights; give another name."
        )
    companions = {name: _companion(name, path, file, bool(job.config.overwrite)) for name in (TOKENIZER, CHAT_TEMPLATE)}
    saved_tokenizer(checkpoint)  # that of another model is refused, as it would be beside the exported file
    content = checkpoint if width is None else QuantizedCheckpoint(checkpoint, str(width))
    checkpoint.check_sums()
    entries = write(content, file)
    beside = [] if is_stream(file) else _write_beside(file.parent, companions, path, checkpoint.skeleton.get("data"))
    size = sum(entry.n_bytes for entry in entries.values())
    # What is piped on is the file alone.
    output = sys.stderr if is_stream(file) else sys.stdout
    print(f"{file}: {len(entries)} tensors, {size:,} bytes, from {_source(job)}", file=output)
    if beside:
        print(f"beside it: {', '.join(beside)}")
    if isinstance(content, QuantizedCheckpoint):
        before, after = content.table_bytes
        print(f"value tables as {width}: {after:,} bytes, before {before:,}", file=output)


def _write_beside(
    folder: Path, companions: Mapping[str, bytes | None], weights: Path, fingerprint: str | None
) -> list[str]:
    """Writes what an exported file of `weights` needs besides into its folder; returns the names."""
    for name, companion in companions.items():
        if companion is not None:
            write_beside(folder / name, companion)
        elif name == CHAT_TEMPLATE:
            (folder / name).unlink(missing_ok=True)  # of the model that was replaced
    names = [name for name, companion in companions.items() if companion is not None]
    return [*names, f"{HELD_OUT}/"] if copy_held_out(weights, fingerprint, folder) else names


def _opened(job: Job, path: Path) -> tuple[SavedCheckpoint, list[Edit]]:
    """Returns the checkpoint with edits, with merged adapters, and with the rows that lie in a file of their own.

    Second are the edits.
    """
    checkpoint = open_checkpoint(path)
    edits = [] if names_pretrained(job) else read_edits(path, edits_of(job))
    # Before adapters are merged and rows of other files are among its weights.
    digest = weights_digest(checkpoint) if edits else ""
    check_fit(edits, digest, are_named=edits_of(job) is not None)
    merge_adapters(checkpoint)
    include_stored_rows(checkpoint, moved_tables(job))
    include_edits(checkpoint, edits)
    if edits:
        _log.info("%s", applied_line(edits))
    return checkpoint, edits


def _write_folder(job: Job) -> None:
    # Importing the room costs the seconds that transformers takes, where it is installed.
    folder = _folder(job)
    with _weights(job, folder.parent) as path:
        checkpoint, _ = _opened(job, path)
        checkpoint.check_sums()
        from pkm_lightning.huggingface.export import check_replaceable, write_folder

        check_replaceable(folder)
        width = job.config.quantize
        written = write_folder(checkpoint, folder, None if width is None else str(width))
    if not written.has_tokenizer:
        place = companion_place(path, TOKENIZER)
        _log.warning("%s has no tokenizer: put that of the training at %s and export again, or use ids.", folder, place)
    print(f"{folder}: {written.kind}, {written.n_tensors} tensors, {written.n_bytes:,} bytes, from {_source(job)}")


def _write_ngrams(job: Job) -> None:
    folder = _folder(job)
    if job.config.quantize is not None or names_pretrained(job):
        key = f"quantize={job.config.quantize}" if job.config.quantize is not None else "model=hf"
        raise ConfigError(f"{key} is not for format=ngram, which writes the n-gram tables of a run as trained.")
    checkpoint, _ = _opened(job, locate(job)[1])
    checkpoint.check_sums()
    from pkm_lightning.huggingface.export import check_replaceable
    from pkm_lightning.huggingface.ngram_export import write_ngrams

    check_replaceable(folder)
    written = write_ngrams(checkpoint, folder)
    layers = ", ".join(map(str, written.layers))
    print(f"{folder}: layers {layers}, {written.n_tensors} tensors, {written.n_bytes:,} bytes, from {_source(job)}")


def _source(job: Job) -> Path:
    return locate(job)[1]


def _companion(name: str, checkpoint: Path, file: Path, overwrite: bool) -> bytes | None:
    """Returns the content of the file `name` that goes beside `file`, or None where there is nothing to write.

    Raises:
        ConfigError: that of another model lies there, which would lose it.
    """
    source, beside = find_companion(checkpoint, name), file.parent / name
    # A tokenizer of another model is noticed when the file is read; a template would be applied.
    if is_stream(file) or (source is None and name == TOKENIZER):
        return None
    content = None if source is None else source.read_bytes()
    if beside.exists() and not overwrite and beside.read_bytes() != content:
        others = ", ".join(sorted(other.name for other in file.parent.glob("*.safetensors") if other.name != file.name))
        remedy = (
            f". overwrite=true would replace it, and leave {others} in this folder with the {name} of another model"
            if others
            else ", or replace it with overwrite=true"
        )
        raise ConfigError(
            f"file={file}: the folder holds the {name} of another model; give a file in a folder of its own{remedy}."
        )
    return content


def _target(job: Job) -> Path:
    if job.config.dir is not None:
        raise ConfigError(
            f"dir={job.config.dir} is of format=hf or ngram; add one, or give file=NAME.safetensors alone."
        )
    if job.config.file is None:
        raise ConfigError("export needs file=NAME.safetensors, the file to write, or format=hf dir=FOLDER.")
    file = Path(str(job.config.file))
    check_target("file", file)
    if is_stream(file):
        return file
    if file.suffix != ".safetensors":
        raise ConfigError(f"file={file} does not end in .safetensors; give a name that does.")
    if file.exists() and not job.config.overwrite:
        raise ConfigError(f"file={file} exists; choose another name, or replace it with overwrite=true.")
    return file


def _folder(job: Job) -> Path:
    if job.config.file is not None:
        raise ConfigError(
            f"file={job.config.file} is of format=safetensors; format={job.config.format} writes a folder, dir=FOLDER."
        )
    if job.config.dir is None:
        raise ConfigError(f"format={job.config.format} needs dir=FOLDER, the folder to write.")
    folder = Path(str(job.config.dir))
    parent = Path(os.path.realpath(folder)).parent
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"dir={folder} is a file; give the name of a folder.")
    if not parent.is_dir():
        raise ConfigError(f"dir={folder}: the folder {parent} does not exist; make it first.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"dir={folder}: the folder {parent} cannot be written; choose another place.")
    if Path.cwd().is_relative_to(os.path.realpath(folder)):
        raise ConfigError(f"dir={folder} is or holds the working directory, which is not replaced; name a new folder.")
    if folder.is_dir() and any(folder.iterdir()) and not job.config.overwrite:
        raise ConfigError(f"dir={folder} is not empty; choose another name, or replace it with overwrite=true.")
    return folder
