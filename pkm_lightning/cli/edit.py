"""`edit`: writes facts into a trained model, and lists, shows, removes, applies and merges what was written.

The weights are never changed: an edit is a small file in the `edits` folder of the run, and one renaming moves it into
the folder, out of it, or back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pkm_lightning.adaptation.facts_file import read_facts
from pkm_lightning.adaptation.settings import WritingSettings
from pkm_lightning.build.edits import REMOVED, check_fits, edit_files, edits_folder, read_edits
from pkm_lightning.build.loading import find_weights
from pkm_lightning.checkpoints import open_checkpoint
from pkm_lightning.checkpoints.companions import run_folder
from pkm_lightning.checkpoints.edit_file import SUFFIX, Edit, weights_digest
from pkm_lightning.cli import export
from pkm_lightning.cli.edit_listing import edit_table, full_record, result_lines
from pkm_lightning.cli.edit_words import ACTIONS
from pkm_lightning.cli.evaluation import locate, names_pretrained
from pkm_lightning.cli.job import Job
from pkm_lightning.cli.loading import load_of_job
from pkm_lightning.cli.paths import expanded
from pkm_lightning.compare.overrides import key_of
from pkm_lightning.data.files import find_files
from pkm_lightning.errors import ConfigError, RunDirectoryError, check_choice, check_flag, nearest
from pkm_lightning.storage import HeldFolder, flush

_log = logging.getLogger(__name__)
#: Keys that name the model, and where it is computed.
_OF_MODEL = ("run_dir", "ckpt", "trust_config", "trainer", "table", "action")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def run(job: Job) -> None:
    """Does what `action` names, and prints what was done."""
    action = str(job.config.action)
    check_choice("action", action, ACTIONS)
    for override in job.overrides:
        top = key_of(override).partition(".")[0]
        if top not in (*_OF_MODEL, *ACTIONS[action]):
            others = ", ".join(verb for verb, keys in ACTIONS.items() if top in keys)
            raise ConfigError(f"{override}: edit {action} does not read {top}, only edit {others}; leave it out.")
    if names_pretrained(job):
        raise ConfigError(
            "model=hf has no value table to edit; retrofit it with a memory: fit model=hf ffn=memory_plus."
        )
    _, weights = locate(job)
    actions: dict[str, Callable[[Job, Path], None]] = {
        "write": _write,
        "list": _list,
        "show": _show,
        "remove": _remove,
        "apply": _apply,
        "merge": _merge,
    }
    actions[action](job, weights)


def _write(job: Job, weights: Path) -> None:
    settings = settings_of(job)
    if job.config.facts is None:
        raise ConfigError('facts is not set; give facts=FILE.jsonl, one {"prompt": TEXT, "answer": TEXT} per line.')
    path = Path(expanded("facts", str(job.config.facts)))
    facts = read_facts(path)
    name = _name(job, default=path.stem)
    check_flag("overwrite", job.config.overwrite)
    drift = None if job.config.drift_path is None else str(job.config.drift_path)
    if drift is not None:
        find_files(drift, (".txt", ".md"), "drift_path")  # before the model is read
    folder = edits_folder(weights)
    known = {**edit_files(folder), **edit_files(folder, removed=True)}
    if name in known and not job.config.overwrite:
        raise ConfigError(f"name={name}: {known[name]} exists; choose another name, or replace it with overwrite=true.")
    with _held(folder):
        # torch and the model come after everything that can be refused without them.
        from pkm_lightning.adaptation.write_facts import write_facts
        from pkm_lightning.cli.edit_text import other_text

        loaded = load_of_job(job, reads=ACTIONS["write"])
        assert loaded.edits is not None
        if name in loaded.edits.applied:
            loaded.edits.remove(name)
        text = other_text(drift, run_folder(loaded.path), loaded, settings, trust=bool(job.config.trust_config))
        edit = write_facts(
            loaded.model,
            loaded.codec(),
            facts,
            other_text=text,
            name=name,
            tables=loaded.edits,
            device=loaded.device,
            context=loaded.context,
            note=str(job.config.note),
            watch=lambda progress: _log.info(
                "step %d, %.0f s: %.1f%% of the prompts right, KL %.5f",
                progress.step,
                progress.seconds,
                100 * progress.right,
                progress.divergence,
            ),
            **settings.record(),
        )
        edit.save(folder / f"{name}{SUFFIX}")
        (folder / REMOVED / f"{name}{SUFFIX}").unlink(missing_ok=True)
    print("\n".join(result_lines(edit, folder / f"{name}{SUFFIX}")))


def settings_of(job: Job) -> WritingSettings:
    """Returns the settings of a command.

    Raises:
        ConfigError: a value of another kind or out of its range.
    """
    keys = [key for key in WritingSettings.__dataclass_fields__ if key != "seed"]
    values: dict[str, Any] = {key: job.config[key] for key in keys}
    return WritingSettings(seed=job.config.sample_seed, **values)


def _name(job: Job, default: str | None = None) -> str:
    name = default if job.config.name is None else str(job.config.name)
    if name is None:
        raise ConfigError(f"name is not set; give edit {job.config.action} name=NAME; `edit list` shows the names.")
    if not _NAME.fullmatch(name) or name.endswith(SUFFIX):
        raise ConfigError(
            f"name={name} is no name for an edit; use letters, digits, _, - and ., without {SUFFIX} at the end."
        )
    return name


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Holds a folder of edits, so that two commands do not change it at once; leaves none behind that is empty."""
    try:
        held = HeldFolder(folder)
    except BlockingIOError:
        raise RunDirectoryError(f"{folder} is being changed by another `edit`; wait until it ends.") from None
    except OSError as error:
        raise RunDirectoryError(f"{folder} cannot be written ({error.strerror}); choose another place.") from None
    try:
        yield
    except BaseException:
        held.withdraw()
        raise
    held.close()


