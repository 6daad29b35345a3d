"""`-m`: what is refused of a sweep before its first run, and the folders that its refused runs leave behind.

Hydra makes the folder of the sweep, `multirun.yaml` in it and a folder per job before the job is composed or checked.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from pkm_lightning.cli.paths import expanded
from pkm_lightning.cli.sweep_record import note_trial, recorded_trials, show_sweep
from pkm_lightning.compare.objective import DEFAULT, check_objective, direction_of
from pkm_lightning.errors import ConfigError

#: Keys of a sweeper that name what it searches, in the sweepers that Hydra's authors maintain.
_SEARCHED = ("params", "search_space", "custom_search_space", "ax_config", "parametrization")

# In `configs/search`: the direction that a sweeper with its own configuration has to be given.
OmegaConf.register_new_resolver("direction", direction_of, replace=True)


class SweepRefusal(BaseException):
    """A sweep that cannot work. Not an Exception: Hydra turns one of a callback into a warning and goes on."""


class _Places:
    """The folder of a sweep as it was before, and the folders of its jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[Path] = []
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._before = self._names()

    def remove_empty(self) -> None:
        """Removes folders of jobs that wrote nothing, and the sweep's own files if none did."""
        for job in self.jobs:
            # hydra.sweep.subdir may name several folders, as in model=tiny/seed=1.
            inside = [path for path in (job, *job.parents) if self.folder in path.parents]
            with contextlib.suppress(OSError):
                for path in inside:
                    path.rmdir()
        with contextlib.suppress(OSError):
            if self._names() - self._before == {"multirun.yaml"}:
                (self.folder / "multirun.yaml").unlink()
            for path in self._made:
                path.rmdir()

    def _names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()


_places: ContextVar[_Places | None] = ContextVar("places of the sweep under way", default=None)


class NotePlaces(Callback):
    """Hydra's callback, configured under `hydra.callbacks`, by which `tidy_sweep` learns where a sweep writes."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Keeps the sweep's folder, which does not exist yet, for `tidy_sweep`.

        Raises:
            SweepRefusal: the sweep cannot work.
        """
        try:
            _check(config)
        except ConfigError as error:
            raise SweepRefusal(str(error)) from None
        _places.set(_Places(Path(config.hydra.sweep.dir).absolute()))

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Keeps the folder of a job, likewise."""
        if (places := _places.get()) is not None:
            folder = Path(config.hydra.runtime.output_dir)
            places.jobs.append(folder)
            note_trial(folder, config.hydra.overrides.task)


@contextlib.contextmanager
def tidy_sweep() -> Iterator[None]:
    """Shows, when the block ends in any way, what became of a sweep in it.

    What Hydra made for jobs that have written nothing is removed.
    """
    token = _places.set(None)
    with recorded_trials() as trials:
        try:
            yield
        finally:
            if (places := _places.get()) is not None:
                places.remove_empty()
                show_sweep(trials, places.folder)
            _places.reset(token)


def _check(config: DictConfig) -> None:
    """Refuses a sweep before its first run.

    Args:
        config: composed without the values that are swept, `hydra` included.

    Raises:
        ConfigError: nothing is swept, the objective is no figure of validation, or the sweeper is told another
            direction.
    """
    sweeper: Mapping[str, Any] = config.hydra.sweeper
    overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    swept = [override for override in overrides if override.is_sweep_override()]
    if not swept and not any(sweeper.get(key) for key in _SEARCHED):
        raise ConfigError(
            "-m has nothing to sweep: no key has several values; give one some, as in optim.lr=1e-3,3e-3, choose "
            "search=optuna, or leave out -m."
        )
    if any(override.key_or_group in ("objective", "objective_mode") for override in swept):
        raise ConfigError("a sweep has one objective, by which its runs are compared; choose one.")
    if "optuna" in str(sweeper.get("_target_")):
        _check_storage(sweeper)
        _silence_optuna()
    objective = str(config.objective or DEFAULT)
    check_objective("objective", objective)
    wanted = direction_of(objective, str(config.objective_mode))
    told = OmegaConf.to_container(config.hydra.sweeper, resolve=True).get("direction")  # type: ignore[union-attr]
    if told is not None and str(getattr(told, "name", told)) != wanted:
        raise ConfigError(
            f"hydra.sweeper.direction={getattr(told, 'name', told)} is not that of objective={objective}; set "
            f"hydra.sweeper.direction={wanted}, or use search=optuna, which sets it."
        )


def _check_storage(sweeper: Mapping[str, Any]) -> None:
    """Refuses a database for Optuna's studies where the installed libraries cannot make one.

    Raises:
        ConfigError: naming the release that can.
    """
    with contextlib.suppress(PackageNotFoundError):
        too_new = int(version("sqlalchemy").partition(".")[0]) > 1 and int(version("optuna").partition(".")[0]) < 3
        if sweeper.get("storage") and too_new:
            raise ConfigError(
                f"hydra.sweeper.storage={sweeper['storage']}: Optuna {version('optuna')} makes no database with "
                f"SQLAlchemy {version('sqlalchemy')}; pip install 'sqlalchemy<2', or leave it out."
            )


def _silence_optuna() -> None:
    """Leaves the log of Optuna to Hydra's sweeper, which logs the same, and that of the database to its warnings."""
    import optuna  # an extra, which takes a second to import

    optuna.logging.disable_default_handler()
    logging.getLogger("alembic").setLevel(logging.WARNING)  # else a line per plugin of its own


def check_sweep(verb: str, arguments: Sequence[str]) -> None:
    """Refuses `-m` for verbs that read a run directory, and in the directory of a run: it makes a folder per job there.

    Raises:
        ConfigError: `verb` is not fit, a run lies where the sweep would, or several places are named.
    """
    given, _ = get_args_parser().parse_known_args(list(arguments))
    mode = [a for a in arguments if a.lstrip("+").lower() == "hydra.mode=multirun"]
    if not given.multirun and not mode:
        return
    if verb != "fit":
        raise ConfigError(f"{mode[0] if mode else '-m'} sweeps fit only; run {verb} once for each run_dir.")
    for key, folder, is_swept in _folders(given.overrides):
        if is_swept:
            raise ConfigError(
                f"{key} has several values, but the runs of a sweep share one folder; give one, and sweep other keys "
                "(hydra.sweep.subdir names the folders of the runs)."
            )
        if (Path(expanded(key, folder)) / "run.json").exists():
            raise ConfigError(
                f"{key}={folder} holds a run, and a sweep would train others in folders below it; continue the run "
                f"without -m, or choose another {key}."
            )


def _folders(overrides: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    """Yields the keys and values by which a command chooses the folder of its sweep, and whether they are swept."""
    try:
        parsed: list[Override] = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:  # which Hydra will report
        return
    for override in (o for o in parsed if o.key_or_group in ("run_dir", "hydra.sweep.dir") and not o.is_delete()):
        value, is_swept = override.value(), override.is_sweep_override()
        if value is not None:
            yield str(override.key_or_group), str(value).strip("'\""), is_swept
