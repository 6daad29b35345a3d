"""`auto` steps and validations: as many as the data are for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pkm_lightning.build.length import complete_length
from pkm_lightning.cli.lengthening import with_length
from pkm_lightning.errors import ConfigError


def config(**trainer: Any) -> dict[str, Any]:
    return {"trainer": {"max_steps": 7, "val_check_interval": 3, "accumulate_grad_batches": 2, **trainer}}


def test_the_data_give_the_steps_and_a_tenth_of_them_the_validations() -> None:
    data = SimpleNamespace(steps=95)
    assert complete_length(config(), data) == config()
    both = complete_length(config(max_steps="auto", val_check_interval="auto"), data)
    assert both == config(max_steps=95, val_check_interval=18)  # micro-batches
    assert complete_length(config(val_check_interval="auto"), data) == config(val_check_interval=2)
    # A run that is continued by its command keeps its length.
    assert with_length(both, "auto", step=5) == both
    for unknown, message in ((SimpleNamespace(), "has no `steps`"), (SimpleNamespace(steps=0), r"steps=0")):
        with pytest.raises(ConfigError, match=message):
            complete_length(config(max_steps="auto"), unknown)
