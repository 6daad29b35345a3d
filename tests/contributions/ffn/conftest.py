"""Puts `plugin/` where `pkm_lightning.ffn` looks for plugins: the file there could as well lie in the package."""

from __future__ import annotations

from pathlib import Path

import pkm_lightning.ffn

# On import, not in a fixture: the tests name the plugin in their imports, as tests of the package do.
pkm_lightning.ffn.__path__.append(str(Path(__file__).parent / "plugin"))
