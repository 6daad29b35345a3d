"""What `slot_revival` cannot work with: told by the configuration where that says it, else when training starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pkm_lightning.build.instantiate import target_class
from pkm_lightning.callbacks.slot_usage import SlotUsage
from pkm_lightning.errors import ConfigError

_KEY = "callbacks.slot_revival"


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Refuses a configuration whose other parts do not go with revival from `source`.

    Raises:
        ConfigError: no `SlotUsage`, or as `check_queries`.
    """
    entries = {name: entry for name, entry in (config["callbacks"] or {}).items() if entry}
    usage = [e for name, e in entries.items() if issubclass(target_class(e, f"callbacks.{name}"), SlotUsage)]
    if not usage:
        raise missing_usage()
    if source == "queries":
        strategy = str((config["strategy"] or {}).get("_target_", ""))
        check_queries(
            counts_heads=usage[0].get("per_head") not in (False, "false"),
            engine_owns=strategy.endswith("DeepSpeed"),
            compiled=config["model"]["compile"],
        )


def missing_usage() -> ConfigError:
    """Says that there is no `SlotUsage`."""
    return ConfigError(f"{_KEY} needs callbacks.slot_usage, which knows what is dead; add it, or leave both out.")


def check_queries(*, counts_heads: bool, engine_owns: bool, compiled: bool) -> None:
    """Refuses what source=queries cannot work with.

    Raises:
        ConfigError: reads of sub-keys are not counted, or sub-keys or queries are out of reach.
    """
    if not counts_heads:
        raise ConfigError(
            f"{_KEY}.source=queries needs callbacks.slot_usage.per_head=halves (or full), which counts the reads of "
            "sub-keys."
        )
    if engine_owns:
        raise ConfigError(
            f"{_KEY}.source=queries cannot write sub-keys that DeepSpeed's engine owns; set source=busy, which "
            "writes values only, or strategy=fsdp."
        )
    if compiled:
        raise ConfigError(
            f"{_KEY}.source=queries looks at queries inside a layer, which model.compile=true hides; say "
            "source=busy, or model.compile=false."
        )
