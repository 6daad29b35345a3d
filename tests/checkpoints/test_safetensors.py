"""Files of many gigabytes, as holes in sparse files."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from pkm_lightning.checkpoints.mapped import MappedFile
from pkm_lightning.checkpoints.safetensors import lay_out, map_tensors, read_entries


def test_tensors_behind_the_fourth_gigabyte_are_read(tmp_path: Path) -> None:
    shapes = dict.fromkeys(("a", "b", "c"), ((2**20, 2**10), torch.bfloat16))
    header, entries = lay_out(shapes, {"format": "pt"})
    file = tmp_path / "large.safetensors"
    with file.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + 6 * 2**30)
        stream.seek(-2, 2)
        stream.write(torch.tensor([math.pi]).bfloat16().view(torch.uint8).numpy().tobytes())
    assert read_entries(file) == entries
    _, tensors = map_tensors(MappedFile(file))
    assert tensors["c"][-1, -1] == torch.tensor(math.pi).bfloat16()
