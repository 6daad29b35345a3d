"""`edit`: writes facts into a trained model, and lists, shows, removes, applies and merges what was written.

The weights are never changed: an edit is a small file in the `edits` folder of the run, and one renaming moves it into
the folder, out of it, or back.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pkm_lightning.adaptation.facts_file import read_facts
from pkm_lightning.adaptation.settings import WritingSettings
from pkm_lightning.build.edits import check_fits
from pkm_lightning.build.loading import find_weights, is_pretrained
from pkm_lightning.checkpoints import open_checkpoint
from pkm_lightning.checkpoints.companions import run_folder
from pkm_lightning.checkpoints.edit_file import SUFFIX, Edit, weights_digest
from pkm_lightning.checkpoints.edit_folder import REMOVED, edit_files, edits_folder, listed, read_edits
from pkm_lightning.cli import export
from pkm_lightning.cli.edit_listing import KNOWN, edit_table, full_record, list_edits, repeats, result_lines
from pkm_lightning.cli.edit_words import ACTIONS
from pkm_lightning.cli.evaluation import locate
from pkm_lightning.cli.job import Job
from pkm_lightning.cli.loading import load_of_job
from pkm_lightning.cli.paths import expanded
from pkm_lightning.compare.overrides import key_of
from pkm_lightning.data.files import find_files
from pkm_lightning.errors import ConfigError, RunDirectoryError, check_choice, check_flag, counted, nearest
from pkm_lightning.storage import HeldFolder, flush

_log = logging.getLogger(__name__)
#: Keys that name the model, and where it is computed.
_OF_MODEL = ("run_dir", "ckpt", "trust_config", "trainer", "table", "action")
#: What to do with an edit that stays removed since it fits other weights.
_MISFIT = "it stays removed; write its facts again, which `edit show` prints"
#: Short, since a character may be four bytes and a file name has at most 255.
_NAME = re.compile(r"[^\W_][\w.-]{0,49}")


def run(job: Job) -> None:
    """Does what `action` names, and prints what was done."""
    action = str(job.config.action)
    check_choice("action", action, ACTIONS)
    for override in job.overrides:
        top, _, rest = key_of(override).partition(".")
        if top not in (*_OF_MODEL, *ACTIONS[action]):
            others = ", ".join(verb for verb, keys in ACTIONS.items() if top in keys)
            raise ConfigError(f"{override}: edit {action} does not read {top}, only edit {others}; leave it out.")
        if top == "data" and (rest != "cache_dir" or override.startswith("~")):
            raise ConfigError(
                f"{override}: edit reads of data only data.cache_dir; for other text give drift_path=FILE."
            )
    _, path = locate(job)
    if is_pretrained(path):
        raise ConfigError(
            f"ckpt={path} is a pretrained model, which has no value table to edit; give it a memory: fit model=hf "
            f"model.path={path} ffn=memory_plus, and edit that run."
        )
    weights = find_weights(path, "ckpt=")
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
    name = _name(job, facts=path)
    check_flag("overwrite", job.config.overwrite)
    drift = None if job.config.drift_path is None else str(job.config.drift_path)
    if drift is not None:
        find_files(drift, (".txt", ".md"), "drift_path")  # before the model is read
    folder = edits_folder(weights)
    known = {**edit_files(folder), **edit_files(folder, removed=True)}
    for other in known:
        # On some disks a file of the other name would be the same file.
        if other.casefold() == name.casefold() and not (other == name and job.config.overwrite):
            way = ", or replace it with overwrite=true" if other == name else ""
            raise ConfigError(f"name={name}: {known[other]} exists; choose another name{way}.")
    _refuse_training(weights)
    with _held(folder):
        # torch and the model come after everything that can be refused without them.
        from pkm_lightning.adaptation.write_facts import write_facts
        from pkm_lightning.cli.edit_text import other_text

        loaded = load_of_job(job, reads=("action", *ACTIONS["write"]))
        assert loaded.edits is not None
        if name in loaded.edits.applied:
            loaded.edits.remove(name)
        for line in repeats(facts, loaded.edits.applied.values()):
            _log.warning("%s", line)
        cache = str(job.config.data.cache_dir) if job.sets("data.cache_dir") else None
        run = run_folder(loaded.path)
        text = other_text(drift, run, loaded, settings, cache=cache, trust=bool(job.config.trust_config))
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
                "step %d, %.0f s: %.1f%% of the prompts right, margin %+.2f, KL %.5f",
                *(progress.step, progress.seconds, 100 * progress.right, progress.margin, progress.divergence),
            ),
            **settings.record(),
        )
        if not edit.n_lines:
            print(KNOWN)
            return
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


def _name(job: Job, facts: Path | None = None) -> str:
    """Returns the name of the edit, that of the file of facts where the command has none."""
    name, source = job.config.name, "name="
    if name is None and facts is not None:
        name, source = facts.stem, f"facts={facts}: "
    if name is None:
        raise ConfigError(f"name is not set; give edit {job.config.action} name=NAME; `edit list` shows the names.")
    name = str(name)
    if not _NAME.fullmatch(name) or name.lower().endswith(SUFFIX):
        raise ConfigError(
            f"{source}{name} is no name for an edit; give name=NAME of at most 50 letters, digits, _, - and ., without "
            f"{SUFFIX} at the end."
        )
    return name


def _refuse_training(weights: Path) -> None:
    """Refuses a run that is being trained: the next checkpoint would have weights that the edit does not fit."""
    run = run_folder(weights)
    if run is None:
        return
    try:
        HeldFolder(run).withdraw()
    except BlockingIOError:
        raise RunDirectoryError(
            f"run_dir={run} is being trained, and an edit fits one checkpoint; wait until it ends."
        ) from None
    except OSError as error:
        raise RunDirectoryError(
            f"run_dir={run} cannot be written ({error.strerror}); copy the run to another place."
        ) from None


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
        for leftover in folder.glob("*.tmp"):  # of an `edit` that was killed
            leftover.unlink(missing_ok=True)
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
            f"name={name}: {folder} has no {state} edit of this name; it has: {listed(known)}.{nearest(name, known)}"
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
        check_fits(edit, weights_digest(open_checkpoint(weights)), _MISFIT)
        _move(file, folder / file.name)
    print(f"{name} is applied: {counted(len(edit.facts), 'fact')}, {counted(edit.n_lines, 'row')}")
    for other in others:
        shared = sum(_shared(edit, other, table) for table in edit.tables)
        if shared:
            print(f"it shares {counted(shared, 'row')} with {other.name}: the answers of both may change")


def _shared(edit: Edit, other: Edit, table: str) -> int:
    if table not in other.tables:
        return 0
    both = set(edit.tables[table].lines_U.tolist()) & set(other.tables[table].lines_U.tolist())
    return len(both)


def _list(job: Job, weights: Path) -> None:
    output = "text" if job.config.format is None else str(job.config.format)
    check_choice("format", output, ("text", "json"))
    folder = edits_folder(weights)
    files = [*edit_files(folder).values(), *edit_files(folder, removed=True).values()]
    listings = list_edits(files, weights_digest(open_checkpoint(weights))) if files else []
    if output == "json":
        print(json.dumps([listing.record() for listing in listings], ensure_ascii=False, indent=1))
        return
    empty = f"{folder}: no edits; write one with: edit run_dir=RUN facts=FILE.jsonl"
    print(edit_table(listings) if listings else empty)


def _show(job: Job, weights: Path) -> None:
    folder, name = edits_folder(weights), _name(job)
    known = {**edit_files(folder, removed=True), **edit_files(folder)}
    if name not in known:
        raise ConfigError(
            f"name={name}: {folder} has no edit of this name; it has: {listed(known)}.{nearest(name, known)}"
        )
    print(full_record(Edit.load(known[name])))


def _merge(job: Job, weights: Path) -> None:
    if not read_edits(weights, None) and not job.config.edits:
        raise ConfigError(
            f"{edits_folder(weights)} has no applied edit to merge; export writes the weights as they are."
        )
    export.run(job)
