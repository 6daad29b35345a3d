"""`export`: a checkpoint's weights as one safetensors file, from a file or a folder of any number of ranks."""

from __future__ import annotations

import sys
from pathlib import Path

from pkm_lightning.checkpoints import open_checkpoint
from pkm_lightning.checkpoints.export import write
from pkm_lightning.checkpoints.quantized import QuantizedCheckpoint
from pkm_lightning.cli.evaluation import locate
from pkm_lightning.cli.job import Job
from pkm_lightning.errors import CheckpointError, ConfigError, check_flag
from pkm_lightning.storage import check_target, is_stream


def run(job: Job) -> None:
    """Writes the file that `file` names, and prints its content."""
    file = _target(job)
    _, path = locate(job)
    checkpoint = open_checkpoint(path)
    width = job.config.quantize
    if checkpoint.kind == "exported" and width is None:
        raise CheckpointError(f"ckpt={path} is an exported file already; copy it, or give a run's checkpoint.")
    content = checkpoint if width is None else QuantizedCheckpoint(checkpoint, str(width))
    checkpoint.check_sums()
    entries = write(content, file)
    size = sum(entry.n_bytes for entry in entries.values())
    # What is piped on is the file alone.
    output = sys.stderr if is_stream(file) else sys.stdout
    print(f"{file}: {len(entries)} tensors, {size:,} bytes, from {path}", file=output)
    if isinstance(content, QuantizedCheckpoint):
        before, after = content.table_bytes
        print(f"value tables as {width}: {after:,} bytes, before {before:,}", file=output)


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