def _known(job: Job, folder: Path, *, removed: bool) -> tuple[str, Path]:
    """Returns name and file of the edit that the command names, which is applied or `removed`."""
    name, known = _name(job), edit_files(folder, removed=removed)
    if name not in known:
        others, state = edit_files(folder, removed=not removed), "removed" if removed else "applied"
        if name in others:
            raise ConfigError(f"name={name}: this edit is {'applied' if removed else 'removed'} already.")
        raise ConfigError(
            f"name={name}: {folder} has no {state} edit of this name; it has: {', '.join(known) or 'none'}."
            f"{nearest(name, known)}"
        )
    return name, known[name]


def _move(file: Path, to: Path) -> None:
    try:
        to.parent.mkdir(exist_ok=True)
        os.replace(file, to)
        flush(to.parent)
        flush(file.parent)
    except OSError as error:
        raise RunDirectoryError(f"{file} cannot be moved to {to} ({error.strerror}).") from None


def _remove(job: Job, weights: Path) -> None:
    folder = edits_folder(weights)
    with _held(folder):
        name, file = _known(job, folder, removed=False)
        _move(file, folder / REMOVED / file.name)
    print(
        f"{name} is removed: the model answers as without it. It lies at {folder / REMOVED / file.name}; `edit apply`"
    )
    print("brings it back.")


def _apply(job: Job, weights: Path) -> None:
    folder = edits_folder(weights)
    with _held(folder):
        name, file = _known(job, folder, removed=True)
        edit, others = Edit.load(file), read_edits(weights, None)
        check_fits(edit, weights_digest(open_checkpoint(find_weights(weights))))
        _move(file, folder / file.name)
    print(f"{name} is applied: {len(edit.facts)} facts, {edit.n_lines:,} rows")
    for other in others:
        shared = sum(_shared(edit, other, table) for table in edit.tables)
        if shared:
            print(f"it shares {shared:,} rows with {other.name}: the answers of both may change")


def _shared(edit: Edit, other: Edit, table: str) -> int:
    if table not in other.tables:
        return 0
    both = set(edit.tables[table].lines_U.tolist()) & set(other.tables[table].lines_U.tolist())
    return len(both)


def _list(job: Job, weights: Path) -> None:
    folder = edits_folder(weights)
    files = [(True, file) for file in edit_files(folder).values()]
    files += [(False, file) for file in edit_files(folder, removed=True).values()]
    print(edit_table(files) if files else f"{folder}: no edits; write one with: edit run_dir=RUN facts=FILE.jsonl")


def _show(job: Job, weights: Path) -> None:
    folder, name = edits_folder(weights), _name(job)
    known = {**edit_files(folder, removed=True), **edit_files(folder)}
    if name not in known:
        raise ConfigError(
            f"name={name}: {folder} has no edit of this name; it has: {', '.join(known) or 'none'}."
            f"{nearest(name, known)}"
        )
    print(full_record(Edit.load(known[name])))


def _merge(job: Job, weights: Path) -> None:
    if not read_edits(weights, None) and not job.config.edits:
        raise ConfigError(
            f"{edits_folder(weights)} has no applied edit to merge; export writes the weights as they are."
        )
    export.run(job)
