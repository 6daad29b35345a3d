"""Where the files of frozen tables lie now: `table.path=`, and `extra_ffns.NAME.table.path=` of a further variant.

Verbs that compose no configuration of the run that they read have no entry NAME, so that its key is added.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from omegaconf import OmegaConf

from pkm_lightning.build.variants import MAIN
from pkm_lightning.cli.command_keys import PATH_OF_EXTRA, VERBS_WITHOUT_VARIANTS
from pkm_lightning.cli.job import Job
from pkm_lightning.compare.overrides import key_of

_OF_TABLE = re.compile(r"\+{0,2}extra_ffns\.\w+\.table\.")


def with_added_keys(verb: str, arguments: Sequence[str]) -> list[str]:
    """Returns the command line with `++` before the keys of further variants that `verb` takes or itself refuses."""
    if verb not in VERBS_WITHOUT_VARIANTS:
        return list(arguments)
    return [f"++{a.lstrip('+')}" if _OF_TABLE.match(a) and "=" in a else a for a in arguments]


def moved_tables(job: Job) -> dict[str, str] | str | None:
    """Returns the places by variant, one place that was given without a variant, or None if the command names none."""
    keys = {match[1]: match[0] for match in map(PATH_OF_EXTRA.fullmatch, map(key_of, job.overrides)) if match}
    main = OmegaConf.select(job.config, "table.path") if job.sets("table.path") else None
    places = {name: OmegaConf.select(job.config, key) for name, key in keys.items()}
    # null, as in a saved configuration, names no place.
    extras = {name: str(place) for name, place in places.items() if place is not None}
    if not extras:
        return main
    return extras if main is None else {MAIN: main, **extras}
