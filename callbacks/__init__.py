"""Callbacks that watch a run, one idea per file; the package's contract for them is in `base`.

They ship as `pkm_lightning.callbacks`. A new callback is one Python file here, one YAML and one test; nothing else is
edited. A file is imported when a name of its `__all__` is first used: `pkm_lightning.callbacks.SlotUsage` imports
`slot_usage.py`.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning as L

# Imported as `callbacks`, every class would exist twice, and `isinstance` would fail between the two.
if __name__ != "pkm_lightning.callbacks":
    raise ImportError(
        f"'{__name__}' is pkm_lightning.callbacks; import it by that name: import pkm_lightning.callbacks"
    )


def __getattr__(name: str) -> type[L.Callback]:
    """Returns the public class `name` of the file whose `__all__` lists it."""
    files = [file.name for file in pkgutil.iter_modules(__path__)]
    if not name.startswith("_") and name not in files:
        # The file that is named after the class comes first, so that no other one is imported.
        expected = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
        for file in sorted(files, key=lambda file: file != expected):
            module: Any = importlib.import_module(f"{__name__}.{file}")
            if name in getattr(module, "__all__", ()):
                public: type[L.Callback] = getattr(module, name)
                return public
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
