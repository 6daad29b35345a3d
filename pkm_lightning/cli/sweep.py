"""`-m`: a sweep whose jobs are all refused leaves no folders behind.

Hydra makes the folder of the sweep, `multirun.yaml` in it and a folder per job before the job is composed or checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from pkm_lightning.cli.paths import expanded
from pkm_lightning.errors import ConfigError


class _Places:
    """The folder of a sweep as it was before, and the folders of its jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[Path] = []
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._before = self._names()

    def remove_empty(self) -> None:
        """Removes folders of jobs that wrote nothing, and the sweep's own files if none did."""
        with contextlib.suppress(OSError):
            for job in filter(Path.is_dir, self.jobs):
                if not any(job.iterdir()):
                    job.rmdir()
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
        """Keeps the sweep's folder, which does not exist yet, for `tidy_sweep`."""
        _places.set(_Places(Path(config.hydra.sweep.dir).absolute()))

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Keeps the folder of a job, likewise."""
        if (places := _places.get()) is not None:
            places.jobs.append(Path(config.hydra.runtime.output_dir))


@contextlib.contextmanager
def tidy_sweep() -> Iterator[None]:
    """Removes, when the block ends in any way, what Hydra made for jobs of a sweep in it that have written nothing."""
    token = _places.set(None)
    try:
        yield
    finally:
        if (places := _places.get()) is not None:
            places.remove_empty()
        _places.reset(token)


def check_sweep(verb: str, arguments: Sequence[str]) -> None:
    """Refuses `-m` for verbs that read a run directory, and in the directory of a run: it makes a folder per job there.

    Raises:
        ConfigError: `verb` is not fit, or a run lies where the sweep would.
    """
    given, _ = get_args_parser().parse_known_args(list(arguments))
    mode = [a for a in arguments if a.lstrip("+").lower() == "hydra.mode=multirun"]
    if not given.multirun and not mode:
        return
    if verb != "fit":
        raise ConfigError(f"{mode[0] if mode else '-m'} sweeps fit only; run {verb} once for each run_dir.")
    for key, folder in _folders(given.overrides):
        if (Path(expanded(key, folder)) / "run.json").exists():
            raise ConfigError(
                f"{key}={folder} holds a run, and a sweep would train others in folders below it; continue the run "
                f"without -m, or choose another {key}."
            )


def _folders(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields the keys and values by which a command chooses the folder of its sweep."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:  # which Hydra will report
        return
    for override in (o for o in parsed if o.key_or_group in ("run_dir", "hydra.sweep.dir") and not o.is_delete()):
        values = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
        yield from ((str(override.key_or_group), str(value).strip("'\"")) for value in values if value is not None)
