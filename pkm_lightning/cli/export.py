"""`export`: a checkpoint's weights as one safetensors file, from a file or a folder of any number of ranks."""

from __future__ import annotations

import sys
from pathlib import Path

from pkm_lightning.checkpoints import open_checkpoint
from pkm_lightning.checkpoints.companions import CHAT_TEMPLATE, TOKENIZER, find_companion
from pkm_lightning.checkpoints.export import write
from pkm_lightning.cli.evaluation import locate
from pkm_lightning.cli.job import Job
from pkm_lightning.errors import CheckpointError, ConfigError, check_flag
from pkm_lightning.storage import check_target, is_stream, write_beside


def run(job: Job) -> None:
    """Writes the file that `file` names, and prints its content."""
    file = _target(job)
    _, path = locate(job)
    checkpoint = open_checkpoint(path)
    if checkpoint.kind == "exported":
        raise CheckpointError(f"ckpt={path} is an exported file already; copy it, or give a run's checkpoint.")
    companions = {name: _companion(name, path, file, bool(job.config.overwrite)) for name in (TOKENIZER, CHAT_TEMPLATE)}
    checkpoint.check_sums()
    entries = write(checkpoint, file)
    for name, content in companions.items():
        if content is not None:
            write_beside(file.parent / name, content)
    size = sum(entry.n_bytes for entry in entries.values())
    # What is piped on is the file alone.
    output = sys.stderr if is_stream(file) else sys.stdout
    print(f"{file}: {len(entries)} tensors, {size:,} bytes, from {path}", file=output)


def _companion(name: str, checkpoint: Path, file: Path, overwrite: bool) -> bytes | None:
    """Returns the content of the file `name` that goes beside `file`, or None where there is nothing to write.

    Raises:
        ConfigError: that of another model lies there, which would lose it.
    """
    found = find_companion(checkpoint, name)
    if found is None or is_stream(file):
        return None
    content, beside = found.read_bytes(), file.parent / name
    if beside.exists() and not overwrite and beside.read_bytes() != content:
        raise ConfigError(
            f"file={file}: the folder holds the {name} of another model; give a file in a folder of its own, or "
            "replace it with overwrite=true."
        )
    return content


def _target(job: Job) -> Path:
    check_flag("overwrite", job.config.overwrite)
    if job.config.file is None:
        raise ConfigError("export needs file=NAME.safetensors, the file to write.")
    file = Path(str(job.config.file))
    check_target("file", file)
    if is_stream(file):
        return file
    if file.suffix != ".safetensors":
        raise ConfigError(f"file={file} does not end in .safetensors; give a name that does.")
    if file.exists() and not job.config.overwrite:
        raise ConfigError(f"file={file} exists; choose another name, or replace it with overwrite=true.")
    return file
