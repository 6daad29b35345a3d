"""Files that belong to weights and lie beside them: the tokenizer, and the template of conversations.

A run directory holds them at its top, an exported file in its own folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from pkm_lightning.storage import open_regular

#: `model_type` of a folder for transformers whose class is of this package.
MODEL_TYPE = "pkm_lightning"
#: In front of the `model_type` of a model of transformers that has plugins.
PLUGGED_TYPE = "pkm_lightning_"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"


def run_folder(checkpoint: Path) -> Path | None:
    """Returns the run directory that `checkpoint` lies in, as `RUN/checkpoints/NAME`, or None."""
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file() else None


def companion_place(weights: Path, name: str) -> Path:
    """Returns where the file `name` that belongs to a checkpoint or an exported file lies, if there is one."""
    return (run_folder(weights) or weights.absolute().parent) / name


def find_companion(weights: Path, name: str) -> Path | None:
    """Returns the file `name` that belongs to a checkpoint or an exported file, or None where there is none."""
    place = companion_place(weights, name)
    return place if place.is_file() else None


def model_type_of(folder: Path) -> str | None:
    """Returns the `model_type` of a folder as transformers saves it, or None for any other."""
    try:
        with open_regular(folder / "config.json", encoding="utf-8") as file:
            named = json.load(file)["model_type"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None
    return named if isinstance(named, str) else None


def advice_for_folder(folder: Path) -> str | None:
    """Returns what to do with a folder of a class of transformers in the place of a checkpoint, None for any other."""
    kind = model_type_of(folder)
    if kind is None or kind == MODEL_TYPE:
        return None
    if kind.startswith(PLUGGED_TYPE):
        return f"{folder} is a pretrained model with plugins, whose folders are for transformers: give its run"
    return f"give its folder as a pretrained model: model=hf model.path={folder}"
