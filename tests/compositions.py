"""Keeps what Hydra composes of the package's own YAML files for each choice of groups.

Hydra takes 0.1 s of CPU per composition, most of it for finding and merging the files of the chosen groups, and
composes twice per command: once to learn the mode, once to run. The tests choose the same groups again and again, and
only values differ. Compositions that read other files are not kept: tests write those.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
from typing import Any

from hydra._internal import config_loader_impl as loader
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

_lists: dict[tuple[Any, ...], DefaultsList] = {}
_merged: dict[tuple[Any, ...], bytes] = {}


def keep_compositions() -> None:
    """Replaces the two functions of Hydra that take the time by ones that remember, for the rest of the process."""
    list_files, merge_files = loader.create_defaults_list, loader.ConfigLoaderImpl._compose_config_from_defaults_list

    @functools.wraps(list_files)
    def listed(
        repo: IConfigRepository, config_name: str | None, overrides_list: list[Override], **options: Any
    ) -> DefaultsList:
        if not _reads_own_files(repo):
            return list_files(repo=repo, config_name=config_name, overrides_list=overrides_list, **options)
        values = Overrides(repo, overrides_list).config_overrides
        groups = (override.input_line for override in overrides_list if override not in values)
        key = (config_name, *groups, *options.items())
        if key not in _lists:
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


def _reads_own_files(repo: IConfigRepository) -> bool:
    return all(source.scheme() in ("pkg", "structured") for source in repo.get_sources())
