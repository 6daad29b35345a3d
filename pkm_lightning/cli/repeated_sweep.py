"""The command of a sweep, given again: runs that have ended keep their value, so that a killed sweep goes on.

Interrupted runs are resumed and failed ones refused, as in a `run_dir` of one's own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pkm_lightning.build.run import resolve
from pkm_lightning.cli.initial_weights import with_saved_tokenizer
from pkm_lightning.cli.places import cache_of
from pkm_lightning.cli.resume import refuse_differences, saved_config
from pkm_lightning.compare.run_state import read_record

_log = logging.getLogger(__name__)


def has_ended_in_sweep(path: Path, command: Mapping[str, Any]) -> bool:
    """Returns whether the run in `path` has ended with the objective of the sweep that `command` belongs to.

    A run that was continued on its own has no objective in its record.
    """
    if command.get("sweep_dir") is None or command["resume"] != "auto":
        return False
    record = read_record(path)
    objective = record.get("objective") or {}
    wanted = (command["objective"], command["objective_mode"])
    return record.get("status") in ("finished", "pruned") and (objective.get("name"), objective.get("mode")) == wanted


def value_of_ended(path: Path, command: dict[str, Any], *, sets_tokenizer: bool) -> float | None:
    """Returns the objective of the run in `path`; None where it is not finite.

    Args:
        path: a run directory for which `has_ended_in_sweep`.
        command: the configuration of the command.
        sets_tokenizer: whether the command sets `data.tokenizer`.

    Raises:
        RunDirectoryError: the run had another configuration.
    """
    saved = saved_config(path, trust=command["trust_config"], executed=False, cache=cache_of(command))
    command = with_saved_tokenizer(saved, command, sets_tokenizer=sets_tokenizer)
    refuse_differences(path, saved, resolve(command, training=True).config)
    record = read_record(path)
    value = record["objective"]["value"]
    _log.info("%s is %s and keeps its %s; resume=never trains it again", path, record["status"], command["objective"])
    return float(value) if value is not None and math.isfinite(value) else None
