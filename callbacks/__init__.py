"""Callbacks that watch a run, one idea per file; the package's contract for them is in `base`.

They ship as `pkm_lightning.callbacks`. A new callback is one Python file here, one YAML and one test; nothing else is
edited. A file is imported when a name of its `__all__` is first used: `pkm_lightning.callbacks.SlotUsage` imports
`slot_usage.py`.
"""

from __future__ import annotations

from typing import Any

from pkm_lightning.discovery import find_public, list_public

# Imported as `callbacks`, every class would exist twice, and `isinstance` would fail between the two.
if __name__ != "pkm_lightning.callbacks":
    raise ImportError(
        f"'{__name__}' is pkm_lightning.callbacks; import it by that name: import pkm_lightning.callbacks"
    )


def __getattr__(name: str) -> Any:
    return find_public(__name__, name)


def __dir__() -> list[str]:
    return list_public(__name__)
