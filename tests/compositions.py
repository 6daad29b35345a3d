"""Keeps what Hydra reads and composes of the package's own YAML files.

Hydra takes 0.1 s of CPU per composition, most of it for finding, parsing and merging the files of the chosen groups,
and composes twice per command: once to learn the mode, which none of the package's files sets, once to run. The tests
choose the same groups again and again, and only values differ. Files that tests write are read anew each time.

Of the copies that Hydra makes for a job, a quarter of the time of a refused command, those are left out that nobody
needs.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from types import SimpleNamespace
from typing import Any
from unittest import mock

from hydra._internal import config_loader_impl as loader
from hydra._internal import defaults_list
from hydra._internal.config_repository import ConfigRepository, IConfigRepository
from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra._internal.hydra import Hydra
from hydra.core import utils
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import AnyNode, DictConfig

_lists: dict[tuple[Any, ...], DefaultsList] = {}
_merged: dict[tuple[Any, ...], bytes] = {}
_read: dict[tuple[str, ...], bytes] = {}


def keep_compositions() -> None:
    """Replaces the functions of Hydra that take the time by ones that remember, for the rest of the process."""
    _keep_lists()
    _keep_files()
    _skip_modes()
    utils.copy = SimpleNamespace(deepcopy=_copy_for_job)


def _keep_lists() -> None:
    list_files, merge_files = loader.create_defaults_list, loader.ConfigLoaderImpl._compose_config_from_defaults_list

    @functools.wraps(list_files)
    def listed(
        repo: IConfigRepository, config_name: str | None, overrides_list: list[Override], **options: Any
    ) -> DefaultsList:
        if not _reads_own_files(repo):
            return list_files(repo=repo, config_name=config_name, overrides_list=overrides_list, **options)
        values = Overrides(repo, overrides_list).config_overrides
        groups = (override.input_line for override in overrides_list if override not in values)
        # No list of the package has a missing group, so that `skip_missing` makes no difference.
        key = (config_name, *groups, options.get("prepend_hydra"))
        if key not in _lists:
            # Of no list of the package does an entry depend on other choices, which Hydra would collect for each file.
            with mock.patch.object(defaults_list, "_create_interpolation_map", return_value=None):
                _lists[key] = list_files(repo=repo, config_name=config_name, overrides_list=overrides_list, **options)
        return dataclasses.replace(_lists[key], config_overrides=values)

    @functools.wraps(merge_files)
    def merged(self: loader.ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        if not _reads_own_files(repo):
            return merge_files(self, defaults, repo)
        key = tuple(map(repr, defaults))
        if key not in _merged:
            _merged[key] = pickle.dumps(merge_files(self, defaults, repo))
        config: DictConfig = pickle.loads(_merged[key])
        return config

    loader.create_defaults_list = listed
    loader.ConfigLoaderImpl._compose_config_from_defaults_list = merged


def _keep_files() -> None:
    read_file = ConfigRepository.load_config

    @functools.wraps(read_file)
    def read(self: ConfigRepository, config_path: str) -> ConfigResult | None:
        if not _reads_own_files(self):
            return read_file(self, config_path)
        key = config_path, *(source.path for source in self.get_sources())
        if key not in _read:
            _read[key] = pickle.dumps(read_file(self, config_path))
        result: ConfigResult | None = pickle.loads(_read[key])
        return result

    ConfigRepository.load_config = read
    parse = ImportlibResourcesConfigSource.load_config

    @functools.wraps(parse)
    def parsed(self: ImportlibResourcesConfigSource, config_path: str) -> ConfigResult:
        if not self.path.startswith(("hydra.", "pkm_lightning.")):
            return parse(self, config_path)
        key = config_path, self.path, self.provider
        if key not in _read:
            _read[key] = pickle.dumps(parse(self, config_path))
        result: ConfigResult = pickle.loads(_read[key])
        return result

    # For compositions with files of a test, which the function above leaves alone.
    ImportlibResourcesConfigSource.load_config = parsed
    # Hydra copies its sources for each composition, and with them all structured configurations, which do not change.
    ConfigStore.__deepcopy__ = lambda self, memo: self


def _skip_modes() -> None:
    get_mode = Hydra.get_mode

    @functools.wraps(get_mode)
    def mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        if any("hydra" in override for override in overrides) or not _reads_own_files(self.config_loader.repository):
            return get_mode(self, config_name, overrides)
        return None

    Hydra.get_mode = mode


def _copy_for_job(config: DictConfig) -> DictConfig:
    """Copies what a job needs of its two copies: one loses the settings of Hydra at once, the other nobody changes."""
    if config is HydraConfig.instance().cfg:
        return config
    return copy.deepcopy(config, {id(config._get_node("hydra")): AnyNode()})


def _reads_own_files(repo: IConfigRepository) -> bool:
    return all(source.scheme() in ("pkg", "structured") for source in repo.get_sources())
