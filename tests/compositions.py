"""Keeps what Hydra composes of the package's own YAML files, so that tests compose each command line once.

Hydra takes 0.1 s of CPU per composition and composes twice per command: once to learn the mode, once to run. A copy of
an earlier composition takes 3 ms. Compositions that read other files are not kept: tests write those.
"""

from __future__ import annotations

import functools
import os
import pickle

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.utils import JobRuntime
from hydra.types import RunMode
from omegaconf import DictConfig

_kept: dict[tuple[object, ...], bytes] = {}


def keep_compositions() -> None:
    """Replaces the function of Hydra that composes by one that remembers, for the rest of the process."""
    compose = ConfigLoaderImpl._load_configuration_impl

    @functools.wraps(compose)
    def remembered(
        self: ConfigLoaderImpl,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        sources = tuple(str(source.path) for source in self.config_search_path.get_path())
        checks = (run_mode, from_shell, validate_sweep_overrides, JobRuntime().get("name"))
        key = (sources, config_name, *overrides, *checks)
        own = all(path.startswith(("pkg://", "structured://")) for path in sources)
        if not own or any("searchpath" in override for override in overrides):
            return compose(self, config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        if key not in _kept:
            made = compose(self, config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
            _kept[key] = pickle.dumps(made)
        composed: DictConfig = pickle.loads(_kept[key])
        composed.hydra.runtime.cwd = os.getcwd()
        return composed

    ConfigLoaderImpl._load_configuration_impl = remembered  # type: ignore[method-assign]
