"""The folder of edits of a run or an exported file: which are applied, which are not.

The edits of a run lie in `RUN/edits`, those of an exported file `NAME.safetensors` in `NAME.edits` beside it. A file in
that folder is applied by every command that loads the model; `removed/` in it holds those that are not. A change of
either kind is one renaming, so that a kill leaves it done or not done. The weights themselves are never written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from pathlib import Path

from pkm_lightning.checkpoints.companions import run_folder
from pkm_lightning.checkpoints.edit_file import SUFFIX, Edit
from pkm_lightning.errors import ConfigError, nearest

#: Within a folder of edits: those that are not applied.
REMOVED = "removed"


def edits_folder(weights: Path) -> Path:
    """Returns where the edits of a checkpoint or an exported file lie, if there are any."""
    run = run_folder(weights)
    return weights.absolute().with_suffix(".edits") if run is None else run / "edits"


def edit_files(folder: Path, *, removed: bool = False) -> dict[str, Path]:
    """Returns the files of the edits that are applied, or of those that are `removed`, by name.

    Beside an applied edit a removed one of its name is one that it was written over, and that a kill has left.
    """
    applied = {file.stem: file for file in sorted(folder.glob(f"*{SUFFIX}"))}
    if not removed:
        return applied
    return {file.stem: file for file in sorted((folder / REMOVED).glob(f"*{SUFFIX}")) if file.stem not in applied}


def listed(known: Iterable[str]) -> str:
    """Returns names of edits for a message, the first ones where there are many."""
    names = list(known)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "none"


def read_edits(weights: Path, edits: Sequence[str | Path] | None) -> list[Edit]:
    """Returns the edits with which weights are to be used.

    Args:
        weights: the checkpoint or exported file.
        edits: names of edits of these weights, applied or removed, or files; None: the applied ones.

    Raises:
        ConfigError: `edits` is no list of names, or no edit has a name.
        CheckpointError: a file is damaged.
    """
    folder = edits_folder(weights)
    applied = edit_files(folder)
    if edits is None:
        return [Edit.load(file) for file in applied.values()]
    check_names(edits)
    known = {**edit_files(folder, removed=True), **applied}
    chosen = []
    for name in map(str, edits):
        if name not in known and not name.endswith(SUFFIX):
            raise ConfigError(
                f"edits={name}: {folder} has no edit of this name; it has: {listed(known)}.{nearest(name, known)}"
            )
        chosen.append(Edit.load(known.get(name, Path(name))))
    names = [edit.name for edit in chosen]
    if len(set(names)) < len(names):
        raise ConfigError(f"edits={','.join(names)}: a name occurs twice; give each edit once.")
    return chosen


def check_names(edits: object) -> None:
    """Refuses a value of `edits` that is no list of names and files.

    Raises:
        ConfigError: naming the value, and the entry that is none.
    """
    if not isinstance(edits, Sequence | Set) or isinstance(edits, str):
        raise ConfigError(f"edits={edits} is no list of names; give edits=[NAME,...], or edits=[] for none.")
    for name in edits:
        if not isinstance(name, str | Path) or not str(name).strip():
            raise ConfigError(
                f"edits=[{', '.join(map(str, edits))}]: {name!r} is no name; give texts, where need be in quotes, such "
                "as edits=['2024']."
            )


def remark_edits(weights: Path) -> str | None:
    """Returns a remark on the applied edits of weights from which training starts; None where there are none."""
    folder = edits_folder(weights)
    names = edit_files(folder)
    if not names:
        return None
    return (
        f"training starts from {weights} without the edits in {folder} ({listed(names)}), which fit no other weights: "
        "to train on with them, write a file with `edit merge` and start a new run from it, init_from=FILE"
    )
