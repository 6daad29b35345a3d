"""`test`: as `validate`, on the full set of recall questions."""

from __future__ import annotations

from pkm_lightning.cli.validate import run

__all__ = ["run"]
