"""Jobs of `compare` and `report` without a command line: overrides are applied to one composed configuration."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import pytest
from fake_fit import run_fakes
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict
from small import SMALL_RUN, Outcome

from pkm_lightning.build.run import ResolvedRun, resolve
from pkm_lightning.cli import compare as compare_verb
from pkm_lightning.cli import report as report_verb
from pkm_lightning.cli.job import plain
from pkm_lightning.cli.variants import split_variants
from pkm_lightning.compare import plots
from pkm_lightning.compare.overrides import last_of_each, sets_key
from pkm_lightning.compare.processes import Processes
from pkm_lightning.compare.schedule import Variant
from pkm_lightning.compare.settings import COMPARE_KEYS
from pkm_lightning.errors import PkmError

_SMALL = [override for override in SMALL_RUN if not override.startswith(("~", "trainer."))]


class FakeJob:
    """What the verbs read of a `Job`."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.given, self.flags = list(arguments), []
        self.overrides, self.variants = split_variants(arguments)
        self.config = _with_overrides(_composed("compare"), self.overrides, (*COMPARE_KEYS, "out", "resume"))

    def sets(self, key: str) -> bool:
        """Returns whether the command line sets `key`."""
        return sets_key(self.overrides, key)


@functools.cache
def _composed(name: str) -> DictConfig:
    with initialize_config_module(version_base="1.3", config_module="pkm_lightning.configs"):
        return compose(
            name, overrides=[*_SMALL, "ffn=dense", "report.resamples=100"][: None if name == "compare" else -1]
        )


@functools.cache
def _resolved() -> ResolvedRun:
    return resolve(plain(_composed("config")))


def _with_overrides(config: DictConfig, overrides: Sequence[str], groups: Sequence[str]) -> DictConfig:
    changed = copy.deepcopy(config)
    with open_dict(changed):
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            if override.key_or_group.split(".")[0] in groups:
                OmegaConf.update(changed, override.key_or_group, override.value(), force_add=True)
    return changed


def _resolve_variant(variant: Variant, base: Sequence[str]) -> ResolvedRun:
    """The dense configuration with the variant's `trainer`: a comparison reads no key that depends on the FFN."""
    overrides = last_of_each((*base, *variant.overrides))
    config = plain(_with_overrides(OmegaConf.create(_resolved().config), overrides, ("trainer",)))
    return dataclasses.replace(_resolved(), config=config)


def run_job(verb: str, *arguments: str) -> Outcome:
    """Runs `compare` or `report` in this process; an error of the user's becomes the outcome's text."""
    try:
        (compare_verb if verb == "compare" else report_verb).run(FakeJob(arguments))  # type: ignore[arg-type]
    except PkmError as error:
        return Outcome(2, "", str(error))
    return Outcome(0, "", "")


def stand_in_for_fit(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes every run of a comparison a stand-in, in the working directory `folder`."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Processes, "run", run_fakes)
    monkeypatch.setattr(compare_verb, "resolve_variant", _resolve_variant)
    monkeypatch.setattr(plots, "all_plots", lambda study: ())
